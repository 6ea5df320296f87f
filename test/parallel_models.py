"""A small transformer block in parallel styles beside data parallelism: what tests of larger meshes
train, with either side's ``fully_shard``."""

from collections.abc import Callable

import torch
from device import DEVICE
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

WIDTH, VOCABULARY, LENGTH, BATCH = 16, 32, 8, 4


def mesh_of(**sizes: int) -> DeviceMesh:
    """A mesh of named dimensions."""
    return init_device_mesh(DEVICE, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Language(nn.Module):
    """Tokens to logits. ``tied``: the embedding is the head's weight as well."""

    def __init__(self, blocks: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(FeedForward() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def language(tied: bool = False) -> Language:
    torch.manual_seed(0)
    return Language(tied=tied).to(DEVICE)


def tensor_parallel(
    model: Language, mesh: DeviceMesh, sequence: bool = True, whole_logits: bool = True
) -> Language:
    """Column-wise and row-wise linear layers on ``mesh``; with ``sequence`` norms on pieces of the
    sequence; without ``whole_logits`` each rank keeps its part of the vocabulary's logits, for
    ``loss_parallel``."""
    between = Shard(1) if sequence else Replicate()
    logits = Replicate() if whole_logits else Shard(-1)
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(
            input_layouts=between, output_layouts=logits, use_local_output=whole_logits
        ),
    }
    if sequence:
        plan["norm"] = SequenceParallel()
    parallelize_module(model, mesh, plan)
    for block in model.blocks:
        inner = {
            "up": ColwiseParallel(input_layouts=between),
            "down": RowwiseParallel(output_layouts=between),
        }
        if sequence:
            inner["norm"] = SequenceParallel()
            inner["up"] = ColwiseParallel(input_layouts=Shard(1))
        parallelize_module(block, mesh, inner)
    return model


def shard_all(face: Callable[..., nn.Module], model: Language, **arguments) -> Language:
    """Each block a unit, and the whole."""
    for block in model.blocks:
        face(block, **arguments)
    face(model, **arguments)
    return model


def tokens(step: int, replica: int) -> Tensor:
    """Equal on all ranks that differ only in other than data-parallel coordinates."""
    generator = torch.Generator().manual_seed(1000 * step + replica)
    drawn = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    return drawn.to(DEVICE)


def loss_of(model: nn.Module, step: int, replica: int) -> Tensor:
    inputs = tokens(step, replica)
    logits = model(inputs)
    return nn.functional.cross_entropy(logits.flatten(0, 1), inputs.roll(1, 1).flatten())


__all__ = ["PrepareModuleInput", "loss_parallel"]
