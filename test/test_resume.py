"""All of a training run in one checkpoint: model, optimizer, LR scheduler, GradScaler, data loader
and every rank's RNG.

Saved and loaded by ours and by stock torch, each by the other too; the run that is resumed is the
one that never stopped, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE
from models import Block
from ranks import run_ranks
from states import assert_same, bits, mesh_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import torch_hsdp_ckpt as hsdp

WAYS = {"ours": (hsdp.save, hsdp.load), "stock": (dcp.save, dcp.load)}


class _Loader:
    """Shuffles with a generator of its own; each rank's stands in another place, in the middle of
    an epoch."""

    def __init__(self, rank: int) -> None:
        self.rank, self.order, self.at = rank, list[int](), 0
        self.generator = torch.Generator().manual_seed(rank)

    def next(self) -> torch.Tensor:
        if self.at == len(self.order):
            self.order = torch.randperm(3 + self.rank, generator=self.generator).tolist()
            self.at = 0
        self.at += 1
        return torch.full((4, 8), float(self.order[self.at - 1])) + torch.randn(
            4, 8, generator=self.generator
        )

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "at": self.at, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.at = state["order"], state["at"]
        self.generator.set_state(state["generator"])


class _Rng:
    """What dropout draws from."""

    def __init__(self, device: str) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        return {"cpu": torch.get_rng_state()} | (
            {"cuda": torch.cuda.get_rng_state()} if self.device == "cuda" else {}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device == "cuda":
            torch.cuda.set_rng_state(state["cuda"])


class _Trained:
    """Model and optimizer by torch's own names."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return dict(
            zip(("model", "optim"), get_state_dict(self.model, self.optimizer), strict=True)
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


class _Run:
    def __init__(self, rank: int, device: str, seed: int) -> None:
        self.device = device
        torch.manual_seed(seed)
        net = nn.Sequential(
            Block(8, 16), nn.Dropout(0.3), Block(8, 16), nn.Dropout(0.3), nn.Linear(8, 5)
        ).to(device)
        mesh = mesh_of(2, 2, device=device)
        self.model = hsdp.FullyShardedDataParallel(
            net, device_mesh=mesh, auto_wrap_policy=ModuleWrapPolicy({Block})
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=0.05, total_steps=20
        )
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**7, growth_interval=2)
        self.loader = _Loader(rank)
        self.own = {f"loader.rank{rank}": self.loader, f"rng.rank{rank}": _Rng(device)}
        torch.manual_seed(1000 * seed + rank)

    def state(self) -> dict[str, Any]:
        """What goes into the checkpoint: things that have state_dict and load_state_dict."""
        trained = _Trained(self.model, self.optimizer)
        return {"trained": trained, "scheduler": self.scheduler, "scaler": self.scaler, **self.own}

    def steps(self, count: int) -> list[Any]:
        """Loss, learning rate and scale of each."""
        seen = []
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = self.model(self.loader.next().to(self.device)).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            seen.append((loss.item(), self.scheduler.get_last_lr(), self.scaler.get_scale()))
        return seen

    def end(self) -> list[Any]:
        return bits([part.state_dict() for part in self.state().values()])


def _resumes(rank: int, root: str, device: str) -> None:
    run = _Run(rank, device, seed=1)
    run.steps(3)
    for way, (save, _) in WAYS.items():
        save(run.state(), checkpoint_id=f"{root}/{way}")
    went_on, end = run.steps(4), run.end()
    assert len({scale for _, _, scale in went_on}) > 1  # the scaler does something
    drawn: list[Any] = [None] * 4
    dist.all_gather_object(drawn, (run.loader.order, torch.rand(1).item()))
    assert len({str(item) for item in drawn}) == 4  # and every rank is in a state of its own
    for saver in WAYS:
        for way, (_, load) in WAYS.items():
            other = _Run(rank, device, seed=2)
            other.steps(1)
            load(other.state(), checkpoint_id=f"{root}/{saver}")
            assert other.steps(4) == went_on, (saver, way)
            assert_same(other.end(), end, f"{saver} -> {way}")


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    run_ranks(_resumes, 4, str(tmp_path), DEVICE)


@pytest.mark.gpu
def test_a_run_goes_on_as_if_it_had_not_stopped_on_cuda(tmp_path: Path) -> None:
    run_ranks(_resumes, 4, str(tmp_path), "cuda", backend="cpu:gloo,cuda:gloo")
