"""An ordinary training script: a byte-level GPT under HSDP with checkpoints. torch's launcher
starts it.

One host:

    torchrun --nproc-per-node 4 -m examples.demo.train --dir run --replicas 2 --resume latest

Many hosts: the same on each, with --nnodes, --rdzv-backend c10d, --rdzv-endpoint and a --dir that
all of them share."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from torch_hsdp_ckpt import (
    CheckpointManager,
    FileSystemReader,
    FullyShardedDataParallel,
    ShardingStrategy,
)

from . import checkpoints, data
from .journal import Journal
from .model import Block, Gpt, GptConfig, sequence_losses


class UsageError(Exception):
    """The script can't run as it was asked to; the message is one line for the user."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="examples.demo.train", description=__doc__.splitlines()[0] if __doc__ else None
    )
    add = parser.add_argument
    add(
        "--dir",
        type=Path,
        required=True,
        help="checkpoints and log.jsonl go here; all hosts must see it",
    )
    add(
        "--data",
        nargs="+",
        metavar="FILE",
        help="text to train on (default: the sources of Python's standard library)",
    )
    add("--steps", type=int, default=200)
    add("--save-every", type=int, default=20, metavar="STEPS")
    add("--keep", type=int, default=2, help="checkpoints to keep")
    add(
        "--resume",
        choices=["latest", "no"],
        default="no",
        help="latest: go on from the newest committed checkpoint, if any",
    )
    add(
        "--replicas",
        type=int,
        default=2,
        help="the mesh is REPLICAS x ranks/REPLICAS; 0: 1-D FSDP over all ranks",
    )
    add("--batch", type=int, default=8, help="sequences a step, over all ranks")
    add("--length", type=int, default=GptConfig.length, help="bytes a sequence")
    add("--width", type=int, default=GptConfig.width)
    add("--layers", type=int, default=GptConfig.layers)
    add("--dropout", type=float, default=GptConfig.dropout)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=1)
    add(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: CUDA if every rank of a host has a GPU of its own",
    )
    add(
        "--export",
        type=Path,
        metavar="FILE",
        help="at the end write the whole state, gathered on rank 0, with torch.save",
    )
    return parser.parse_args(argv)


def pick_device(wanted: str) -> torch.device:
    """Returns this rank's device."""
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if wanted == "auto":
        enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks
        wanted = "cuda" if enough else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # The same step twice gives the same bits on a GPU too, so that a resumed run can be compared
    # with one that never stopped.
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def make_mesh(device: torch.device, replicas: int) -> tuple[DeviceMesh, ShardingStrategy]:
    """Returns the mesh of all ranks, with the strategy that goes with it: ``replicas`` rows, or one
    dimension if that is 0."""
    world = dist.get_world_size()
    if replicas == 0:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        return mesh, ShardingStrategy.FULL_SHARD
    shape = (replicas, world // replicas)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return mesh, ShardingStrategy.HYBRID_SHARD


def build_model(args: argparse.Namespace, device: torch.device) -> Gpt:
    """Returns the same model on every rank, whatever the mesh."""
    torch.manual_seed(args.seed)
    heads = max(1, args.width // 64)
    config = GptConfig(args.width, args.layers, heads, args.length, args.dropout)
    return Gpt(config).to(device)


class Trainer:
    """The model, its optimizer and the number of steps done: all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, device: torch.device, text: bytes) -> None:
        self.args, self.device = args, device
        self.step = 0
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.text_digest = data.fingerprint(text)
        model = build_model(args, device)
        self.elements = sum(p.numel() for p in model.parameters())
        # From here on each rank has random numbers of its own.
        torch.manual_seed(args.seed + 1 + dist.get_rank())
        mesh, strategy = make_mesh(device, args.replicas)
        self.model = FullyShardedDataParallel(
            model,
            device_mesh=mesh,
            sharding_strategy=strategy,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr)

    def train_step(self) -> float:
        """Takes one step and returns the loss of its global batch before the step, in nats per
        byte, on every rank."""
        args, rank, ranks = self.args, dist.get_rank(), dist.get_world_size()
        mine = data.share(rank, ranks, args.batch)
        tokens, targets = data.sample(self.text, self.step, mine, args.length, args.seed)
        losses = sequence_losses(self.model(tokens.to(self.device)), targets.to(self.device))
        torch.autograd.backward(losses.mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # An exact sum over the sequences: no mesh adds them in another order.
        gathered = [torch.empty_like(losses) for _ in range(ranks)]
        dist.all_gather(gathered, losses.detach())
        return math.fsum(torch.cat(gathered).tolist()) / int(args.batch)

    def state(self) -> dict[str, Any]:
        """Returns one dict with everything that a resumed job needs. Tensors are shards, not
        copies."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        # Random numbers differ by rank, so each rank has a key of its own.
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": model,
            "optimizer": optimizer,
            "progress": {"step": self.step, "seed": self.args.seed, "text": self.text_digest},
            "rng": {f"rank{dist.get_rank()}": rng},
        }

    def load(self, path: Path) -> None:
        """Takes over the checkpoint at ``path``, saved on any mesh. Raises UsageError if it belongs
        to other data."""
        reader = FileSystemReader(path)
        state = self.state()
        # A rank that did not exist when the checkpoint was saved keeps the random numbers it was
        # born with.
        if f"rng.rank{dist.get_rank()}.cpu" not in reader.read_metadata().state_dict_metadata:
            del state["rng"]
        dcp.load(state, storage_reader=reader)
        progress = state["progress"]
        if progress["text"] != self.text_digest or progress["seed"] != self.args.seed:
            raise UsageError(f"{path} was trained on other data or with another --seed")
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = progress["step"]
        for rng in state.get("rng", {}).values():
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)

    def export(self, path: Path) -> None:
        """Gathers every tensor whole and writes model and optimizer with torch.save on rank 0: a
        file for one process."""
        state = self.state()
        shards = {key: state[key] for key in ("model", "optimizer")}
        whole = tree_map_only(DTensor, lambda t: t.full_tensor().cpu(), shards)
        if dist.get_rank() == 0:
            torch.save(whole, path)


def resume(trainer: Trainer, root: Path, journal: Journal) -> None:
    """Goes on from the newest committed checkpoint under ``root``; from the start, said so, if
    there is none."""
    # One rank looks, so that all take the same one.
    found: list[Any] = [checkpoints.steps_in(root) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    steps: checkpoints.Steps = found[0]
    if steps.committed:
        trainer.load(checkpoints.path_of(root, steps.committed[-1]))
    skipped = [step for step in steps.incomplete if step > trainer.step]
    journal.write("resume", step=trainer.step, skipped=skipped)


def train(args: argparse.Namespace, trainer: Trainer, journal: Journal) -> None:
    """Trains to the last step. The manager deletes older checkpoints when a save has committed."""
    with CheckpointManager(args.dir, keep_last=args.keep) as manager:
        while trainer.step < args.steps:
            take_step(trainer, journal)
            if trainer.step % args.save_every == 0 or trainer.step == args.steps:
                save(trainer, manager, journal)


def take_step(trainer: Trainer, journal: Journal) -> None:
    begin = time.monotonic()
    loss = trainer.train_step()
    seconds = round(time.monotonic() - begin, 4)
    journal.write("step", step=trainer.step, loss=round(loss, 6), hex=loss.hex(), seconds=seconds)


def save(trainer: Trainer, manager: CheckpointManager, journal: Journal) -> None:
    journal.write("save", step=trainer.step)
    begin = time.monotonic()
    manager.save(trainer.step, trainer.state)
    seconds = round(time.monotonic() - begin, 4)
    journal.write("saved", step=trainer.step, seconds=seconds)


def check(args: argparse.Namespace) -> bytes:
    """Returns the text, or raises UsageError for arguments that can't work."""
    ranks = int(os.environ["WORLD_SIZE"])
    for name in ("steps", "save_every", "keep", "batch", "length", "width", "layers"):
        value = getattr(args, name)
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.replicas < 0 or (args.replicas and ranks % args.replicas):
        raise UsageError(f"--replicas {args.replicas} does not divide the {ranks} ranks")
    if args.batch % ranks:
        raise UsageError(f"--batch {args.batch} does not divide over {ranks} ranks")
    try:
        args.dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {args.dir}: {error.strerror or error}") from None
    try:
        return data.read_text(args.data, args.length)
    except data.DataError as error:
        raise UsageError(str(error)) from None


def run(args: argparse.Namespace) -> None:
    text = check(args)
    device = pick_device(args.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=5)
    )
    rank, ranks = dist.get_rank(), dist.get_world_size()
    trainer = Trainer(args, device, text)
    with Journal(args.dir / "log.jsonl" if rank == 0 else None) as journal:
        shape = [args.replicas, ranks // args.replicas] if args.replicas else [ranks]
        journal.write(
            "start",
            mesh=shape,
            device=device.type,
            parameters=trainer.elements,
            bytes=len(text),
            torch=torch.__version__,
        )
        if args.resume == "latest":
            resume(trainer, args.dir, journal)
        train(args, trainer, journal)
        if args.export:
            trainer.export(args.export)
        journal.write("end", step=trainer.step)
    # All leave together: threads of Gloo hold the tensors of a collective for a moment longer than
    # it takes, and one that lets go of them when Python has ended takes the process down.
    dist.barrier()
    dist.destroy_process_group()


@record  # torchrun then shows the traceback of the rank that failed first
def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if "LOCAL_RANK" not in os.environ:
        sys.exit(
            "start me with torch's launcher: torchrun --nproc-per-node 4 -m examples.demo.train "
            "--dir DIR"
        )
    try:
        run(args)
    except UsageError as error:
        if os.environ["RANK"] == "0":
            print(f"examples.demo.train: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
