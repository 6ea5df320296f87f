"""What saving in the background costs a training loop: a wrapped model with Adam, a save every few
steps, 4 Gloo ranks.

The state that is loaded at the end, by stock torch, has to be the one at the last call.
"""

import itertools
import shutil
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_models import (
    Experts,
    Language,
    mesh_of,
    shard_all,
    spread_experts,
    tensor_parallel,
)
from ranks import run_ranks
from report import milliseconds, table
from systems import Net, wrap
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh

import torch_hsdp_ckpt

SYSTEMS = ("dcp", "dcp, cached stager", "ours")


def _slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


class _Saver:
    def __init__(self, system: str, group: dist.ProcessGroup) -> None:
        self.system, self.group = system, group
        # DCP's best: torch 2.15's stager, which copies on a thread into memory that it keeps.
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        self.stager = {"async_stager": DefaultStager(options)} if "stager" in system else {}

    def __call__(self, state: dict[str, Any], path: str) -> Any:
        if self.system == "ours":
            return torch_hsdp_ckpt.async_save(state, checkpoint_id=path)
        writer = dcp.FileSystemWriter(path)
        return dcp.async_save(state, storage_writer=writer, process_group=self.group, **self.stager)

    def before_step(self, response: Any) -> None:
        """With DCP's asynchronous stager it is the caller who has to wait before the weights
        change."""
        if self.stager:
            response.staging_completion.result()


def _upload(response: Any) -> Any:
    return getattr(response, "upload_completion", response)


def _loop(
    rank: int,
    system: str,
    width: int,
    layers: int,
    steps: int,
    every: int,
    pairs: int,
    scratch: str,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Loops without and with saves, in turn, since the machine's speed moves."""
    warnings.simplefilter("ignore", UserWarning)  # torch's, on saving over a checkpoint
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = wrap("ours" if system == "ours" else "fsdp2", Net(width, layers), mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    save = _Saver(system, dist.new_group(backend="gloo"))
    out: dict[str, list[float]] = {
        "call": [],
        "step": [],
        "step, saving": [],
        "durable": [],
        "without": [],
        "with": [],
    }

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optim": moments}

    def train(response: Any = None) -> float:
        model(torch.randn(1, 64, width)).square().mean().backward()
        begin = time.perf_counter()
        if response is not None:
            save.before_step(response)
        optimizer.step()
        seconds = time.perf_counter() - begin
        optimizer.zero_grad()
        return seconds

    def loop(saving: bool, record: bool = True) -> None:
        nonlocal expected, path
        if saving and rank == 0:
            for each in Path(scratch).iterdir():
                shutil.rmtree(each)
        dist.barrier()
        begin, response = time.perf_counter(), None
        for i in range(steps):
            new = None
            if saving and i % every == 0:
                if response is not None:
                    _upload(response).result()
                path = f"{scratch}/{system.replace(', ', '-').replace(' ', '-')}-{i}"
                if rank == 0:
                    Path(path).mkdir(parents=True, exist_ok=True)
                given = state()
                if not record and i + every >= steps:
                    expected = {
                        name: value.to_local().clone() for name, value in given["model"].items()
                    }
                dist.barrier()
                at = time.perf_counter()
                response = new = save(given, path)
                call = _slowest(time.perf_counter() - at)
                if record:
                    out["call"].append(call)
                    _upload(new).add_done_callback(
                        lambda _, at=at: out["durable"].append(time.perf_counter() - at)
                    )
            seconds = _slowest(train(new))
            if record:
                out["step, saving" if new is not None else "step"].append(seconds)
        dist.barrier()
        if record:
            out["with" if saving else "without"].append(time.perf_counter() - begin)
        if response is not None:
            _upload(response).result()
        dist.barrier()

    expected: dict[str, torch.Tensor] = {}
    path = ""
    loop(saving=True, record=False)  # plans, threads and memory that are kept
    for pair in range(pairs):
        for saving in (False, True) if pair % 2 == 0 else (True, False):
            loop(saving)
    loop(saving=True, record=False)
    target = {"model": {name: torch.zeros_like(value) for name, value in state()["model"].items()}}
    dcp.load(target, storage_reader=dcp.FileSystemReader(path))
    wrong = [
        name
        for name, value in target["model"].items()
        if not torch.equal(value.to_local(), expected[name])
    ]
    bytes_ = sum(p.numel() for p in Net(width, layers).parameters()) * 12
    return {"wrong": wrong, "bytes": bytes_}, out


class _Many(nn.Module):
    """Many parameters of a size that makes them and Adam's moments ``total`` bytes."""

    def __init__(self, tensors: int, total: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(torch.zeros(4, total // (48 * tensors))) for _ in range(tensors)
        )

    def forward(self) -> torch.Tensor:
        return sum(p.sum() for p in self.parts)  # type: ignore[return-value]


def _calls(
    rank: int, tensors: int, total: int, rounds: int, scratch: str
) -> tuple[list[float], list[float], list[float], int]:
    """Our call alone, and how long an idle job's save takes beside the synchronous one; each the
    slowest rank's."""
    ours = torch_hsdp_ckpt
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = ours.FullyShardedDataParallel(
        _Many(tensors, total),
        device_mesh=mesh,
        sharding_strategy=ours.ShardingStrategy.HYBRID_SHARD,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model().backward()
    optimizer.step()
    optimizer.zero_grad()
    calls, durable, plain = [], [], []
    for i in range(rounds + 1):
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optim": moments}
        dist.barrier()
        begin = time.perf_counter()
        future = ours.async_save(state, checkpoint_id=f"{scratch}/{tensors}-{i}")
        call = _slowest(time.perf_counter() - begin)
        future.result()
        whole = _slowest(time.perf_counter() - begin)
        dist.barrier()
        begin = time.perf_counter()
        ours.save(state, checkpoint_id=f"{scratch}/{tensors}-{i}-plain")
        synchronous = _slowest(time.perf_counter() - begin)
        if i > 0:  # the first one plans
            calls.append(call)
            durable.append(whole)
            plain.append(synchronous)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(f"{scratch}/{tensors}-{i}")
            shutil.rmtree(f"{scratch}/{tensors}-{i}-plain")
        dist.barrier()
    return calls, durable, plain, future.staged_bytes


MESHES = ("plain", "beside TP", "experts on another mesh", "pipeline stages")


def _model_on(kind: str, blocks: int) -> nn.Module:
    """A model on 8 ranks; a stage has as many blocks."""
    torch.manual_seed(0)
    face: Any = torch_hsdp_ckpt.fully_shard
    model = Language(blocks)
    if kind == "plain":
        return shard_all(face, model, mesh=mesh_of(replicate=2, shard=4))
    if kind == "beside TP":
        mesh = mesh_of(replicate=2, shard=2, tp=2)
        tensor_parallel(model, mesh["tp"])
    elif kind == "pipeline stages":
        mesh = mesh_of(pp=2, replicate=2, shard=2)
        model = nn.ModuleDict({f"stage{mesh['pp'].get_local_rank()}": model})
        shard_all(face, next(iter(model.values())), mesh=mesh["replicate", "shard"])
        return model
    else:
        mesh = mesh_of(replicate=2, shard=2, ep=2)
        for block in model.blocks:
            block.experts = Experts()
            spread_experts(block.experts, mesh["ep"])
            face(block.experts, mesh=mesh["replicate", "shard"])
        return shard_all(face, model, mesh=mesh["replicate", "shard", "ep"]._flatten("all"))
    return shard_all(face, model, mesh=mesh["replicate", "shard"])


def _calls_on_meshes(
    rank: int, kind: str, blocks: int, rounds: int, scratch: str
) -> dict[str, list[float]]:
    """Calls of both ways on one mesh: seconds that this rank's thread computes, which
    eight ranks on fewer cores do not lengthen."""
    warnings.simplefilter("ignore", UserWarning)
    model = _model_on(kind, blocks)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    group = dist.new_group(backend="gloo")
    out: dict[str, list[float]] = {"dcp": [], "ours": [], "tensors": []}

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.sin(parameter.detach())
        optimizer.step()

    # Not in turn: after DCP's copies our call takes three times as long.
    for system, i in itertools.product(("ours", "dcp"), range(rounds + 2)):
        step()
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optim": moments}
        out["tensors"] = [4.0 * len(weights)]
        dist.barrier()
        begin = time.thread_time()
        path = f"{scratch}/{kind}-{system}-{i}"
        if system == "ours":
            response = torch_hsdp_ckpt.async_save(state, checkpoint_id=path)
        else:
            response = dcp.async_save(state, checkpoint_id=path, process_group=group)
        seconds = time.thread_time() - begin
        _upload(response).result()
        if i > 1:  # a first one plans, a second one knows what others hold
            out[system].append(_slowest(seconds))
    return out


def _meshes(scratch: str, quick: bool) -> str:
    rows = []
    for kind in MESHES:
        blocks, rounds = (4, 2) if quick else (60, 7)
        found = run_ranks(_calls_on_meshes, 8, kind, blocks, rounds, scratch, timeout=900)[0]
        tensors = f"{found['tensors'][0]:.0f}"
        rows.append([kind, tensors, milliseconds(found["dcp"]), milliseconds(found["ours"])])
    header = ["mesh", "tensors", "DCP's call, ms of CPU", "our call, ms of CPU"]
    return f"\n## Calls on larger meshes, 8 ranks: the slowest rank's\n{table(header, rows)}\n"


def measure(scratch: str, systems: tuple[str, ...], quick: bool) -> str:
    width, layers, steps, every, pairs = (128, 2, 6, 3, 2) if quick else (768, 6, 6, 3, 4)
    rows = []
    gib = 0.0
    for system in systems:
        outcomes = run_ranks(
            _loop, 4, system, width, layers, steps, every, pairs, scratch, timeout=600.0
        )
        facts, readings = outcomes[0]
        if any(outcome[0]["wrong"] for outcome in outcomes):
            raise SystemExit(
                f"{system}: the checkpoint is not the state at the call: {facts['wrong'][:3]}"
            )
        gib = facts["bytes"] / 2**30
        call = statistics.median(readings["call"])
        wait = max(
            0.0, statistics.median(readings["step, saving"]) - statistics.median(readings["step"])
        )
        added = [
            with_ - without
            for with_, without in zip(readings["with"], readings["without"], strict=True)
        ]
        durable = [d for outcome in outcomes for d in outcome[1]["durable"]]
        rows.append(
            [
                system,
                milliseconds(readings["call"]),
                f"{1e3 * wait:.1f}",
                f"{1e3 * (call + wait):.1f}",
                milliseconds(readings["without"]),
                milliseconds(added),
                milliseconds(durable),
            ]
        )
    header = [
        "system",
        "call, ms",
        "longer step, ms",
        "both, ms",
        "loop without saves, ms",
        "saves add, ms",
        "durable after, ms",
    ]
    title = (
        f"## {gib:.2f} GiB of state, 4 Gloo ranks, 2 replicas x 2 shards, Adam; "
        f"{pairs} pairs of loops, {steps} steps each, without saves and with one every {every}"
    )
    text = f"{title}\n{table(header, rows)}\n"
    if "ours" in systems:
        rows = []
        for tensors, total in (
            ((100, 1 << 24), (400, 1 << 24)) if quick else ((400, 2 << 30), (1000, 1 << 28))
        ):
            outcomes = run_ranks(
                _calls, 4, tensors, total, 2 if quick else 5, scratch, timeout=600.0
            )
            calls, durable, plain, _ = outcomes[0]
            share = f"{max(o[3] for o in outcomes) / 2**20:.1f}"
            rows.append(
                [
                    f"{4 * tensors}",
                    f"{total / 2**20:.0f}",
                    milliseconds(calls),
                    share,
                    milliseconds(durable),
                    milliseconds(plain),
                ]
            )
        header = [
            "tensors",
            "MiB of state",
            "call, ms",
            "MiB staged, most of 4 ranks",
            "durable, idle job, ms",
            "`save`, ms",
        ]
        text += f"\n## Our call alone: Adam's state and parameters\n{table(header, rows)}\n"
    return text + _meshes(scratch, quick)
