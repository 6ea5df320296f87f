"""What asynchronous saves hold in memory: laid out as the files will be, bounded where a bound is
set, never growing."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import cpu_only
from models import Net
from ranks import findings_of_simulated_gpu, process_memory, run_ranks
from states import assert_same, bits, mesh_of, with_own_version, wrapped
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.save import async_job, async_save
from torch_hsdp_ckpt.common.gate import Gate

_TAIL = 64  # the end of a data file: the save's id and a checksum over it
_MIB = 1 << 20


class _Run:
    """A wrapped model that trains."""

    def __init__(self, width: int, hidden: int, blocks: int = 2) -> None:
        torch.manual_seed(0)
        self.width = width
        self.model = wrapped(Net(width, hidden, 4, blocks), mesh_of(2, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.step()

    def gradients(self) -> None:
        self.model(torch.randn(2, self.width)).square().mean().backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optim": moments}

    def saved_is(self, path: str, expected: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        target = torch.utils._pytree.tree_map(
            lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v, state
        )
        h.load(target, checkpoint_id=path)
        assert_same(bits(target), expected, path)


def _files(path: str | Path, rank: int) -> list[bytes]:
    """A rank's data files up to what names the save."""
    names = sorted(
        (name for name in os.listdir(path) if name.startswith(f"__{rank}_")),
        key=lambda name: (len(name), name),
    )
    return [(Path(path) / name).read_bytes()[:-_TAIL] for name in names]


def _mixed() -> dict[str, Any]:
    """Every layout that a record can have, large and small ones in turn."""
    return {
        "number": 3,
        "list": [1, "two"],
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "large": torch.arange(700_000.0),
        "strided": torch.arange(900_000.0).view(900, 1000).t(),
        "conjugate": torch.full((300, 300), 1 + 2j, dtype=torch.complex64).conj(),
        "half": torch.arange(3_000_001).to(torch.float16),
        "bits": torch.ones(17, dtype=torch.bool),
        "last": torch.arange(1_500_000.0),
    }


def _same_bytes(rank: int, path: str) -> None:
    """The files are a synchronous save's, byte for byte, whichever way the bytes were copied and
    however many were not."""
    run = _Run(300, 700)
    plain = {
        "mixed": _mixed(),
        f"rank{rank}": torch.arange(500_000.0) + rank,
    }  # DCP plans the plain tensors of this one
    states = {"trained": run.state() | {"step": 7}, "mixed": _mixed(), "ranks": run.state() | plain}
    for name, state in states.items():
        for single in (True, False):
            writer = lambda to, single=single: h.FileSystemWriter(to, single_file_per_rank=single)  # noqa: E731
            where = f"{path}/{name}-{single}"
            h.save(state, storage_writer=writer(f"{where}-sync"))
            expected = _files(f"{where}-sync", rank)
            assert expected, (name, rank)
            for mode, limit in (
                ("lazy", None),
                ("copy", None),
                ("lazy", _MIB),
                ("copy", 3 * _MIB),
                ("verify", 0),
            ):
                to = f"{where}-{mode}-{limit}"
                saving = h.async_save(
                    state, storage_writer=writer(to), snapshot=mode, max_staging_bytes=limit
                )  # type: ignore[arg-type]
                saving.result(60)
                assert _files(to, rank) == expected, (name, single, mode, limit)
                assert limit is None or saving.staged_bytes <= limit
                block = async_save._in_flight.pool._block.numel()
                assert saving.staged_bytes <= block and (limit is None or block <= limit), (
                    name,
                    mode,
                    limit,
                    block,
                )


def test_the_files_are_those_of_a_synchronous_save(tmp_path: Path) -> None:
    run_ranks(_same_bytes, 4, str(tmp_path))


class _WritesWait:
    """Nothing is written before training has come to the gate, and that takes its time."""

    def __enter__(self) -> None:
        self._wait, reached = Gate.wait, threading.Event()

        def wait(gate: Gate) -> None:
            reached.set()
            self._wait(gate)

        def slow(op: str, path: str) -> int:
            if op == "pwrite":
                reached.wait(30)
                time.sleep(0.1)
            return 0

        Gate.wait = wait  # type: ignore[method-assign]
        _C._inject_fault(slow)

    def __exit__(self, *_: object) -> None:
        Gate.wait = self._wait  # type: ignore[method-assign]
        _C._inject_fault(None)


def _bounded(rank: int, path: str) -> None:
    """What does not fit is written while training waits: at the gate, or in the call if nothing
    guards it."""
    run = _Run(1024, 2048)  # 25 MiB for each rank to write: three blocks and more
    whole = h.async_save(run.state(), checkpoint_id=f"{path}/whole")
    whole.result(60)
    for limit in (0, 12 * _MIB):
        for mode in ("lazy", "verify"):
            state = run.state()
            expected = bits(state)
            to = f"{path}/{mode}-{limit}"
            with _WritesWait():
                saving = h.async_save(
                    state, checkpoint_id=to, snapshot=mode, max_staging_bytes=limit
                )  # type: ignore[arg-type]
                run.step()
                saving.staging_completion.result(60)
                assert saving.step_wait_seconds > 0.05, (
                    limit,
                    mode,
                )  # a write of the part that has no room
                saving.result(60)
            assert limit / 2 <= saving.staged_bytes <= limit < whole.staged_bytes, (
                limit,
                saving.staged_bytes,
            )
            run.saved_is(to, expected, run.state())

    # Nothing guards these: the call returns when they have been read.
    placements = next(run.model.parameters()).placements
    ema = DTensor.from_local(torch.full((2_000_000,), float(rank % 2)), mesh_of(2, 2), placements)
    state = run.state() | {"ema": ema, "plain": torch.arange(400_000.0)}
    expected = bits(state)
    for mode, limit in (("lazy", 2 * _MIB), ("copy", 2 * _MIB), ("copy", 0)):
        saving = h.async_save(
            state, checkpoint_id=f"{path}/ema", snapshot=mode, max_staging_bytes=limit
        )  # type: ignore[arg-type]
        ema._local_tensor.fill_(7)
        state["plain"].fill_(7)
        saving.result(60)
        assert saving.staged_bytes <= limit
        ema._local_tensor.copy_(expected["ema"])
        state["plain"].copy_(expected["plain"])
        run.saved_is(f"{path}/ema", expected, state)

    # A write past the gate to what is written from its place: found where everything is read again.
    check = async_job.check_sources

    def write_unseen(sources: Any) -> None:
        if rank == 1:
            for parameter in run.model.parameters():
                with_own_version(parameter.detach()._local_tensor).fill_(3)
        check(sources)

    async_job.check_sources = write_unseen
    future = h.async_save(
        run.state(), checkpoint_id=f"{path}/ema", snapshot="verify", max_staging_bytes=0
    )
    with pytest.raises(
        h.CheckpointError, match=r"rank 1: .*it was changed while it was being saved"
    ):
        future.result(60)
    async_job.check_sources = check
    findings_of_simulated_gpu()  # the race that was asked for
    with pytest.raises(h.CheckpointError, match="it was changed"):
        h.async_save(run.state(), checkpoint_id=f"{path}/ema")
    run.saved_is(f"{path}/ema", expected, state)

    # A disk that is full while training waits: the step goes on, the save fails everywhere, the
    # older checkpoint stays.
    if rank == 1:
        _C._inject_fault(lambda op, path: -28 if op == "pwrite" else 0)
    future = h.async_save(run.state(), checkpoint_id=f"{path}/ema", max_staging_bytes=0)
    run.step()
    assert isinstance(future.exception(60), OSError)
    _C._inject_fault(None)
    with pytest.raises(OSError, match="rank 1"):
        h.async_save(run.state(), checkpoint_id=f"{path}/ema")
    run.saved_is(f"{path}/ema", expected, state)

    for wrong, limit, more in (
        ("0 or more", -1, {}),
        ("torch's own code", 1, {"use_collectives": False}),
    ):
        with pytest.raises(ValueError, match=wrong):
            h.async_save(run.state(), checkpoint_id=f"{path}/no", max_staging_bytes=limit, **more)


def test_a_bound_on_memory_holds_back_and_fails_nothing(tmp_path: Path) -> None:
    run_ranks(_bounded, 4, str(tmp_path))


def test_the_manager_passes_the_bound_on(tmp_path: Path) -> None:
    state = {"w": torch.arange(1e6)}
    with h.CheckpointManager(tmp_path, asynchronous=True, max_staging_bytes=0) as manager:
        manager.save(1, state)
        assert manager._in_flight is not None
        assert manager._in_flight.staged_bytes == 0
        state["w"].zero_()
        assert manager.restore_latest(state) == 1
        assert torch.equal(state["w"], torch.arange(1e6))


def _memory(rank: int, path: str) -> list[tuple[int, int]]:
    """Bytes staged, and memory at the height of three saves above rest, for each bound."""
    run = _Run(1024, 4096, 3)  # 290 MiB with Adam's moments
    run.step()
    out = []
    for i, limit in enumerate((None, 20 * _MIB)):
        heights = []
        for _ in range(4):
            async_save._in_flight.finish(async_save._in_flight.job)
            async_save._in_flight.pool._block = torch.empty(0, dtype=torch.uint8)
            dist.barrier()
            state = run.state()
            Path("/proc/self/clear_refs").write_text("5")
            resting = process_memory("VmRSS")
            saving = h.async_save(state, checkpoint_id=f"{path}/{i}", max_staging_bytes=limit)
            saving.result(60)
            heights.append(process_memory("VmHWM") - resting)
        out.append(
            (saving.staged_bytes, max(heights[1:]))
        )  # libraries' pages are touched for the first time in the first one
    return out


@cpu_only("it is the host's memory, of which simulated devices take theirs")
def test_memory_is_what_is_staged_and_64_mib(tmp_path: Path) -> None:
    for rank, ((staged, height), (few, low)) in enumerate(run_ranks(_memory, 4, str(tmp_path))):
        assert staged > 60 * _MIB, (rank, staged)
        assert height <= staged + 64 * _MIB, (rank, staged, height)
        assert few <= 20 * _MIB, (rank, few)
        assert low <= 84 * _MIB, (rank, low)
