"""Public behaviour that torch's own tests of distributed.checkpoint pin, on both sides."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from sides import SIDES, assert_same, layers, sharded
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    _patch_model_state_dict,
    _patch_optimizer_state_dict,
    get_state_dict,
)

import torch_hsdp_ckpt as ours

ENGINES = (ours, dcp)


def _path(directory: str, name: str, engine) -> str:
    return f"{directory}/{name}-{engine.__name__}"


def _trained(side) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = sharded(side, layers())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _local(state) -> dict:
    model, optim = state
    values = {name: value.to_local().clone() for name, value in model.items()}
    for name, each in optim["state"].items():
        values |= {f"{name}.{key}": each[key].to_local().clone() for key in ("exp_avg",)}
    return values


def _objects_as_they_are(rank: int, directory: str) -> None:
    """``test_e2e``, ``test_e2e_async_cached``: model and optimizer handed over as objects."""
    for engine, side in zip(ENGINES, SIDES, strict=True):
        model, optimizer = _trained(side)
        _patch_model_state_dict(model)
        _patch_optimizer_state_dict(model, optimizers=optimizer)
        expected = _local(get_state_dict(model, optimizer))
        state = {"model": model, "optimizer": optimizer}
        path = _path(directory, "objects", engine)
        engine.save(state, checkpoint_id=path)
        engine.async_save(state, checkpoint_id=path + "-async").result()
        dist.barrier()
        for saved in (path, path + "-async"):
            fresh, fresh_optimizer = _trained(side)
            with torch.no_grad():
                for p in fresh.parameters():
                    p.zero_()
            _patch_model_state_dict(fresh)
            _patch_optimizer_state_dict(fresh, optimizers=fresh_optimizer)
            engine.load({"model": fresh, "optimizer": fresh_optimizer}, checkpoint_id=saved)
            assert_same([expected, _local(get_state_dict(fresh, fresh_optimizer))])


class _Collective:
    """Its load talks to the other ranks."""

    def __init__(self, all_reduce: bool) -> None:
        self.all_reduce = all_reduce
        self.loaded = False

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        if self.all_reduce:
            dist.all_reduce(torch.ones(1))
        else:
            dist.all_gather([torch.ones(1) for _ in range(dist.get_world_size())], torch.ones(1))
        self.loaded = True


def _stateful_in_any_order(rank: int, directory: str) -> None:
    """``test_different_ordered_state_dict_keys``, ``TestInitStateDict``, ``test_no_dist``."""
    for engine in ENGINES:
        a, b = _Collective(False), _Collective(True)
        state = {"a": a, "b": b} if rank == 0 else {"b": b, "a": a}
        path = _path(directory, "stateful", engine)
        engine.save(state, checkpoint_id=path)
        engine.load(state, checkpoint_id=path)
        assert a.loaded and b.loaded
        nested = {"t": torch.full((2,), 3.0), "lr": 0.1}
        engine.save({"optim": nested}, checkpoint_id=path + "-nested")
        target = {"t": torch.zeros(2), "lr": 0.2}
        state = {"optim": target}
        engine.load(state, checkpoint_id=path + "-nested")
        assert state["optim"] is target
        assert target["lr"] == 0.1 and torch.equal(target["t"], nested["t"])
        engine.save({}, checkpoint_id=path + "-empty")
        engine.load({}, checkpoint_id=path + "-empty")


def _other_coordinators(rank: int, directory: str) -> None:
    """``test_save_error_handling`` and its kin, with ``coordinator_rank``."""
    storages = ((ours.FileSystemWriter, ours.FileSystemReader),)
    storages += ((dcp.FileSystemWriter, dcp.FileSystemReader),)
    for writer, reader in storages:
        path = f"{directory}/coordinator-{writer.__module__}"
        for coordinator in (1, 3):
            state = {"a": torch.full((4,), float(coordinator))}
            dcp.save_state_dict(state, writer(path), coordinator_rank=coordinator)
            target = {"a": torch.zeros(4)}
            dcp.load_state_dict(target, reader(path), coordinator_rank=coordinator)
            assert torch.equal(target["a"], state["a"])


def _storage_meta(rank: int, directory: str) -> None:
    """``test_storage_meta``."""
    for storage, engine in ((ours, dcp), (ours, ours), (dcp, dcp)):
        path = f"{directory}/meta-{storage.__name__}-{engine.__name__}"
        writer = storage.FileSystemWriter(path)
        engine.save({"a": torch.ones(2)}, storage_writer=writer)
        reader = storage.FileSystemReader(path)
        meta = reader.read_metadata().storage_meta
        assert str(meta.checkpoint_id) == path
        assert meta.save_id == writer.save_id or rank != 0  # the coordinator's
        assert meta.load_id == reader.load_id


class _Unpicklable:
    def __reduce__(self):
        raise ValueError("this can't be pickled")


def _failures_by_rank(rank: int, directory: str) -> None:
    """``test_save_error_handling``: exactly the ranks that failed are named."""
    for storage in ENGINES:
        state = {f"object {rank}": _Unpicklable() if rank in (2, 3) else "fine"}
        with pytest.raises(CheckpointException) as error:
            writer = storage.FileSystemWriter(f"{directory}/failures-{storage.__name__}")
            dcp.save(state, storage_writer=writer)
        assert set(error.value.failures) == {2, 3}, storage.__name__


def test_as_dcps_tests(tmp_path) -> None:
    for check in (
        _objects_as_they_are,
        _stateful_in_any_order,
        _other_coordinators,
        _storage_meta,
        _failures_by_rank,
    ):
        run_ranks(check, 4, str(tmp_path))
