"""Reads checkpoints with stock torch alone and compares them. Fed to an interpreter: nothing of
this package is imported.

Arguments: CHECKPOINT EXPORTED OTHER_CHECKPOINT. Prints one JSON object: how many tensors and bytes
were read, and the names of those that differ from what the job held in memory (EXPORTED, by
torch.save) and from OTHER_CHECKPOINT, bit for bit."""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def convert(checkpoint: str) -> Any:
    """Returns the state dict that torch's own tool makes of a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        dcp_to_torch_save(checkpoint, Path(scratch) / "state.pt")
        return torch.load(Path(scratch) / "state.pt", weights_only=True)


def tensors(prefix: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(f"{prefix}.{key}", inner)


def trained(state: Any) -> dict[str, torch.Tensor]:
    """Returns the model's and the optimizer's tensors by name; the rest of a state (random numbers)
    differs by rank."""
    return {
        name: tensor for key in ("model", "optimizer") for name, tensor in tensors(key, state[key])
    }


def different(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    """Returns the names of the tensors that only one side has, or that differ in a bit."""
    alone = ours.keys() ^ others.keys()
    both = ours.keys() & others.keys()
    unequal = {name for name in both if not same_bits(ours[name], others[name])}
    return sorted(alone | unequal)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def main(checkpoint: str, exported: str, other: str) -> None:
    read = trained(convert(checkpoint))
    result = {
        "torch": torch.__version__,
        "tensors": len(read),
        "bytes": sum(t.nbytes for t in read.values()),
        "memory": different(read, trained(torch.load(exported, weights_only=True))),
        "other": different(read, trained(convert(other))),
        "foreign": sorted(name for name in sys.modules if name.startswith("torch_hsdp_ckpt")),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
