"""The numbers of the core on torch's FSDP2's own ground: optimizers, meshes, dtypes, partial sums;
and the same bits again."""

import dataclasses
import functools
import itertools

import pytest
import torch
from device import DEVICE
from models import Net, batch
from ranks import run_checks, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from training import full, grads, loss_of, mean_grads, mesh_of, wrap, wrap_fsdp2

import torch_hsdp_ckpt
from torch_hsdp_ckpt import _C

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def wide_net(seed: int = 0) -> Net:
    """Weights large enough to be gathered and reduced where they are, some with rows that no group
    divides."""
    torch.manual_seed(seed)
    return Net(256, 509, 3)


def narrow_net(seed: int = 0) -> Net:
    """Everything is packed, and the head has fewer rows than ranks."""
    torch.manual_seed(seed)
    return Net(7, 13, 3)


NETS = (wide_net, narrow_net)


def wrap_in(net: nn.Module, shape: tuple[int, ...] = (2, 2), **precision) -> nn.Module:
    """Every unit with ``precision`` (param_dtype, reduce_dtype, keep_low_precision_grads)."""
    return wrap(net, shape, mixed_precision=MixedPrecision(**precision))


def wrap_fsdp2_in(net: Net, shape: tuple[int, ...], param_dtype, reduce_dtype) -> Net:
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    for block in net.blocks:
        fully_shard(block, mesh=mesh_of(shape), mp_policy=policy)
    return fully_shard(net, mesh=mesh_of(shape), mp_policy=policy)


def cores(model: nn.Module) -> list[_C.Unit]:
    return [wrapper._unit.core for wrapper in model.fsdp_modules(model)]


def train(
    model: nn.Module, net: Net, rank: int, optimizer, steps: int, dtype: torch.dtype = FP32
) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(net, step, rank).to(dtype)).backward()
        optimizer.step()


def same_bits(ours: nn.Module, reference: nn.Module, where: str) -> None:
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local()), f"{where}: {name}"


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


def _optimizers(rank: int) -> None:
    for make in NETS:
        for name, optimizer in OPTIMIZERS.items():
            reference, ours = wrap_fsdp2(make(), (2, 2)), wrap(make(), (2, 2))
            for model in (reference, ours):
                train(model, make(), rank, optimizer(model.parameters()), 6)
            same_bits(ours, reference, name)
        for model in (
            wrap_fsdp2(make(), (2, 2)),
            wrap(make(), (2, 2)),
        ):  # torch has no such kernel for DTensors
            with pytest.raises(NotImplementedError, match="_fused_sgd_"):
                train(
                    model,
                    make(),
                    rank,
                    torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
                    1,
                )


def _again(rank: int) -> None:
    """Three terms and more are summed in a fixed order, so that a second run has the same bits."""
    for shape in ((2, 2), (1, 4), (4,)):
        runs = []
        for _ in range(2):
            ours = wrap_in(wide_net(), shape, param_dtype=BF16, reduce_dtype=FP32)
            train(ours, wide_net(), rank, torch.optim.SGD(ours.parameters(), lr=0.1), 4, BF16)
            runs.append(ours)
        same_bits(*runs, f"mesh {shape}")


def _ours_in_fsdp2s_way(net: Net, shape: tuple[int, ...], param, reduce) -> nn.Module:
    policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce)
    for block in net.blocks:
        torch_hsdp_ckpt.fully_shard(block, mesh=mesh_of(shape), mp_policy=policy)
    return torch_hsdp_ckpt.fully_shard(net, mesh=mesh_of(shape), mp_policy=policy)


def _local_grads(model: nn.Module, rank: int, make, param: torch.dtype | None) -> list:
    loss_of(model, batch(make(), 0, rank).to(param or FP32)).backward()
    assert all(p.grad.dtype == p.dtype == FP32 for p in model.parameters())
    return [p.grad.to_local() for p in model.parameters()]


def _every_pair_of_dtypes(rank: int) -> None:
    """Two terms have one sum, whatever their order: the bits are torch's. More terms are rounded in
    another order, by the dtype that they are summed in."""
    dtypes = (None, BF16, FP16, FP32)
    pairs = itertools.product(dtypes, dtypes)
    two_by_two = [(narrow_net, (2, 2), *pair) for pair in pairs]
    # In place, and of uneven rows.
    two_by_two += [(wide_net, (2, 2), *pair) for pair in ((BF16, None), (FP16, FP16), (None, BF16))]
    four = [(narrow_net, (4,), *pair) for pair in ((BF16, None), (FP16, FP32), (None, BF16))]
    for make, shape, param, reduce in [*two_by_two, *four]:
        in_fsdp2s_way = _ours_in_fsdp2s_way(make(), shape, param, reduce)
        reference = _local_grads(wrap_fsdp2_in(make(), shape, param, reduce), rank, make, param)
        _check_against(reference, in_fsdp2s_way, rank, make, (param, reduce), shape == (2, 2))
        # FSDP1 reduces in what it computes in, if nothing is said.
        if reduce is None and param is not None:
            in_low = wrap_fsdp2_in(make(), shape, param, param)
            reference = _local_grads(in_low, rank, make, param)
        in_fsdp1s_way = wrap_in(make(), shape, param_dtype=param, reduce_dtype=reduce)
        _check_against(reference, in_fsdp1s_way, rank, make, (param, reduce), shape == (2, 2))


def _check_against(
    reference: list, model: nn.Module, rank: int, make, dtypes: tuple, bits: bool
) -> None:
    param, reduce = dtypes
    for ours, theirs in zip(_local_grads(model, rank, make, param), reference, strict=True):
        if bits:
            assert torch.equal(ours, theirs), (make, dtypes)
        elif theirs.numel() > 0:
            rounding = 4 * torch.finfo(reduce or param or FP32).eps
            atol = rounding * theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=atol)


def _low_precision_grads(rank: int) -> None:
    for make in NETS:
        for param, reduce in ((BF16, FP32), (FP16, FP32), (BF16, None), (FP16, FP16), (None, BF16)):
            reference = wrap_in(make(), param_dtype=param, reduce_dtype=reduce)
            expected = _local_grads(reference, rank, make, param)
            options = {"reduce_dtype": reduce, "keep_low_precision_grads": True}
            low = wrap_in(make(), param_dtype=param, **options)
            for _ in range(2):  # the second one adds
                loss_of(low, batch(make(), 0, rank).to(param or FP32)).backward()
            for (name, p), grad in zip(low.named_parameters(), expected, strict=True):
                assert p.grad.dtype == (param or FP32), name
                twice = (2 * grad).to(param or FP32)
                torch.testing.assert_close(p.grad.to_local(), twice, rtol=2**-6, atol=1e-6)


class Scaled(nn.Module):
    """Its gradient is the rank's factor, whatever the weight: 300 x 512 elements go in place, 4 x 3
    are packed."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return (self.weight * factor).sum()


def _reduce_dtype_shows(rank: int) -> None:
    """1 + 2**-9 is 1 in bfloat16. The shards' sums are (1 + 2**-9) on both replicas."""
    factor = torch.tensor(1.0 if rank % 2 == 0 else 2.0**-9, dtype=BF16)
    for rows, columns in ((300, 512), (5, 3)):
        for reduce, expected in ((FP32, (2 + 2.0**-8) / 4), (BF16, 0.5), (None, 0.5)):
            ours = wrap_in(Scaled(rows, columns), param_dtype=BF16, reduce_dtype=reduce)
            ours(factor).backward()
            assert (ours.module.weight.grad.to_local() == expected).all(), (rows, reduce)
    # Sums of float16 terms that overflow before the division.
    term = 30000.0
    ours = wrap_in(Scaled(300, 512), param_dtype=FP16, reduce_dtype=FP16)
    ours(torch.tensor(term, dtype=FP16)).backward()
    assert (ours.module.weight.grad.to_local() == term).all()


def _odd_dtypes(rank: int) -> None:
    """float64, float32 and integers in one unit; those that don't float stay as they are."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 3, dtype=torch.float64)
            self.table = nn.Parameter(torch.arange(6), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert (
                self.one.weight.dtype == self.two.weight.dtype == BF16
                and self.table.dtype == torch.int64
            )
            assert self.table.tolist() == list(range(6))
            return self.two(self.one(x[:, self.table]))

    torch.manual_seed(0)
    net = Odd()
    ours = wrap_in(net, param_dtype=BF16, reduce_dtype=FP32)
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)).to(BF16) for r in range(4)]
    torch.manual_seed(0)
    expected = mean_grads(Odd().to(BF16), lambda n, r: n(x[r]).float().square().mean())
    ours(x[rank]).float().square().mean().backward()
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == p.dtype == (torch.float64 if "two" in name else FP32)
            torch.testing.assert_close(
                full(p.grad).float(), expected[name].float(), rtol=2**-6, atol=2**-8
            )
    with pytest.raises(ValueError, match="mixed precision in"):
        wrap_in(nn.Linear(2, 2), param_dtype=torch.float8_e4m3fn)


def _partial_sums(rank: int) -> None:
    """Micro-batches summed over the shards, the all-reduce over the replicas once: the mean of all;
    also of unused ones."""
    for make in NETS:
        net, ours = make(), wrap(make(), (2, 2))
        for micro in range(3):
            for core in cores(ours):
                core.set_all_reduce(micro == 2)
            loss_of(ours, batch(net, micro, rank)).backward()
            assert all((p.grad is None) == (micro < 2) for p in ours.parameters())
        expected = mean_grads(
            net,
            lambda n, r: sum(loss_of(n, batch(net, m, r)) for m in range(3)),  # noqa: B023
        )
        for name, grad in grads(ours).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)
    for core in cores(ours):
        core.set_all_reduce(False)
    loss_of(ours, batch(net, 0, rank)).backward()
    ours.module.head.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="not yet over the replicas"):
        loss_of(ours, batch(net, 0, rank))


def _factor_and_hook(rank: int) -> None:
    for make in NETS:
        net, ours = make(), wrap(make(), (2, 2))
        loss_of(ours, batch(net, 0, rank)).backward()
        plain = {name: p.grad.to_local().clone() for name, p in ours.named_parameters()}
        seen = []

        def hook(buffer: torch.Tensor, seen=seen) -> None:
            seen.append((buffer.dtype, buffer.dim()))
            buffer.mul_(3)

        for core in cores(ours):
            core.set_divide_factor(16.0)  # of 4 ranks
            core.set_all_reduce_hook(hook)
        ours.zero_grad()
        loss_of(ours, batch(net, 0, rank)).backward()
        assert seen == [(FP32, 1)] * len(cores(ours))
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad.to_local(), plain[name] * 3 / 4, msg=name)


def _bytes_copied(rank: int) -> None:
    """Below the 14 + 20 / N bytes an element and step that torch's FSDP2 moves beside the wire with
    bfloat16 parameters, in any precision; on a device below its 24 + 16 / N for float32 ones, as
    NCCL gathers them to where they are copied from."""
    for shape, precision in (
        ((2, 2), {"param_dtype": BF16, "reduce_dtype": FP32}),
        ((1, 4), {}),
        ((2, 2), {}),
    ):
        ours = wrap_in(wide_net(), shape, **precision)
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
        x = batch(wide_net(), 0, rank).to(precision.get("param_dtype", FP32))
        for _ in range(2):
            before = _C._copied_bytes()
            loss_of(ours, x).backward()
            optimizer.step()
            optimizer.zero_grad()
        copied = (_C._copied_bytes() - before) / sum(p.numel() for p in wide_net().parameters())
        shards, is_packed = shape[-1], DEVICE != "cpu" and not precision
        theirs = 24 + 16 / shards if is_packed else 14 + 20 / shards
        assert 0 < copied < theirs, (shape, precision, copied)


def test_numbers_on_four_ranks() -> None:
    checks = (
        _optimizers,
        _again,
        _every_pair_of_dtypes,
        _low_precision_grads,
        _reduce_dtype_shows,
        _odd_dtypes,
        _factor_and_hook,
        _bytes_copied,
    )
    run_checks(4, *checks, _partial_sums, timeout=300.0)


def _override(rank: int) -> None:
    """Norms compute as they are stored, all else in bfloat16: torch's numbers."""
    for reduce_dtype in (None, FP32, BF16):
        outcomes = []
        for face in (torch_hsdp_ckpt.fully_shard, fully_shard):
            net, seen = narrow_net(), {}
            norms = {id(p) for block in net.blocks for p in block.norm.parameters()}
            policy = MixedPrecisionPolicy(
                param_dtype=BF16,
                reduce_dtype=reduce_dtype,
                param_dtype_override_fn=functools.partial(_float32_of, norms),
            )
            net.blocks[0].register_forward_pre_hook(functools.partial(_note_dtypes, seen))
            for module in (*net.blocks, net):
                face(module, mesh=mesh_of((1, 2)), mp_policy=policy)
            outcomes.append(_steps(net, rank))
            assert {name for name, dtype in seen.items() if dtype == FP32} == {
                "norm.weight",
                "norm.bias",
            }
        for found, wanted in zip(*outcomes, strict=True):
            assert torch.equal(found, wanted)
    wrong = MixedPrecisionPolicy(param_dtype=BF16, param_dtype_override_fn=lambda p: torch.float16)
    net = narrow_net()
    message = r"^rank \d: module Linear: parameter .* is to compute in torch.float16 by param_dtype"
    with pytest.raises(ValueError, match=message):
        torch_hsdp_ckpt.fully_shard(net.head, mp_policy=wrong)
    assert not any(isinstance(p, DTensor) for p in net.parameters())


def _float32_of(chosen: set[int], parameter: nn.Parameter) -> torch.dtype | None:
    return FP32 if id(parameter) in chosen else None


def _note_dtypes(seen: dict[str, torch.dtype], module: nn.Module, _: object) -> None:
    seen.update((name, parameter.dtype) for name, parameter in module.named_parameters())


def _steps(net: nn.Module, rank: int) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net, batch(narrow_net(), step, rank)).backward()
        optimizer.step()
    return [parameter.to_local() for parameter in net.parameters()]


@pytest.mark.skipif(
    "param_dtype_override_fn"
    not in {field.name for field in dataclasses.fields(MixedPrecisionPolicy)},
    reason="this torch's MixedPrecisionPolicy has no override by parameter",
)
def test_a_dtype_by_parameter() -> None:
    run_ranks(_override, 2)


def _eight(rank: int) -> None:
    for make in NETS:
        net = make()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            torch.stack([loss_of(net, batch(net, step, r)) for r in range(8)]).mean().backward()
            optimizer.step()
        for shape in ((2, 4), (4, 2)):
            reference, ours = wrap_fsdp2(make(), shape), wrap(make(), shape)
            for model in (reference, ours):
                train(model, net, rank, torch.optim.SGD(model.parameters(), lr=0.1), 3)
            for (name, p), q, single in zip(
                ours.named_parameters(), reference.parameters(), net.parameters(), strict=True
            ):
                assert isinstance(p, DTensor)
                torch.testing.assert_close(
                    full(p), full(q), rtol=1e-5, atol=1e-6, msg=f"{shape} {name}: FSDP2"
                )
                torch.testing.assert_close(
                    full(p), single.detach(), rtol=1e-5, atol=1e-6, msg=f"{shape} {name}"
                )


def test_numbers_on_eight_ranks() -> None:
    """2 x 4 and 4 x 2: within rounding of FSDP2 and of one process on the whole batch."""
    run_ranks(_eight, 8, timeout=300.0)
