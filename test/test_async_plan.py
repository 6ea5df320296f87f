"""What ``async_save`` keeps from save to save, and notices: a plan fits only the structure that it
was made for."""

import gc
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from device import DEVICE
from models import batch, even_net
from ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.utils._pytree import tree_leaves, tree_map
from training import loss_of, wrap

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.save import capture as _capture
from torch_hsdp_ckpt.checkpoint.snapshot import staged as _staged


def _local(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


def _variants(rank: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """States of two ranks, each unlike the first one in one thing that the plan depends on, and in
    no other that it could be told by. Made anew at each call, but for the meshes and the DTensors'
    specs."""
    mesh, reverse = DeviceMesh(DEVICE, [0, 1]), DeviceMesh(DEVICE, [1, 0])
    values = torch.arange(32.0) + 100 * rank

    def sharded(
        place: Placement, mesh: DeviceMesh, dtype: torch.dtype = torch.float32
    ) -> Callable[[], DTensor]:
        spec = DTensor.from_local(
            torch.zeros(4, 8, dtype=dtype), mesh, [place], run_check=False
        )._spec
        own = values if isinstance(place, Shard) else values % 100  # replicas are equal
        return lambda: DTensor(own.to(dtype).view(4, 8), spec, requires_grad=False)

    rows, plain = sharded(Shard(0), mesh), lambda: torch.arange(24.0).view(6, 4)
    return {
        "as it is": lambda: {"w": rows(), "p": plain(), "o": [3, rank]},
        "cut along columns": lambda: {"w": sharded(Shard(1), mesh)(), "p": plain(), "o": [3, rank]},
        "replicated": lambda: {"w": sharded(Replicate(), mesh)(), "p": plain(), "o": [3, rank]},
        "another mesh": lambda: {"w": sharded(Shard(0), reverse)(), "p": plain(), "o": [3, rank]},
        "a shard's dtype": lambda: {
            "w": sharded(Shard(0), mesh, torch.int32)(),
            "p": plain(),
            "o": [3, rank],
        },
        "dtype": lambda: {"w": rows(), "p": plain().int(), "o": [3, rank]},
        "strides": lambda: {"w": rows(), "p": torch.arange(24.0).view(4, 6).t(), "o": [3, rank]},
        "shape": lambda: {"w": rows(), "p": plain().view(4, 6), "o": [3, rank]},
        "part of a storage": lambda: {
            "w": rows(),
            "p": torch.arange(48.0).view(6, 8)[:, ::2],
            "o": [3, rank],
        },
        "a parameter": lambda: {"w": rows(), "p": torch.nn.Parameter(plain()), "o": [3, rank]},
        "key": lambda: {"w": rows(), "q": plain(), "o": [3, rank]},
        "order": lambda: {"p": plain(), "w": rows(), "o": [3, rank]},
        "nested": lambda: {"n": {"w": rows()}, "n.p": plain(), "o": [3, rank]},
        "nested, the same names": lambda: {"n": {"w": rows(), "p": plain()}, "o": [3, rank]},
        "an object for a tensor": lambda: {"w": rows(), "p": 5, "o": [3, rank]},
        "a tensor for an object": lambda: {"w": rows(), "p": plain(), "o": torch.ones(3)},
        "another type": lambda: {"w": rows(), "p": plain(), "o": (3, rank)},
    }


def _kept_plans(rank: int, path: str) -> None:
    make, planned = _capture.make_static_plan, []
    _capture.make_static_plan = lambda *a: planned.append(1) or make(*a)  # type: ignore[func-returns-value]
    variants = _variants(rank)
    for before in (
        None,
        "as it is",
    ):  # what is changed is found out with the plan of the others kept, and at once
        for name, state_of in variants.items():
            if before is not None:
                h.async_save(variants[before](), checkpoint_id=f"{path}/before").result(60)
            state = state_of()
            for again in (False, True):
                planned.clear()
                to = f"{path}/{name}-{before}-{again}"
                h.async_save(state, checkpoint_id=to).result(60)
                if again:
                    assert not planned, name
                target = tree_map(
                    lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None, state
                )
                dcp.load(target, storage_reader=dcp.FileSystemReader(to))
                leaves = zip(tree_leaves(target), tree_leaves(state), strict=True)
                for got, expected in leaves:
                    if isinstance(expected, torch.Tensor):
                        assert torch.equal(_local(got), _local(expected)), (name, before)
                        assert got.dtype == expected.dtype, (name, before)
                names = dcp.FileSystemReader(to).read_metadata().planner_data
                assert names is not None
                assert {"/".join(map(str, at)) for at in names.values()} == _paths(state), (
                    name,
                    before,
                )
    _capture.make_static_plan = make


def _paths(state: Any, at: str = "") -> set[str]:
    out: set[str] = set()
    for key, value in state.items():
        out |= _paths(value, f"{at}{key}/") if isinstance(value, dict) else {f"{at}{key}"}
    return out


def _clipped(rank: int, path: str) -> None:
    """Gradients that are saved along are the ones at the call, though they are clipped at once."""
    model = wrap(even_net(), (1, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, batch(even_net(), step, rank)).backward()
        if step == 0:
            optimizer.step()
    state = {
        "model": model.state_dict(),
        "grads": {name: p.grad for name, p in model.named_parameters()},
    }
    expected = [_local(v).clone() for v in tree_leaves(state)]
    future = h.async_save(state, checkpoint_id=path)
    model.clip_grad_norm_(1e-3)
    optimizer.step()
    future.result(60)
    assert all(float(_local(g).norm()) <= 1.1e-3 for g in state["grads"].values())
    target = tree_map(torch.zeros_like, state)
    h.load(target, checkpoint_id=path)
    assert all(
        torch.equal(_local(a), b) for a, b in zip(tree_leaves(target), expected, strict=True)
    )


def _two_ranks(rank: int, path: str) -> None:
    _kept_plans(rank, f"{path}/plans")
    _clipped(rank, f"{path}/clipped")


def test_a_kept_plan_fits_only_what_it_was_made_for(tmp_path: Path) -> None:
    run_ranks(_two_ranks, 2, str(tmp_path))


class _TakesItselfAway:
    """A value that leaves its container while somebody asks what it is."""

    def __init__(self, home: list[Any]) -> None:
        self.home = home

    @property
    def __class__(self) -> type:  # type: ignore[override]  # what isinstance() asks
        self.home.clear()
        gc.collect()
        return _TakesItselfAway


def test_values_that_leave_their_container_while_it_is_read_are_kept() -> None:
    home: list[Any] = [torch.ones(2)]
    home.append(_TakesItselfAway(home))
    seen = weakref.ref(home[1])
    live = _C.LiveState({"list": home})
    assert not home
    assert seen() is not None
    assert live.values[1] is seen()


def test_nothing_is_read_again_where_nothing_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a guarded tensor the call itself waits for what is written in its place."""
    read: list[Any] = []
    monkeypatch.setattr(_staged, "checksum", lambda record: read.append(record) or 0)
    state = {"w": torch.arange(500_000.0)}
    future = h.async_save(
        state, checkpoint_id=tmp_path / "c", snapshot="verify", max_staging_bytes=0
    )
    state["w"].zero_()
    future.result(60)
    assert not read
    target = {"w": torch.zeros(500_000)}
    h.load(target, checkpoint_id=tmp_path / "c")
    assert torch.equal(target["w"], torch.arange(500_000.0))


def test_the_arguments_are_torchs_and_more() -> None:
    ours, torchs = (inspect.signature(each).parameters for each in (h.async_save, dcp.async_save))
    assert list(ours)[: len(torchs)] == list(torchs)
    for name, parameter in torchs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    assert list(ours)[len(torchs) :] == [
        "snapshot",
        "in_flight",
        "max_staging_bytes",
        "trust_objects",
    ]
