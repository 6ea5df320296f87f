"""Writes stock_<torch version>.tar.xz beside this file: checkpoints by the torch that runs it,
which the tests go on to read.

Knows nothing of this package; run it once with each torch, in an environment of its own:
    python -m venv v && v/bin/pip install torch==2.3.1 numpy setuptools && v/bin/python make.py

In each archive: ``zip`` and ``legacy`` (records in torch.save's two formats), by two ranks that
shard by rows, and ``alone``, by one process."""

import functools
import io
import multiprocessing
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._tensor import Shard, distribute_tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.device_mesh import init_device_mesh

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def values() -> dict:
    """What every archive holds; the tests have the same."""
    row = torch.arange(24).reshape(4, 6)
    state = {str(d).split(".")[1]: (row % 2 == 0) if d is torch.bool else row.to(d) for d in DTYPES}
    return {
        "kinds": state,
        "transposed": row.t().float(),
        "part": row.float()[1:3, 2:5],
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "objects": [{"lr": 0.1, "name": "text"}, (1, None, True)],
    }


def ranks(rank: int, directory: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    rows = {"even": 6, "odd": 5, "one": 1}
    full = {name: torch.arange(count * 4.0).reshape(count, 4) for name, count in rows.items()}
    sharded = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in full.items()}
    whole = torch.save
    for kind in ("zip", "legacy"):
        if kind == "legacy":
            filesystem.torch.save = functools.partial(whole, _use_new_zipfile_serialization=False)
        dcp.save({"sharded": sharded, **values()}, checkpoint_id=f"{directory}/{kind}")
    dist.destroy_process_group()


def main() -> None:
    name = Path(__file__).with_name(f"stock_{torch.__version__.split('+')[0]}.tar.xz")
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=ranks, args=(rank, directory)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit("a rank failed")
        dcp.save(values(), checkpoint_id=f"{directory}/alone")
        with tarfile.open(name, "w:xz") as archive:
            for kind in ("alone", "legacy", "zip"):
                for file in sorted(Path(directory, kind).iterdir()):
                    entry = tarfile.TarInfo(f"{kind}/{file.name}")
                    data = file.read_bytes()
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    print(name, name.stat().st_size)


if __name__ == "__main__":
    main()
