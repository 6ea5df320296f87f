"""What only a GPU can show: no host synchronisation, streams, reuse of memory. NCCL, one rank a
device; Gloo, several."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import Block, Net, batch
from ranks import SIMULATED, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.profiler import ProfilerActivity, profile
from training import assert_close, full, grads, loss_of, mean_grads, wrap, wrap_fsdp2

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.save.async_phases import SnapshotMode
from torch_hsdp_ckpt.checkpoint.snapshot.device_copy import CopyPair, DeviceCopy
from torch_hsdp_ckpt.checkpoint.storage import pinned
from torch_hsdp_ckpt.checkpoint.storage.staging import Layout, StagingPool

pytestmark = pytest.mark.gpu


def _ranks() -> int:
    """One for each device, at most four: NCCL refuses several ranks on one. The coalesced calls
    need two."""
    count = torch.cuda.device_count()
    return 4 if count >= 4 else min(2, max(1, count))


def _net(width: int = 256, blocks: int = 4) -> Net:
    """Weights that travel alone, biases that are packed, and a head whose rows no group divides."""
    torch.manual_seed(0)
    return Net(width, 2 * width, 3, blocks)


def _wrapped(rank: int, net: Net, **options) -> nn.Module:
    torch.cuda.set_device(rank)
    ranks = torch.distributed.get_world_size()
    return wrap(net, (ranks // 2, 2) if ranks >= 2 else (1, 1), "cuda", **options)


def _train(model: nn.Module, inputs: list[torch.Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=True)
    for x in inputs:
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()


def _no_synchronisation(rank: int) -> None:
    for precision in (None, MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)):
        ours = _wrapped(rank, _net(), mixed_precision=precision)
        inputs = [batch(_net(), step, rank).cuda() for step in range(6)]
        _train(ours, inputs[:3])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            _train(ours, inputs[3:])
            with pytest.raises(RuntimeError, match="synchroniz"):
                inputs[0].sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_steady_step_does_not_synchronise() -> None:
    run_ranks(_no_synchronisation, _ranks(), backend="cpu:gloo,cuda:nccl")


def _little_memory(rank: int) -> None:
    """The same bits when freed blocks are handed out again at once, poisoned, as when there is
    memory for everybody."""
    width = 256 if SIMULATED else 1024
    inputs = [batch(_net(width), step, rank) for step in range(8)]
    expected: list[torch.Tensor] = []
    peak = 0
    for tight in (False, True):
        ours = _wrapped(rank, _net(width))
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
        if tight:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(
                1.1 * peak / torch.cuda.get_device_properties(rank).total_memory
            )
        torch.cuda.reset_peak_memory_stats()
        for x in inputs:
            loss = loss_of(ours, x.cuda())
            # When there is little, whoever reads a block that is not his reads this.
            others = float("nan") if tight else 0.0
            for size in (1 << 12, 1 << 18, 1 << 20):
                torch.full((size,), others, device="cuda")
            loss.backward()
            torch.full((1 << 20,), others, device="cuda")
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()
        if not tight:
            peak = torch.cuda.max_memory_reserved()
            expected = [full(p).clone().cpu() for p in ours.parameters()]
        else:
            for p, q in zip(ours.parameters(), expected, strict=True):
                assert torch.equal(full(p).cpu(), q)
        del ours, optimizer, loss
        torch.cuda.empty_cache()


def test_memory_that_is_handed_out_again() -> None:
    run_ranks(_little_memory, _ranks(), backend="cpu:gloo,cuda:nccl")


def _whole_on_every_rank(rank: int) -> None:
    """Parameters without dimensions stay equal to the last bit, though a reduce-scatter sums them
    for each rank in another order."""
    net = _net()
    for block in net.blocks:
        block.gate = nn.Parameter(torch.tensor(0.5))
        block.register_forward_hook(lambda module, _, output: output * module.gate)
    ours = _wrapped(rank, net)
    _train(ours, [batch(_net(), step, rank).cuda() for step in range(20)])
    own = torch.stack([p.detach().to_local() for p in ours.parameters() if p.ndim == 0])
    everyones = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyones, own)
    assert len(own) == len(net.blocks) and all(torch.equal(other, own) for other in everyones)


def test_parameters_without_dimensions_have_the_same_bits_on_every_rank() -> None:
    run_ranks(_whole_on_every_rank, _ranks(), backend="cpu:gloo,cuda:nccl")


WIDTH = 256 if SIMULATED else 512


def _height(rank: int, ahead: bool) -> int:
    """Bytes that the allocator can't hand out again, at the height of a backward that the host has
    queued before it begins."""
    ours = _wrapped(rank, _net(WIDTH, 16))
    x = batch(_net(WIDTH), 0, rank).cuda()
    if not ahead:
        for block in [m for m in ours.modules() if isinstance(m, Block)]:
            block.register_full_backward_hook(lambda *_: torch.cuda.synchronize())
    for _ in range(3):
        ours.zero_grad()
        loss = loss_of(ours, x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda._sleep(1_000_000_000 if ahead else 1)
        loss.backward()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["active_bytes.all.peak"]


def _bounded(rank: int) -> None:
    unit = sum(p.nbytes for p in Block(WIDTH, 2 * WIDTH).parameters())
    ahead, in_step = _height(rank, True), _height(rank, False)
    assert ahead < in_step + 3 * unit, (ahead, in_step, unit)


def test_a_host_that_is_ahead_holds_two_reductions() -> None:
    run_ranks(_bounded, _ranks(), backend="cpu:gloo,cuda:nccl")


class _Outputs(nn.Module):
    """Of every block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(64, 128) for _ in range(5))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs


class _Branch(Block):
    def forward(self, x: torch.Tensor, skips: bool) -> torch.Tensor:  # type: ignore[override]
        half = torch.tanh(self.up(self.norm(x)))
        return x + (half[..., : x.shape[-1]] if skips else self.down(half))


class _Branches(nn.Module):
    """The last blocks may leave out their second half."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Branch(64, 128) for _ in range(5))

    def forward(self, x: torch.Tensor, skips: bool) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, skips and number > 2)
        return x


Loss = Callable[[nn.Module, int], torch.Tensor]


def _has_the_mean_of_gradients(
    net: nn.Module, loss: Loss, device: str, replicas: int, units: tuple[type, ...] = (Block,)
) -> None:
    expected = mean_grads(net.to(device), loss)
    shape = replicas, dist.get_world_size() // replicas
    model = wrap(net, shape, device, ModuleWrapPolicy(set(units)))
    for _ in range(2):
        model.zero_grad()
        loss(model, dist.get_rank()).backward()
        assert_close(grads(model), expected)


def _partly_unused_on_some(rank: int, device: str, replicas: int) -> None:
    """Ranks that have no gradient for a part of a block reduce zeros for it."""
    torch.manual_seed(0)
    net, x = _Branches(), torch.randn(8, 64)

    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        return model(x.to(device) + rank, rank % 2 == 1).square().mean()

    _has_the_mean_of_gradients(net, loss, device, replicas)


def _unused_on_some(rank: int, device: str, replicas: int = 1) -> None:
    """The same of the last blocks."""
    torch.manual_seed(0)
    net, x = _Outputs(), torch.randn(8, 64)

    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        return model(x.to(device) + rank)[-1 - rank].square().mean()

    _has_the_mean_of_gradients(net, loss, device, replicas)


class _Cut(Block):
    def forward(self, x: torch.Tensor, cuts: bool) -> torch.Tensor:  # type: ignore[override]
        x = super().forward(x)
        return x.detach() if cuts else x


class _Cuts(nn.Module):
    """Blocks, up to one of which no gradient comes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Cut(64, 128) for _ in range(3))
        self.head = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, cuts: tuple[int, ...]) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x, number in cuts)
        return self.head(x)


def _cut_on_some(rank: int, device: str, replicas: int = 1) -> None:
    """The same of the first blocks."""
    torch.manual_seed(0)
    net, x = _Cuts(), torch.randn(8, 64)

    def loss(model: nn.Module, rank: int) -> torch.Tensor:
        return model(x.to(device) + rank, ((), (0,), (0, 2), (1,))[rank]).square().mean()

    _has_the_mean_of_gradients(net, loss, device, replicas, (Block, nn.Linear))


def test_gloo_on_one_device_when_ranks_lack_gradients() -> None:
    run_ranks(_unused_on_some, 2, "cuda", backend="cpu:gloo,cuda:gloo")


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="NCCL takes a device for each rank")
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("lacks", [_unused_on_some, _partly_unused_on_some, _cut_on_some])
def test_ranks_that_lack_gradients(lacks: Callable[..., None], replicas: int) -> None:
    """Each stream has a hardware queue of its own: see docs/troubleshooting.md."""
    settings = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    run_ranks(lacks, 4, "cuda", replicas, backend="cpu:gloo,cuda:nccl", settings=settings)


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="NCCL takes a device for each rank")
def test_a_host_that_lacks_gradients_asks_for_them_when_all_is_queued() -> None:
    """With so many (simulated) devices gathers share a hardware queue with a rank's computation:
    what its host waits for must not stand behind a gather that it has still to start."""
    settings = {"SIMGPU_DEVICES": "8"}
    run_ranks(_cut_on_some, 4, "cuda", 2, backend="cpu:gloo,cuda:nccl", settings=settings)


class _OneRecord(list[tuple[int, int]]):
    """A planned file of one record (``_C.PlannedFile``)."""

    def __init__(self, size: int) -> None:
        super().__init__([(0, size)])
        self.size, self.payloads = size, [0]

    def places(self) -> list[tuple[int, int]]:
        return list(self)


def test_staging_takes_what_it_is_given_and_gives_it_back() -> None:
    pool = StagingPool()
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    source = torch.randint(256, ((40 << 20) + 5,), dtype=torch.uint8, device="cuda")
    for size in (9 << 20, source.numel(), 1 << 20):
        image = pool.image(Layout([_OneRecord(size)], 0), pinned=True, limit=size + (1 << 20))
        view = image.view(0, source[:size])
        copy = DeviceCopy([source.device])
        copy.start([CopyPair(source[:size], view)])
        copy.synchronize()
        assert torch.equal(view, source[:size].cpu())
        assert view.is_pinned() and pool._block.numel() <= size + (1 << 20)
    pool._free()
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before


def test_memory_is_registered_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no copy goes from one of them into the next."""
    monkeypatch.setattr(pinned, "STEP", 16 << 20)
    source = torch.randint(256, ((40 << 20) + 5,), dtype=torch.uint8, device="cuda")
    pool = StagingPool()
    image = pool.image(Layout([_OneRecord(source.numel())], 0), pinned=True)
    assert pool._pinned is not None and len(pool._pinned._registered) in (3, 4)
    view = image.view(0, source)
    assert all(view[at:].is_pinned() for at in range(0, view.numel(), 1 << 20))
    if SIMULATED:  # as drivers are known to do, if not each of them
        across = -view.data_ptr() % pinned.STEP + pinned.STEP
        with pytest.raises(RuntimeError, match="InvalidValue"):
            view[across - 1 : across + 1].copy_(source[:2])
    copy = DeviceCopy([source.device])
    copy.start([CopyPair(source, view)])
    copy.synchronize()
    assert torch.equal(view, source.cpu()) and copy.unchanged()
    source[-1] += 1
    assert not copy.unchanged()
    pool._free()


@pytest.mark.parametrize("snapshot", ["copy", "lazy", "verify"])
def test_saves_of_more_than_a_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, snapshot: SnapshotMode
) -> None:
    monkeypatch.setattr(pinned, "STEP", 16 << 20)
    rows = torch.arange(5.0 * (1 << 20), device="cuda").view(1024, -1)
    state = {"rows": rows, "columns": rows.t()}
    h.async_save(state, checkpoint_id=tmp_path, no_dist=True, snapshot=snapshot).result(60)
    loaded = {name: torch.zeros_like(value) for name, value in state.items()}
    h.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


def _streams(rank: int) -> None:
    """Packing and casting for gathers and reductions run beside the computation's kernels, not
    among them."""
    ours = _wrapped(
        rank,
        _net(),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    inputs = [batch(_net(), step, rank).cuda() for step in range(6)]
    _train(ours, inputs[:3])
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _train(ours, inputs[3:])
        torch.cuda.synchronize()
    ours_on: set[int] = set()
    torchs_on: set[int] = set()
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            if "hsdp_ckpt::" in event.name():
                ours_on.add(event.device_resource_id())
            elif "at::native" in event.name():
                torchs_on.add(event.device_resource_id())
    assert len(torchs_on) == 1 and len(ours_on - torchs_on) == 2, (
        ours_on,
        torchs_on,
    )  # one for gathers, one for reductions


@pytest.mark.real_gpu  # the profiler asks the driver
def test_gathers_and_reductions_have_streams_of_their_own() -> None:
    run_ranks(_streams, _ranks(), backend="cpu:gloo,cuda:nccl")


def _coalesced(rank: int) -> None:
    """Large even parameters from where they are, in one coalesced call with the packed rest:
    FSDP2's numbers."""
    torch.cuda.set_device(rank)
    ranks = torch.distributed.get_world_size()
    for shape in ((ranks // 2, 2), (1, ranks)) if ranks >= 2 else ((1, 1),):
        nets = [_net(1024, blocks=1) for _ in range(2)]  # 8 MiB a weight
        inputs = [batch(nets[0], step, rank).cuda() for step in range(3)]
        models = [wrap(nets[0], shape, "cuda"), wrap_fsdp2(nets[1], shape, "cuda")]
        for model in models:
            _train(model, inputs)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(full(p), full(q), rtol=1e-5, atol=1e-6, msg=name)


def test_coalesced_collectives_have_fsdp2s_numbers() -> None:
    run_ranks(_coalesced, _ranks(), backend="cpu:gloo,cuda:nccl")
