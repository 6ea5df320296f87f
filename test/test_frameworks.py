"""Frameworks as they are, with this package in torch's place (examples/frameworks): on four ranks,
the same losses as with stock torch, also when all ranks are killed and others resume."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp
from framework_driver import LOSS, PYTHON, RANKS
from simgpu import simgpu
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import torch_hsdp_ckpt

# Torch says so to whoever loads without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "frameworks"
OURS_FILE = re.compile(r"__\d+_[0-9a-f]{16}_.*_\d+\.distcp")
STOCK_FILE = re.compile(r"__\d+_\d+\.distcp")


@dataclass(frozen=True)
class Case:
    """How one of the examples is run, which saves every ``every`` steps. ``imports`` are made once
    for all ranks."""

    script: str
    imports: tuple[str, ...]
    wrapper: str = "FSDPModule"
    extra: tuple[str, ...] = ()
    steps: int = 6
    every: int = 2
    simulated: bool = False
    tolerance: float = 0.0  # relative, of losses; 0: bit for bit
    needs: str = ""  # of torch.distributed.fsdp
    first: int = 0  # how the first step is called
    printing: tuple[int, ...] = tuple(range(RANKS))  # ranks that know the loss

    @property
    def arguments(self) -> list[str]:
        return ["--steps", str(self.steps), "--save-every", str(self.every), *self.extra]

    @property
    def stop_at(self) -> int:
        """The second step behind the first checkpoint, which has no other one before it."""
        return self.first + self.every + 1


HUGGING_FACE = ("accelerate", "transformers.models.llama.modeling_llama", "transformers.trainer")
PEFT = (*HUGGING_FACE, "peft")
TITAN = (  # what its trainer imports: the trainer itself asks for the device
    "datasets",
    "torch._inductor.compile_fx",
    "torch.distributed.pipelining",
    "torch.utils.tensorboard",
    "torchtitan.components.dataloader",
    "tyro",
)
CASES = {
    "accelerate_fsdp1": Case(
        "accelerate_fsdp.py",
        HUGGING_FACE,
        wrapper="FullyShardedDataParallel",
        extra=("--version", "1"),
        simulated=True,
        tolerance=1e-6,
    ),
    "accelerate_fsdp2": Case(
        "accelerate_fsdp.py",
        HUGGING_FACE,
        extra=("--version", "2"),
        simulated=True,
    ),
    "hf_trainer": Case("hf_trainer.py", HUGGING_FACE, every=3, simulated=True, first=1),
    "hf_trainer_fsdp1": Case(
        "hf_trainer.py",
        HUGGING_FACE,
        wrapper="FullyShardedDataParallel",
        extra=("--version", "1"),
        every=3,
        simulated=True,
        tolerance=1e-6,
        first=1,
    ),
    "peft_lora": Case("peft_lora.py", PEFT, every=3, simulated=True, first=1),
    "pipelining_1f1b": Case("pipelining.py", ("torch.distributed.pipelining",), printing=(2, 3)),
    "pipelining_interleaved": Case(
        "pipelining.py",
        ("torch.distributed.pipelining",),
        extra=("--schedule", "Interleaved1F1B"),
        printing=(2, 3),
    ),
    "elastic": Case("elastic.py", ()),
    "fabric": Case("fabric.py", ("lightning",), tolerance=1e-6),
    "lightning_fsdp1": Case(
        "lightning_fsdp1.py",
        ("lightning", "lightning.pytorch.strategies"),
        wrapper="FullyShardedDataParallel",
        every=3,
        simulated=True,
    ),
    "lightning_fsdp2": Case(
        "lightning_fsdp2.py", ("lightning", "lightning.pytorch.strategies"), every=3
    ),
    "torchtitan": Case("titan.py", TITAN, simulated=True, first=1, needs="DataParallelMeshDims"),
    "torchtitan_dtensors": Case(
        "titan.py",
        TITAN,
        extra=("--spmd-backend", "full_dtensor"),
        simulated=True,
        first=1,
        needs="DataParallelMeshDims",
    ),
    "torchtitan_async": Case(
        "titan.py",
        TITAN,
        extra=("--async-mode", "async"),
        simulated=True,
        first=1,
        needs="DataParallelMeshDims",
    ),
}


# ---- launches ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """What one launch of a script has left: what its ranks printed, and how they ended."""

    logs: Path
    directory: Path

    @property
    def statuses(self) -> list[int]:
        ended = json.loads((self.logs / "ended.json").read_text())
        return list(ended["statuses"])

    def losses(self) -> list[dict[int, str]]:
        """Of each rank, by the step, in all digits."""
        return [_losses((self.logs / f"{rank}.out").read_text()) for rank in range(RANKS)]

    def wrappers(self) -> list[set[str]]:
        """Of each rank that has printed a loss."""
        return [set(path.read_text().split()) for path in self.logs.glob("*.wrappers")]

    def errors(self) -> str:
        return "\n".join(
            f"--- {path.name} of {self.logs.name}\n{path.read_text()[-4000:]}"
            for path in sorted(self.logs.glob("*.err"))
        )


def _losses(output: str) -> dict[int, str]:
    return {
        int(step): loss for step, loss in re.findall(LOSS.pattern + r"(\S+)$", output, re.MULTILINE)
    }


@contextmanager
def _environment(simulated: bool) -> Iterator[dict[str, str]]:
    """Of the processes that launch, with the directories where their ranks' simulated GPUs meet."""
    with simgpu.job() if simulated else _plain() as environment:
        paths = [str(ROOT), str(ROOT / "test"), environment.get("PYTHONPATH", "")]
        offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "0"}
        yield {
            **environment,
            **offline,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }


@contextmanager
def _plain() -> Iterator[dict[str, str]]:
    yield dict(os.environ)


def _launch(run: Run, script: Path, case: Case, meet: str, **other: Any) -> dict[str, Any]:
    run.logs.mkdir()
    run.directory.mkdir(exist_ok=True)
    settings = {"SIMGPU_DIR": os.path.join(meet, run.logs.name)} if meet else {}
    if meet and run.logs.name == "stock":  # torch's own wrappers don't pass this check
        settings["SIMGPU_POISON_FREES"] = "0"
    return {
        "logs": str(run.logs),
        "arguments": [str(script), str(run.directory), *case.arguments],
        "settings": settings,
        "seconds": 240,
        "stop_at": None,
        "printing": len(case.printing),
        **other,
    }


def run_all(case: Case, directory: Path) -> dict[str, Run]:
    """The script on stock torch, with ours until it is killed, and with ours from there on."""
    with _environment(case.simulated) as environment:
        meet = environment["SIMGPU_DIR"] if case.simulated else ""
        stock = Run(directory / "stock", directory / "by_stock")
        killed = Run(directory / "killed", directory / "by_ours")
        resumed = Run(directory / "resumed", directory / "by_ours")
        script = EXAMPLES / case.script
        stop = {"stop_at": case.stop_at, "complete": "**/.metadata"}
        sides = {
            "torch": [_launch(stock, script, case, meet)],
            "ours": [
                _launch(killed, script, case, meet, **stop),
                _launch(resumed, script, case, meet),
            ],
        }
        if meet:
            for name in ("stock", "killed", "resumed"):
                os.mkdir(os.path.join(meet, name))
        drivers = [
            _start(side, launches, case, directory, environment) for side, launches in sides.items()
        ]
        try:
            for side, driver in zip(sides, drivers, strict=True):
                assert driver.wait(timeout=600) == 0, (directory / f"{side}.log").read_text()
        finally:
            for driver in drivers:
                driver.kill()
    return {"stock": stock, "killed": killed, "resumed": resumed}


def _start(
    side: str, launches: list[Any], case: Case, directory: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    spec = {
        "ours": side == "ours",
        "imports": ["torch.distributed.fsdp", "torch._dynamo", *case.imports],
        "launches": launches,
        "lock": str(directory / "lock"),
    }
    (directory / f"{side}.json").write_text(json.dumps(spec))
    command = [str(PYTHON), str(ROOT / "test" / "framework_driver.py"), f"{side}.json"]
    with (directory / f"{side}.log").open("w") as log:
        return subprocess.Popen(command, cwd=directory, env=environment, stdout=log, stderr=log)


# ---- what is asked of each -----------------------------------------------------------------------
def assert_losses(case: Case, runs: dict[str, Run]) -> None:
    """Ours go on where stock's are, up to the kill and from the checkpoint before it."""
    stock, killed, resumed = (runs[name].losses() for name in ("stock", "killed", "resumed"))
    steps = range(case.first, case.first + case.steps)
    for rank in case.printing:
        assert list(stock[rank]) == list(steps), runs["stock"].errors()
        assert list(killed[rank]) == list(steps[: case.every + 2]), runs["killed"].errors()
        assert list(resumed[rank]) == list(steps[case.every :]), runs["resumed"].errors()
        for ours in (killed[rank], resumed[rank]):
            for step, loss in ours.items():
                if case.tolerance == 0.0:
                    assert loss == stock[rank][step], (rank, step, ours, stock[rank])
                else:
                    expected = pytest.approx(float(stock[rank][step]), rel=case.tolerance)
                    assert float(loss) == expected, (rank, step)
        assert len(set(stock[rank].values())) > 1, "a model that does not train"


def assert_ours_was_used(case: Case, runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        assert len(run.wrappers()) == len(case.printing)
        for found in run.wrappers():
            ours = {wrapper for wrapper in found if wrapper.startswith("torch_hsdp_ckpt.")}
            assert any(wrapper.endswith(f".{case.wrapper}") for wrapper in found), (name, found)
            assert bool(ours) == (name != "stock"), (name, found)
            assert not ours or any(wrapper.endswith(f".{case.wrapper}") for wrapper in ours), ours


def checkpoints(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.rglob(".metadata"))


def assert_files(runs: dict[str, Run]) -> None:
    for run, pattern in ((runs["stock"], STOCK_FILE), (runs["resumed"], OURS_FILE)):
        found = checkpoints(run.directory)
        assert found
        for path in found:
            names = [file.name for file in path.glob("*.distcp")]
            assert names and all(map(pattern.fullmatch, names)), names
    for path in checkpoints(runs["resumed"].directory):
        assert torch_hsdp_ckpt.verify(path).ok, path


def read_by_stock_torch(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of ours, without a process group."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(record.size, dtype=record.properties.dtype)
        for key, record in metadata.items()
        if isinstance(record, TensorStorageMetadata)
    }
    for value in tensors.values():
        value.fill_(torch.nan if value.is_floating_point() else 0)
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def assert_stock_torch_reads(case: Case, runs: dict[str, Run]) -> None:
    """Of each checkpoint what stock's run has in its own of the same name."""
    stock, ours = runs["stock"].directory, runs["resumed"].directory
    names = [path.relative_to(stock) for path in checkpoints(stock)]
    assert names and {path.relative_to(ours) for path in checkpoints(ours)} >= set(names)
    for name in names:
        found = read_by_stock_torch(ours / name)
        expected = read_by_stock_torch(stock / name)
        assert found and found.keys() == expected.keys(), name
        for key, value in found.items():
            given = {"rtol": 10 * case.tolerance, "atol": 10 * case.tolerance}
            torch.testing.assert_close(value, expected[key], **given, msg=f"{name}: {key}")


def missing(case: Case) -> str:
    """Why a case can't run here; "" if it can."""
    if not PYTHON.exists():
        assert os.environ.get("HSDP_CKPT_REQUIRE_FRAMEWORKS") != "1", f"{PYTHON} is not there"
        return f"the frameworks are not installed in {PYTHON}: `make frameworks` installs them"
    if case.simulated and not (simgpu.LIBRARIES / "libsimgpu_cuda.so").exists():
        return "the simulated GPU is not built: it needs torch's CUDA build and a CUDA toolkit"
    if case.script == "titan.py" and sys.version_info < (3, 11):
        return "torchtitan needs Python 3.11"
    if case.needs and not hasattr(torch.distributed.fsdp, case.needs):
        return f"this release of the framework imports {case.needs} from torch.distributed.fsdp"
    return ""


@pytest.mark.parametrize("name", CASES)
def test_a_framework_trains_is_killed_and_resumes_as_with_stock_torch(
    tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    reason = missing(case)
    if reason:
        pytest.skip(reason)
    runs = run_all(case, tmp_path)
    assert runs["stock"].statuses == [0] * RANKS, runs["stock"].errors()
    assert runs["killed"].statuses == [-9] * RANKS, runs["killed"].errors()
    assert runs["resumed"].statuses == [0] * RANKS, runs["resumed"].errors()
    assert_losses(case, runs)
    assert_ours_was_used(case, runs)
    assert_files(runs)
    assert_stock_torch_reads(case, runs)


def test_torchrun_restarts_the_ranks(tmp_path: Path) -> None:
    """A rank dies, torchrun starts all four again, and they go on from the last checkpoint; stock
    torch makes one file of what they have saved."""
    case = CASES["elastic"]
    reason = missing(case)
    if reason:
        pytest.skip(reason)
    script, directory = EXAMPLES / case.script, tmp_path / "by_ours"
    directory.mkdir()
    stock = Run(tmp_path / "stock", tmp_path / "by_stock")
    torchrun = ["--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "1"]
    torchrun += ["--redirects", "3", "--log-dir", str(tmp_path / "logs")]
    program = ["-m", "torch_hsdp_ckpt.compat", str(script), str(directory), *case.arguments]
    with _environment(simulated=False) as environment:
        driver = _start("torch", [_launch(stock, script, case, "")], case, tmp_path, environment)
        command = [PYTHON, "-m", "torch.distributed.run", *torchrun, *program, "--die-at", "3"]
        # In the store that torchrun shares with its ranks Gloo finds those that are dead.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert driver.wait(timeout=120) == 0 and ended.returncode == 0, ended.stderr
    for rank, expected in enumerate(stock.losses()):
        before, after = (
            _losses(next((tmp_path / "logs").glob(f"*/attempt_{n}/{rank}/stdout.log")).read_text())
            for n in range(2)
        )
        assert before == {step: expected[step] for step in range(4)}
        assert after == {step: expected[step] for step in range(2, 6)}
    dcp_to_torch_save(directory / "step-6", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt")["app"]["model"]
    tensors = read_by_stock_torch(directory / "step-6")
    assert whole
    for name, value in whole.items():
        assert torch.equal(value, tensors[f"app.model.{name}"]), name
