"""Benchmarks on simulated GPUs (test/simgpu): what a step queues, and the memory that it takes.
Order and counts are those of a GPU; speed is not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from simgpu import simgpu
from systems import Net, wrap
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh

SYSTEMS = ("fsdp2", "ours", "ours, fully_shard")
MESHES = ((2, 2), (4,))  # replicas x shards, and shards alone


def is_built() -> bool:
    return (simgpu.LIBRARIES / "libsimgpu_cuda.so").exists()


def outcome_of(program: str, *arguments: Any) -> Any:
    """What ``program``, a file of this directory, prints on simulated GPUs, as JSON."""
    if not is_built():
        raise SystemExit(
            f"{program}: the simulated GPU is not built: it needs torch's CUDA build and a CUDA "
            "toolkit; build with HSDP_CKPT_TESTS=1"
        )
    command = [sys.executable, str(Path(__file__).with_name(program)), json.dumps(arguments)]
    with simgpu.job() as environment:
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def words_of(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} replicas x {shape[1]} shards" if len(shape) == 2 else f"{shape[0]} shards"


class Trained:
    """A model on this rank's device and a batch of one token for it."""

    def __init__(
        self,
        system: str,
        mesh: DeviceMesh,
        net: Net,
        mixed: bool,
        checkpoints: bool = False,
    ) -> None:
        # The kernels of attention that are not simulated: the plain one is the same for all.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        if checkpoints:
            net.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in net.blocks)
        self.module = wrap(system, net.cuda(), mesh, mixed)
        casts = system == "bare" and mixed  # a wrapper casts by itself
        dtype = torch.bfloat16 if casts else torch.float32
        self._x = torch.ones(1, 1, net.head.in_features, device="cuda", dtype=dtype)

    def step(self) -> None:
        self.module(self._x).square().mean().backward()

    def zero_grad(self) -> None:
        self.module.zero_grad(set_to_none=True)
