"""A small transformer block in parallel styles beside data parallelism: what tests of larger meshes
train, with either side's ``fully_shard``."""

import functools
from collections.abc import Callable

import torch
from device import DEVICE
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    all_gather_tensor_autograd,
    reduce_scatter_tensor_autograd,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

WIDTH, VOCABULARY, LENGTH, BATCH = 16, 32, 8, 4


@functools.cache
def mesh_of(**sizes: int) -> DeviceMesh:
    """The mesh of these named dimensions."""
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


def distributed(model: Language, mesh: DeviceMesh) -> Language:
    """All parameters as DTensors on the whole ``mesh``: the linear layers cut over its ``tp``, if
    there is one, everything else replicated."""
    names = mesh.mesh_dim_names
    cuts = {"up.weight": Shard(0), "up.bias": Shard(0), "down.weight": Shard(1)}
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            last = f"{prefix.rpartition('.')[2]}.{name}"
            cut = cuts.get(last, Replicate())
            placements = [cut if dim == "tp" else Replicate() for dim in names]
            module.register_parameter(
                name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, placements))
            )
    model.mesh_of_activations = mesh
    return model


class Experts(nn.Module):
    """Every token goes to every expert. With ``group``, the ranks of expert parallelism, each has
    some of them, as DTensors, and all tokens of the group."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, WIDTH, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(count, WIDTH, WIDTH) / 4)
        self.group: DeviceMesh | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return self._outputs(x, self.up, self.down)
        all_tokens = all_gather_tensor_autograd(x, 0, self.group)
        outputs = self._outputs(all_tokens, self.up.to_local(), self.down.to_local())
        return reduce_scatter_tensor_autograd(outputs, "sum", 0, self.group)

    def _outputs(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("blw,ewh->eblh", x, up))
        return torch.einsum("eblh,ehw->blw", hidden, down)


class ExpertBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.norm(x))


def mixture() -> Language:
    """A model whose blocks hold experts."""
    model = language()
    model.blocks = nn.ModuleList(ExpertBlock() for _ in range(2)).to(DEVICE)
    return model


def spread_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Gives each rank of ``mesh`` its part of the experts."""
    experts.group = mesh
    for name, parameter in list(experts.named_parameters()):
        spread = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        experts.register_parameter(name, nn.Parameter(spread))


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


def _mesh_of_activations(model: nn.Module) -> DeviceMesh | None:
    """Set by who has made them DTensors."""
    return getattr(model, "mesh_of_activations", None)


def loss_of(model: nn.Module, step: int, replica: int) -> Tensor:
    inputs = tokens(step, replica)
    if (mesh := _mesh_of_activations(model)) is not None:
        placements = [Replicate() if name == "tp" else Shard(0) for name in mesh.mesh_dim_names]
        spread = DTensor.from_local(inputs, mesh, placements, run_check=False)
        logits = model(spread).redistribute(placements=placements).to_local()
    else:
        logits = model(inputs)
    return nn.functional.cross_entropy(logits.flatten(0, 1), inputs.roll(1, 1).flatten())
