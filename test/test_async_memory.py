"""Memory that is taken away from a state while it is being saved: offloading code gives tensors
other storages, or storages other memory, between the call of ``async_save`` and the next step."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE, not_on_device
from ranks import run_ranks
from torch.distributed.tensor import DTensor, Shard
from training import mesh_of

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.save import async_job

pytestmark = not_on_device("storages of the host: a device's that is resized fails the save")

# Elements of a tensor: large enough that malloc gives the memory back to the system at once, where
# to read it ends the process.
_LARGE = 9_000_000


class _Run:
    """An optimizer whose states are guarded, and copied late."""

    def __init__(self, device: str = DEVICE, elements: int = _LARGE) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(elements, device=device))
        self.optimizer = torch.optim.Adam([self.parameter])
        self.parameter.grad = torch.ones_like(self.parameter)
        self.optimizer.step()

    def fill(self, value: float) -> None:
        """New states with one value."""
        for name in ("exp_avg", "exp_avg_sq"):
            self.states[name] = torch.full_like(self.parameter, value)

    @property
    def states(self) -> dict[str, Any]:
        return self.optimizer.state[self.parameter]

    def state_dict(self) -> dict[str, Any]:
        return {"optim": self.optimizer.state_dict()}


def _swap(tensor: torch.Tensor) -> None:
    torch.utils.swap_tensors(tensor, torch.zeros(3))


def _no_memory(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


WAYS: dict[str, Callable[[torch.Tensor], Any]] = {
    "data": lambda t: setattr(t, "data", torch.empty(0)),
    "another dtype": lambda t: setattr(t, "data", t.data.half()),
    "resize": _no_memory,
    "resize to less": lambda t: t.untyped_storage().resize_(4096),
    "share": lambda t: t.share_memory_(),
    "swap": _swap,
}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied late is copied after what the test does next."""
    begin = async_job.begin_copy

    def begin_late(*arguments: Any) -> None:
        time.sleep(0.1)
        begin(*arguments)

    monkeypatch.setattr(async_job, "begin_copy", begin_late)


@pytest.mark.parametrize(("way", "limit"), [*((way, None) for way in WAYS), ("resize", 0)])
def test_what_is_saved_is_the_memory_of_the_call(
    tmp_path: Path, late: None, way: str, limit: int | None
) -> None:
    """Whether it is copied first or, for want of room, written from where it is."""
    run = _Run()
    run.fill(2.0)
    future = h.async_save(run.state_dict(), checkpoint_id=tmp_path, max_staging_bytes=limit)
    for name in ("exp_avg", "exp_avg_sq"):
        WAYS[way](run.states[name])
    run.states.clear()
    gc.collect()
    future.result(60)
    target = {"optim": {"state": {0: {"exp_avg": torch.zeros(_LARGE)}}}}
    h.load(target, checkpoint_id=tmp_path)
    assert (target["optim"]["state"][0]["exp_avg"] == 2.0).all()


def test_a_storage_has_its_own_pointer_back_when_the_save_is_over(tmp_path: Path) -> None:
    run = _Run(elements=1000)
    run.fill(1.0)
    for _ in range(3):
        h.async_save(run.state_dict(), checkpoint_id=tmp_path).result(60)
    # torch makes lazy clones of plain pointers only.
    clone = torch._lazy_clone(run.states["exp_avg"])
    clone += 1
    assert (run.states["exp_avg"] == 1.0).all()
    assert (clone == 2.0).all()


def test_set_is_bytes_of_the_call_or_an_error_with_the_name(tmp_path: Path, late: None) -> None:
    """It moves the tensor's version counter, as a write does."""
    run = _Run()
    future = h.async_save(run.state_dict(), checkpoint_id=tmp_path)
    run.states["exp_avg"].set_(torch.empty(0))
    with pytest.raises(h.CheckpointError, match=r"optim\.state\.0\.exp_avg: it was changed"):
        future.result(60)
    with pytest.raises(h.CheckpointError, match="it was changed"):
        h.async_save(run.state_dict(), checkpoint_id=tmp_path)


def _planned_anew(rank: int, path: str) -> None:
    mesh = mesh_of((4,))
    shards = [
        DTensor.from_local(torch.full((100_000,), float(rank + i)), mesh, [Shard(0)])
        for i in range(2)
    ]
    parameters = [torch.nn.Parameter(shard) for shard in shards]
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    momenta = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    for i, momentum in enumerate(momenta):
        momentum._local_tensor.fill_(rank + i)
    # A key of this rank's own: ranks find out when they compare, and plan what all of them hold.
    state = {f"of rank {rank}": torch.ones(1), "a": momenta[0], "b": momenta[1]}
    peers_call_late = rank != 0
    if peers_call_late:
        time.sleep(0.3)
    future = h.async_save(state, checkpoint_id=path)
    momenta[0]._local_tensor.data = torch.empty(0)
    momenta[1]._local_tensor.untyped_storage().resize_(0)
    future.result(60)
    dist.barrier()
    target = {"a": torch.zeros(400_000), "b": torch.zeros(400_000)}
    h.load(target, checkpoint_id=path)
    for i, values in enumerate(target.values()):
        expected = torch.arange(4.0).repeat_interleave(100_000) + i
        assert torch.equal(values, expected)


def test_ranks_that_plan_anew_read_the_memory_of_the_call(tmp_path: Path) -> None:
    run_ranks(_planned_anew, 4, str(tmp_path))
