"""Programs that need the orderings of ``csrc/hsdp`` on a device, each its own: what they do is
wrong with one left out, and the simulated GPU says so."""

import sys

import torch
import torch.distributed as dist
from models import Net, batch
from torch import nn
from torch.distributed.algorithms._comm_hooks.default_hooks import (
    DefaultState,
    reduce_scatter_hook,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import loss_of, mesh_of, wrap

from torch_hsdp_ckpt import _C, FullyShardedDataParallel, fully_shard


def _net() -> Net:
    """Weights that travel alone, biases that are packed."""
    torch.manual_seed(0)
    return Net(256, 512, 3, blocks=3)


def _wrapped(**options) -> nn.Module:
    ranks = dist.get_world_size()
    return wrap(_net(), (ranks // 2, 2), "cuda", **options)


def _inputs(rank: int, steps: int) -> list[torch.Tensor]:
    return [batch(_net(), step, rank).cuda() for step in range(steps)]


def _train(model: nn.Module, inputs: list[torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in inputs:
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def steps(rank: int) -> None:
    _train(_wrapped(), _inputs(rank, 3))


def overlap(rank: int) -> None:
    """Collectives run beside the computation."""
    simulator = sys.modules["simgpu_aten"]
    model, inputs = _wrapped(), _inputs(rank, 3)
    _train(model, inputs)
    before = simulator.counts()["collectives on default streams"]
    _train(model, inputs)
    assert simulator.counts()["collectives on default streams"] == before


def casts(rank: int) -> None:
    """Averages are cast on their way into the gradients, and their memory goes back before the
    reduce stream has read it."""
    low = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    _train(_wrapped(mixed_precision=low), _inputs(rank, 3))


def gathered_elsewhere(rank: int) -> None:
    """Gathers that one stream starts, whose parameters another one uses."""
    model, side = _fully_sharded(), torch.cuda.Stream()
    for x in _inputs(rank, 3):
        for block in model.blocks:
            block.unshard(async_op=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            model(x)
        model.reshard()
        torch.cuda.current_stream().wait_stream(side)  # before the input goes


def _fully_sharded() -> nn.Module:
    model, mesh = _net().cuda(), mesh_of((dist.get_world_size() // 2, 2), "cuda")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def dropped_gradients(rank: int) -> None:
    """A gradient of the user's own that goes before anybody has waited for what is added to it."""
    model = _fully_sharded()
    for x in _inputs(rank, 2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.set_is_last_backward(False)
        loss_of(model, x).backward()
        for p in model.parameters():
            p.grad = None


def backwards_elsewhere(rank: int) -> None:
    """Backwards on streams in turns, whose gradients go back while the next one runs."""
    model, streams = _fully_sharded(), [torch.cuda.Stream() for _ in range(2)]
    inputs = _inputs(rank, 4)
    streams[1].wait_stream(torch.cuda.current_stream())
    for number, x in enumerate(inputs):
        this, other = streams[number % 2], streams[number % 2 - 1]
        this.wait_stream(other)
        model.set_is_last_backward(number == len(inputs) - 1)
        with torch.cuda.stream(this):
            loss_of(model, x).backward()
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
        stream.wait_stream(torch.cuda.current_stream())


def gradients_elsewhere(rank: int) -> None:
    """Gradients that are used on another stream than the one that the first forward ran on, whose
    memory they are."""
    model, side = _fully_sharded(), torch.cuda.Stream()
    inputs = _inputs(rank, 3)
    with torch.no_grad():
        model(inputs[0])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _train(model, inputs)
    torch.cuda.current_stream().wait_stream(side)  # before the inputs go


class _Many(nn.Module):
    """More pieces than fit into a kernel's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList(torch.ones(8) for _ in range(200))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(self.rows)) * x[0, :8]


def many_pieces(rank: int) -> None:
    model = fully_shard(_Many().cuda(), mesh=mesh_of((dist.get_world_size() // 2, 2), "cuda"))
    _train(model, _inputs(rank, 3))


def another_device(rank: int) -> None:
    """The current device is not the model's."""
    model, inputs = _wrapped(), _inputs(rank, 3)
    torch.cuda.set_device((rank + 1) % torch.cuda.device_count())
    _train(model, inputs)
    torch.cuda.synchronize(rank)


def on_gloo(rank: int) -> None:
    """Reductions that the host orders, whose results come later."""
    _train(_wrapped(), _inputs(rank, 3))


def comm_hook(rank: int) -> None:
    """A user's hook reduces, on the reduce stream."""
    model = FullyShardedDataParallel(
        _net(), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), device_id=torch.device("cuda")
    )
    world = DefaultState(dist.distributed_c10d._get_default_group())
    simulator = sys.modules["simgpu_aten"]
    streams: set[int] = set()

    def hook(state: DefaultState, gradient: torch.Tensor, shard: torch.Tensor) -> None:
        streams.add(torch.cuda.current_stream().cuda_stream)
        reduce_scatter_hook(state, gradient, shard)

    model.register_comm_hook(world, hook)
    before = simulator.counts()["collectives on default streams"]
    _train(model, _inputs(rank, 3))
    assert 0 not in streams and len(streams) == 1, "on the reduce stream"
    assert simulator.counts()["collectives on default streams"] == before


def offloaded(rank: int) -> None:
    """Shards and gradients on the host, which changes the ones and reads the others as soon as it
    may."""
    model = _net()
    for module in (*model.blocks, model):
        mesh = mesh_of((dist.get_world_size() // 2, 2), "cuda")
        fully_shard(module, mesh=mesh, offload_policy=CPUOffloadPolicy())
    for x in _inputs(rank, 2):
        with torch.no_grad():
            model(x)
            for parameter in model.parameters():
                parameter.to_local().add_(0.1)
        for _ in range(2):
            loss_of(model, x).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().sub_(parameter.grad.to_local())
        model.zero_grad()


PROGRAMS = (
    steps,
    overlap,
    casts,
    gathered_elsewhere,
    backwards_elsewhere,
    dropped_gradients,
    gradients_elsewhere,
    many_pieces,
    another_device,
    on_gloo,
    comm_hook,
    offloaded,
)


class _Beside(nn.Module):
    """A user's own stream reads the full parameter, which goes when forward returns."""

    def __init__(self, recorded: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256, 256))
        self.side, self.recorded = torch.cuda.Stream(), recorded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            self.doubled = self.weight * 2
        if self.recorded:
            self.weight.record_stream(self.side)
        return x


def full_parameter_elsewhere(rank: int, recorded: bool) -> None:
    model = fully_shard(_Beside(recorded).cuda(), mesh=mesh_of((2, 2), "cuda"))
    with torch.no_grad():
        model(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()
    assert model.doubled.eq(2).all()


def shard_elsewhere(rank: int, recorded: bool) -> None:
    model, side = _fully_sharded(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    shard = model.head.weight.detach().to_local()
    with torch.cuda.stream(side):
        doubled = shard * 2
    if recorded:
        shard.record_stream(side)
    del shard
    model.double()  # the old memory goes
    torch.cuda.synchronize()
    assert doubled.isfinite().all()


def run(rank: int, program: int, left_out: str) -> list[str]:
    """Runs one program with one ordering left out. Returns the names of those that it came to."""
    _C._leave_out(left_out)
    PROGRAMS[program](rank)
    torch.cuda.synchronize()
    seen = _C._orderings_seen()
    _C._leave_out("")
    return seen
