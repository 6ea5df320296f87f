"""``compat.patch()``: this package in torch's place, by name."""

import abc
import importlib.metadata
import inspect
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
import torch.distributed._composable.fsdp
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp as fsdp
from ranks import Messages, run_checks, run_ranks
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter as StockWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import mesh_of

import torch_hsdp_ckpt as ours
from torch_hsdp_ckpt.compat import Replaced, patch, unpatch
from torch_hsdp_ckpt.compat.__main__ import main

NAMES = {
    fsdp: ("FullyShardedDataParallel", "fully_shard"),
    dcp: ("save", "load", "async_save", "FileSystemWriter", "FileSystemReader"),
}


class Stock(NamedTuple):
    """Where patch() does not look."""

    FSDP: type = fsdp.FullyShardedDataParallel
    fully_shard: Callable[..., Any] = fsdp.fully_shard


STOCK = Stock()


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
        with patch() as again:
            assert again.report() == report, "a second time changes nothing"
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
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)

        assert issubclass(Later, fsdp.FullyShardedDataParallel) and issubclass(Later, nn.Module)
        assert not isinstance(wrapped, Later) and not issubclass(_Derived, Later)
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


def _subclasses_of_torchs(rank: int) -> None:
    """They are torch's, with what they wrap inside, in forward and backward."""
    with patch():

        class Later(fsdp.FullyShardedDataParallel):
            pass

        for each in (_Derived, Later):
            model = each(
                nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
                auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
                device_id=torch.device("cpu"),
            )
            inside = [m for m in model.modules() if isinstance(m, STOCK.FSDP)]
            assert len(inside) == 3 and isinstance(model, each)
            assert not any(isinstance(m, ours.FullyShardedDataParallel) for m in model.modules())
            model(torch.ones(2, 4)).sum().backward()
        # Around one of them torch's own is used, also around parts of it.
        plain = fsdp.FullyShardedDataParallel(
            nn.Sequential(Later(nn.Linear(4, 4), device_id="cpu"), nn.Linear(4, 4)), device_id="cpu"
        )
        assert type(plain) is STOCK.FSDP
        plain(torch.ones(2, 4)).sum().backward()
        part = fsdp.FullyShardedDataParallel(nn.Sequential(model.module[0]), device_id="cpu")
        assert type(part) is STOCK.FSDP
    assert issubclass(Later, STOCK.FSDP) and isinstance(model, STOCK.FSDP)


# What torch's own takes.
REFUSED = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.complex64)


def _said(rank: int) -> Messages:
    handler = Messages()
    logging.getLogger("torch_hsdp_ckpt").addHandler(handler)
    return handler


def _refused_arguments(rank: int) -> None:
    mesh = init_device_mesh("cpu", (4,))
    said = _said(rank)
    with patch():
        net = fsdp.fully_shard(nn.Linear(8, 8), mesh=mesh, mp_policy=REFUSED)
        assert isinstance(net, fsdp.FSDPModule) and not isinstance(net, ours.FSDPModule)
        assert len(said.texts) == 1 and "torch's own fully_shard is used here" in said.texts[0]
        net(torch.ones(2, 8)).sum().backward()
        with (
            patch(strict=True),
            pytest.raises(ValueError, match=r"precision in torch\.complex64 is not supp"),
        ):
            fsdp.fully_shard(nn.Linear(8, 8), mesh=mesh, mp_policy=REFUSED)
        with pytest.raises(TypeError):
            fsdp.fully_shard(nn.Linear(8, 8), mesh=mesh, no_such_argument=1)


def _refused_inside(rank: int) -> None:
    """A whole model becomes torch's with its first part, or none of it."""
    mesh = init_device_mesh("cpu", (4,))
    said = _said(rank)
    with patch():
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        for layer in net[:2]:
            fsdp.fully_shard(layer, mesh=mesh, mp_policy=REFUSED)
        fsdp.fully_shard([net, net[2]], mesh=mesh)
        assert not any(isinstance(m, ours.FSDPModule) for m in net.modules())
        assert [text.rpartition(": ")[2] for text in said.texts[2:]] == ["it was for 0 inside"]
        net(torch.ones(2, 8)).sum().backward()
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        fsdp.fully_shard(net[0], mesh=mesh)
        for given in (net, [net, net[1]]):
            with pytest.raises(ValueError, match=r"precision in torch\.complex64 is not supp"):
                fsdp.fully_shard(given, mesh=mesh, mp_policy=REFUSED)
        fsdp.fully_shard(net[1], mesh=mesh, mp_policy=REFUSED)
        with pytest.raises(ValueError, match="was used for 1, and this package's for others insi"):
            fsdp.fully_shard(net, mesh=mesh)
    net = nn.Sequential(nn.Linear(8, 8))
    fsdp.fully_shard(net[0], mesh=mesh)
    with patch(), pytest.raises(ValueError, match=r"has been applied to 0 before patch\(\): call"):
        fsdp.fully_shard(net, mesh=mesh)


def _functions_on_modules(rank: int) -> None:
    """They go to the side that has wrapped the module."""

    class Generator(nn.Linear):
        def generate(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight) + self.bias

    stock = fsdp.fully_shard(Generator(8, 8), mesh=mesh_of((2, 2)))
    with patch():
        net = fsdp.fully_shard(Generator(8, 8), mesh=mesh_of((2, 2)))
        for each in (net, stock):
            fsdp.register_fsdp_forward_method(each, "generate")
            assert each.generate(torch.ones(2, 8)).shape == (2, 8)
    other = ours.fully_shard(Generator(8, 8), mesh=mesh_of((2, 2)))
    fsdp.register_fsdp_forward_method(other, "generate")
    with pytest.raises(
        NotImplementedError, match=r"use torch_hsdp_ckpt\.register_fsdp_forward_met"
    ):
        other.generate(torch.ones(2, 8))


class _Planner(DefaultSavePlanner):
    """One of a user's own, which DCP has to plan with."""


def _saves_that_dcp_plans(rank: int, path: str) -> None:
    net = ours.fully_shard(nn.Linear(8, 8), mesh=mesh_of((2, 2)))
    state = {"model": net.state_dict()}
    with patch():
        dcp.save(state, checkpoint_id=f"{path}/planner", planner=_Planner())
        dcp.async_save(state, checkpoint_id=f"{path}/async", planner=_Planner()).result()
        loaded = {"model": {name: torch.zeros_like(t) for name, t in net.state_dict().items()}}
        for name in ("planner", "async"):
            dcp.load(loaded, checkpoint_id=f"{path}/{name}")
            assert torch.equal(loaded["model"]["weight"].to_local(), net.weight.to_local()), name
            loaded["model"]["weight"].zero_()


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
    run_checks(
        4,
        _wrappers,
        _subclasses_of_torchs,
        _refused_arguments,
        _refused_inside,
        _functions_on_modules,
    )


def test_checkpoints(tmp_path: Path) -> None:
    run_ranks(_checkpoints, 4, str(tmp_path))
    for name in ("saved", "async", "writer"):
        assert ours.verify(tmp_path / name).ok, name


def test_saves_that_dcp_plans(tmp_path: Path) -> None:
    run_ranks(_saves_that_dcp_plans, 4, str(tmp_path))


def test_patches_within_each_other() -> None:
    """The names are torch's again after the last one, strict is the innermost one's."""
    with patch() as outer:
        with patch(strict=True) as inner:
            outer.undo()
            assert fsdp.fully_shard is not STOCK.fully_shard
        assert fsdp.fully_shard is STOCK.fully_shard
        inner.undo()
        with patch():
            outer.undo()
            assert fsdp.fully_shard is not STOCK.fully_shard


def test_names_that_are_held_elsewhere_are_torchs_after_it() -> None:
    with patch():
        held = (fsdp.FullyShardedDataParallel, dcp.FileSystemWriter)
    assert held[0] is not STOCK.FSDP and issubclass(held[0], STOCK.FSDP)
    assert type(held[1]("directory")) is StockWriter


def test_unpatch_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def of_another(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(type(self))

    monkeypatch.setattr(STOCK.FSDP, "__init__", of_another)
    for _ in range(2):
        patch()
    unpatch()
    assert fsdp.fully_shard is STOCK.fully_shard
    assert STOCK.FSDP.__init__ is of_another, "as it was before"
    unpatch()


class _WithABC(dcp.FileSystemWriter, abc.ABC):
    """What may be derived from torch's class may be while it is patched."""


def test_what_torchs_classes_can_do() -> None:
    with patch():
        for name in ("save", "load", "async_save", "FileSystemWriter", "FileSystemReader"):
            value = getattr(dcp, name)
            assert pickle.loads(pickle.dumps(value)) is value
        assert issubclass(fsdp.FullyShardedDataParallel, nn.Module)
        for mine, its in (
            (fsdp.FullyShardedDataParallel, STOCK.FSDP),
            (dcp.FileSystemWriter, StockWriter),
        ):
            assert inspect.signature(mine) == inspect.signature(its)
        with pytest.raises(TypeError):
            issubclass(3, dcp.FileSystemWriter)
        assert isinstance(Mock(spec=ours.FileSystemWriter), dcp.FileSystemWriter)
        assert issubclass(dcp.FileSystemWriter, dcp.StorageWriter)

        class Later(dcp.FileSystemWriter, dcp.StorageWriter, abc.ABC):
            def __init_subclass__(cls, keyword: int = 0) -> None:
                cls.keyword = keyword

            def __init__(self, path: str, mine: int = 0) -> None:
                super().__init__(path)

        class Latest(Later, keyword=3):
            pass

        assert list(inspect.signature(Latest).parameters) == ["path", "mine"]
        assert Latest.keyword == 3 and type(Latest("directory")) is Latest
        for each in (Latest("directory"), _WithABC("directory")):
            assert isinstance(each, dcp.FileSystemWriter)
        assert not isinstance(3, dcp.FileSystemWriter) and not isinstance(3, dcp.StorageWriter)


def test_a_name_that_somebody_else_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp, "load", len)
    with pytest.raises(ValueError, match=r"^torch.distributed.checkpoint.load is not torch's own"):
        patch()
    assert fsdp.fully_shard is STOCK.fully_shard


def _old_framework(rank: int) -> None:
    sys.modules["accelerate"] = ModuleType("accelerate")
    for version, is_old in (("1.5.2", True), ("1.6.0", False), ("2.0", False)):
        importlib.metadata.version = lambda name, version=version: version
        with patch():
            if not is_old:
                fsdp.fully_shard(nn.Linear(4, 4))
                continue
            with pytest.raises(
                ValueError, match=r"accelerate 1\.5\.2 is too old .*: 1\.6 or newer"
            ):
                fsdp.fully_shard(nn.Linear(4, 4))


def test_an_old_framework() -> None:
    run_ranks(_old_framework, 1)


SCRIPT = """
import sys
import multiprocessing
import subprocess
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
import torch.distributed as dist
from torch import nn

def side(where):
    print(where, __name__, sys.argv[1:], type(FullyShardedDataParallel).__name__, flush=True)

if __name__ == "__main__":
    side("script")
    child = multiprocessing.get_context("spawn").Process(target=side, args=("spawned",))
    child.start()
    child.join()
    # As Lightning's launcher does.
    if "--launched" in sys.argv:
        sys.exit()
    subprocess.run([sys.executable, "-m", __spec__.name, "--launched"], check=True)
    # A part of torch's that is imported late has torch's names, and goes by both classes.
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id="cpu")
    print(sorted(get_model_state_dict(model)))
"""


COMMAND = [sys.executable, "-W", "error::ImportWarning", "-m", "torch_hsdp_ckpt.compat"]


@pytest.mark.parametrize(
    ("wanted", "by"),
    [("1", "path"), ("1", "module"), ("0", "path")],
    ids=["path", "module", "unpatched"],
)
def test_a_script_is_run_in_torchs_place(tmp_path: Path, wanted: str, by: str) -> None:
    package = tmp_path / "package"
    package.mkdir()
    script = package / "train.py"
    (tmp_path / "link.py").symlink_to(script)
    (package / "beside.py").touch()
    first = "from . import name\n" if by == "module" else "import beside\n"
    script.write_text(first + SCRIPT)
    (package / "__init__.py").write_text("name = 1\n")
    names = ["-m", "package.train"] if by == "module" else ["link.py"]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "TORCH_HSDP_CKPT": wanted, "PYTHONPATH": root}
    run = subprocess.run(
        [*COMMAND, *names, "--steps", "3"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=100,
    )
    made = "StandIn" if wanted == "1" else "type"
    assert run.stdout.splitlines() == [
        f"script __main__ ['--steps', '3'] {made}",
        f"spawned __mp_main__ ['--steps', '3'] {made}",
        f"script __main__ ['--launched'] {made}",
        f"spawned __mp_main__ ['--launched'] {made}",
        "['bias', 'weight']",
    ], run.stderr


@pytest.mark.parametrize("arguments", [[], ["-m"]])
def test_no_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compat", *arguments])
    with pytest.raises(SystemExit, match=r"^usage: "):
        main()
