"""What only a GPU can show: no host synchronisation, streams, reuse of memory. One rank a device; NCCL."""

import pytest
import torch
from models import Net, batch
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecision
from torch.profiler import ProfilerActivity, profile
from training import full, loss_of, wrap, wrap_fsdp2

pytestmark = pytest.mark.gpu


def _ranks() -> int:
    """One for each device, at most four: NCCL refuses several ranks on one. The coalesced calls need two."""
    count = torch.cuda.device_count()
    return 4 if count >= 4 else max(1, count)


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
    """The same bits when freed blocks are handed out again at once, poisoned, as when there is memory for everybody."""
    inputs = [batch(_net(1024), step, rank) for step in range(8)]
    expected: list[torch.Tensor] = []
    peak = 0
    for tight in (False, True):
        ours = _wrapped(rank, _net(1024))
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
        if tight:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.1 * peak / torch.cuda.get_device_properties(rank).total_memory)
        torch.cuda.reset_peak_memory_stats()
        for x in inputs:
            loss = loss_of(ours, x.cuda())
            if tight:  # whoever reads a block that is not his reads this
                for size in (1 << 12, 1 << 18, 1 << 20):
                    torch.full((size,), float("nan"), device="cuda")
            loss.backward()
            if tight:
                torch.full((1 << 20,), float("nan"), device="cuda")
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
    """Parameters without dimensions stay equal to the last bit, though a reduce-scatter sums them for each rank in another
    order."""
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


def _streams(rank: int) -> None:
    """Packing and casting for gathers and reductions run beside the computation's kernels, not among them."""
    ours = _wrapped(rank, _net(), mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
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
    assert len(torchs_on) == 1 and len(ours_on - torchs_on) == 2, (ours_on, torchs_on)  # one for gathers, one for reductions


def test_gathers_and_reductions_have_streams_of_their_own() -> None:
    run_ranks(_streams, _ranks(), backend="cpu:gloo,cuda:nccl")


def _coalesced(rank: int) -> None:
    """Large even parameters from where they are, in one coalesced call with the packed rest: FSDP2's numbers."""
    torch.cuda.set_device(rank)
    ranks = torch.distributed.get_world_size()
    for shape in ((ranks // 2, 2), (1, ranks)) if ranks >= 2 else ((1, 1),):
        models = [wrap(_net(), shape, "cuda"), wrap_fsdp2(_net(), shape, "cuda")]
        for model in models:
            _train(model, [batch(_net(), step, rank).cuda() for step in range(5)])
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(full(p), full(q), rtol=1e-5, atol=1e-6, msg=name)


def test_coalesced_collectives_have_fsdp2s_numbers() -> None:
    run_ranks(_coalesced, _ranks(), backend="cpu:gloo,cuda:nccl")
