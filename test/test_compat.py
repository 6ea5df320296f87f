"""``compat.patch()``: this package in torch's place, by name."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed._composable.fsdp
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as fsdp
from ranks import run_checks, run_ranks
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter as StockWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import mesh_of

import torch_hsdp_ckpt as ours
from torch_hsdp_ckpt.compat import Replaced, patch

NAMES = {
    fsdp: ("FullyShardedDataParallel", "fully_shard"),
    dcp: ("save", "load", "async_save", "FileSystemWriter", "FileSystemReader"),
}


class _Derived(fsdp.FullyShardedDataParallel):
    """A subclass from before."""


def _user() -> ModuleType:
    """A module that has imported the names before."""
    module = ModuleType("imports_torchs_names")
    for source, names in NAMES.items():
        for name in names:
            setattr(module, f"my_{name}", getattr(source, name))
    sys.modules[module.__name__] = module
    return module


def test_names_are_replaced_everywhere_and_given_back() -> None:
    user = _user()
    before = {(source, name): getattr(source, name) for source in NAMES for name in NAMES[source]}
    with patch() as patched:
        for (source, name), original in before.items():
            assert getattr(source, name) is not original
            assert getattr(user, f"my_{name}") is getattr(source, name)
            assert Replaced(user.__name__, f"my_{name}") in patched.report()
        assert Replaced("torch.distributed._composable.fsdp", "fully_shard") in patched.report()
        assert (
            Replaced("torch.distributed.checkpoint.filesystem", "FileSystemWriter")
            in patched.report()
        )
        report = patched.report()
        assert patch().report() == report, "a second time changes nothing"
        late = ModuleType("imports_them_later")
        sys.modules[late.__name__] = late
        late.fully_shard = fsdp.fully_shard
    for (source, name), original in before.items():
        assert getattr(source, name) is original is getattr(user, f"my_{name}")
    assert late.fully_shard is fsdp.fully_shard
    assert not patched.report()


def _wrappers(rank: int) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    unpatched = fsdp.FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    derived = _Derived(nn.Linear(4, 4), device_id=torch.device("cpu"))
    with patch():
        fsdp.fully_shard(net[0], mesh=mesh_of((2, 2)))
        assert isinstance(net[0], ours.FSDPModule) and isinstance(net[0], fsdp.FSDPModule)
        assert fsdp.fully_shard.state(net[0]) is net[0]._get_fsdp_state()
        wrapped = fsdp.FullyShardedDataParallel(
            nn.Sequential(nn.Linear(4, 4)),
            device_mesh=mesh_of((2, 2)),
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        )
        assert type(wrapped) is ours.FullyShardedDataParallel
        for module in (wrapped, unpatched, derived):
            assert isinstance(module, fsdp.FullyShardedDataParallel)
        assert not isinstance(net[1], fsdp.FullyShardedDataParallel)
        assert issubclass(_Derived, fsdp.FullyShardedDataParallel)

        class Later(fsdp.FullyShardedDataParallel):
            pass

        assert issubclass(Later, fsdp.FullyShardedDataParallel)
        assert Later.__mro__[1] is _Derived.__mro__[1]
        # Static methods go by the module.
        optimizer = torch.optim.Adam(wrapped.parameters())
        wrapped(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        with fsdp.FullyShardedDataParallel.state_dict_type(
            wrapped, fsdp.StateDictType.SHARDED_STATE_DICT
        ):
            state = fsdp.FullyShardedDataParallel.optim_state_dict(wrapped, optimizer)
        assert set(state["state"]) == {"0.weight", "0.bias"}
        assert len(fsdp.FullyShardedDataParallel.fsdp_modules(wrapped)) == 2
        assert fsdp.FullyShardedDataParallel.fsdp_modules(unpatched) == [unpatched]
    assert isinstance(unpatched, fsdp.FullyShardedDataParallel)
    assert not isinstance(wrapped, fsdp.FullyShardedDataParallel)


def _refused_arguments(rank: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("torch_hsdp_ckpt").addHandler(handler)
    with patch():
        net = fsdp.fully_shard(nn.Linear(8, 8), mesh=mesh, reshard_after_forward=2)
        assert isinstance(net, fsdp.FSDPModule) and not isinstance(net, ours.FSDPModule)
        assert len(lines) == 1 and "torch's own fully_shard is used here" in lines[0]
        net(torch.ones(2, 8)).sum().backward()
        with (
            patch(strict=True),
            pytest.raises(ValueError, match="to fewer ranks, is not supported"),
        ):
            fsdp.fully_shard(nn.Linear(8, 8), mesh=mesh, reshard_after_forward=2)
    with patch(), pytest.raises(TypeError):
        fsdp.fully_shard(nn.Linear(8, 8), mesh=mesh, no_such_argument=1)


def _checkpoints(rank: int, path: str) -> None:
    net = nn.Linear(8, 8)
    with patch():
        fsdp.fully_shard(net, mesh=mesh_of((2, 2)))
        state = {"model": net.state_dict()}
        dcp.save(state, checkpoint_id=f"{path}/saved")
        dcp.async_save(state, checkpoint_id=f"{path}/async").result()
        writer = dcp.FileSystemWriter(f"{path}/writer")
        assert isinstance(writer, ours.FileSystemWriter) and isinstance(writer, StockWriter)
        dcp.save(state, storage_writer=writer)
    for name in ("saved", "async", "writer"):
        loaded = {
            "model": {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
        }
        with patch():
            dcp.load(loaded, checkpoint_id=f"{path}/{name}")
        for key, value in net.state_dict().items():
            assert torch.equal(loaded["model"][key].to_local(), value.to_local()), name


def test_wrappers() -> None:
    run_checks(4, _wrappers, _refused_arguments)


def test_checkpoints(tmp_path: Path) -> None:
    run_ranks(_checkpoints, 4, str(tmp_path))
    assert ours.verify(tmp_path / "saved").ok


SCRIPT = """
import sys
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
import torch_hsdp_ckpt
print(__name__, sys.argv[1:], type(FullyShardedDataParallel).__name__)
"""


@pytest.mark.parametrize("wanted", ["1", "0"])
def test_a_script_is_run_in_torchs_place(tmp_path: Path, wanted: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch_hsdp_ckpt.compat", str(script), "--steps", "3"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "TORCH_HSDP_CKPT": wanted, "PYTHONPATH": root}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    made = "StandIn" if wanted == "1" else "type"
    assert run.stdout.split() == ["__main__", "['--steps',", "'3']", made], run.stderr
