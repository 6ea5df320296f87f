"""Gradients that wait for a later backward to reduce them: the dtype that they are added up in, bit
for bit beside torch's two wrappers, and the memory that they take."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from device import DEVICE
from models import Block
from ranks import memory_on_device_of, run_checks, run_ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as TorchsFSDP
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from training import full, mesh_of

from torch_hsdp_ckpt import FullyShardedDataParallel, fully_shard

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POLICIES = ((BF16, FP32), (FP16, FP32), (BF16, None), (BF16, BF16), (None, BF16), (None, None))
MICROBATCHES = 5


class Net(nn.Module):
    """``tied`` is used twice in each forward, ``frozen`` is; if ``skips``, ``spare`` has no
    gradient in every second microbatch, the last block runs in the first microbatches only and the
    one before it in the later ones."""

    def __init__(self, width: int, skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        self.blocks = nn.ModuleList(Block(width, 2 * width + 1) for _ in range(3))
        self.tied = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.spare = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, micro: int) -> torch.Tensor:
        x = self.tied(torch.tanh(self.tied(x)))
        for index, block in enumerate(self.blocks):
            if index == 0 or not self.skips or (index == 2) == (micro < 2):
                x = block(x)
        x = self.frozen(x)
        return x * self.spare if micro % 2 == 0 or not self.skips else x


# torch 2.11's own wrapper fails where a microbatch leaves out a unit or a parameter.
TORCHS_MAY_SKIP = hasattr(FSDPParam, "unsharded_grad_dtype")


def _net(width: int, skips: bool = TORCHS_MAY_SKIP) -> Net:
    torch.manual_seed(0)
    return Net(width, skips)


def _input(width: int, step: int, micro: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(6, width, generator=generator)


def _sharded(face: Callable[..., Any], net: Net, policy: MixedPrecisionPolicy, **options) -> Any:
    for block in net.blocks:
        face(block, mp_policy=policy, **options)
    return face(net, mp_policy=policy, **options)


def _train(model: Any, width: int, rank: int, *, reduces: Callable[[Any, int], None]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        for micro in range(MICROBATCHES):
            reduces(model, micro)
            model(_input(width, step, micro, rank), micro).float().square().mean().backward()
        optimizer.step()
        if step == 0:
            optimizer.zero_grad()


def _same_gradients(ours: nn.Module, torchs: nn.Module, where: Any) -> None:
    for (name, p), q in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, (where, name)
            continue
        assert p.grad.dtype == q.grad.dtype, (where, name)
        assert torch.equal(p.grad.to_local(), q.grad.to_local()), (where, name)
        assert torch.equal(p.to_local(), q.to_local()), (where, name)


def _last_one(model: Any, micro: int) -> None:
    model.set_requires_gradient_sync(micro == MICROBATCHES - 1)


def _every_second(model: Any, micro: int) -> None:
    model.set_requires_gradient_sync(micro % 2 == 0)


def _one_unit_waits(model: Any, micro: int) -> None:
    model.blocks[0].set_requires_gradient_sync(micro == MICROBATCHES - 1)


def _beside_fully_shard(rank: int) -> None:
    """Two shards: two terms have one sum, whatever their order."""
    for width in (7, 192):  # packed, and reduced from where they are
        for param, reduce in POLICIES:
            for reduces in (_last_one, _every_second, _one_unit_waits):
                for reshard in (True, False):
                    models = []
                    for face in (fully_shard, torchs_fully_shard):
                        policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce)
                        model = _sharded(face, _net(width), policy, mesh=mesh_of((2,)))
                        model.set_reshard_after_backward(reshard)
                        _train(model, width, rank, reduces=_behind_reshard(reduces))
                        _reshard(model)
                        models.append(model)
                    _same_gradients(*models, (width, param, reduce, reduces.__name__, reshard))


def _reshard(model: Any) -> None:
    for module in (model, *model.blocks):
        module.reshard()


def _behind_reshard(reduces: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """What backward does not reshard has to be resharded after a step."""

    def also_reshards(model: Any, micro: int) -> None:
        reduces(model, micro)
        if micro == 0:
            _reshard(model)

    return also_reshards


def test_beside_fully_shard() -> None:
    run_ranks(_beside_fully_shard, 2, timeout=400.0)


def _all_reduce_last(model: Any, micro: int) -> None:
    model.set_requires_all_reduce(micro == MICROBATCHES - 1)


def _both(model: Any, micro: int) -> None:
    """Some microbatches stay whole, the next is reduced over the shards, the last one over all."""
    model.set_requires_gradient_sync(micro % 2 == 0)
    model.set_requires_all_reduce(micro == MICROBATCHES - 1)


def _beside_fully_shard_with_replicas(rank: int) -> None:
    for width in (7, 192):
        for reduces in (_last_one, _all_reduce_last, _both):
            models = []
            for face in (fully_shard, torchs_fully_shard):
                policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
                model = _sharded(face, _net(width), policy, mesh=mesh_of((2, 2)))
                _train(model, width, rank, reduces=reduces)
                models.append(model)
            _same_gradients(*models, (width, reduces.__name__))


class Two(nn.Module):
    """Two parameters in one unit, of which a forward uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300, 300, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, use: int) -> torch.Tensor:
        return self.layers[use](x)


def _gradients_on_some_ranks(rank: int) -> None:
    """What waits on one rank and is fresh, or missing, on its peers is sent in one dtype."""
    torch.manual_seed(0)
    ours = fully_shard(
        Two(),
        mesh=mesh_of((2, 2)),
        mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32),
    )
    x = torch.ones(1, 300, dtype=BF16)
    uses = [(0, 1, 0), (1, 1, 0), (0, 0, 0), (1, 0, 1)]
    for micro, use in enumerate(uses[rank]):
        ours.set_requires_gradient_sync(micro == 2)
        ours(x, use).sum().backward()
    for index, linear in enumerate(ours.layers):
        terms = sum(of_rank.count(index) for of_rank in uses)
        assert (linear.weight.grad.to_local() == terms / 4).all(), index


def _backwards_on_some_ranks(rank: int) -> None:
    """A rank may leave out the backward of a microbatch that reduces nothing: what it sends later
    has its peers' dtype."""
    torch.manual_seed(0)
    ours = fully_shard(
        Two(),
        mesh=mesh_of((2, 2)),
        mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32),
        reshard_after_forward=False,
    )
    x = torch.ones(1, 300, dtype=BF16)
    ours.set_requires_gradient_sync(False)
    loss = ours(x, 0).sum()
    if rank != 1:
        loss.backward()
    ours.set_requires_gradient_sync(True)
    ours(x, 0).sum().backward()
    assert (ours.layers[0].weight.grad.to_local() == (2 + 1 + 2 + 2) / 4).all()


def _converted_and_dropped(rank: int) -> None:
    """What waits survives a conversion, and zero_grad forgets it with its dtype."""
    width = 7
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)

    def model_of(face: Callable[..., Any]) -> Any:
        model = _sharded(face, _net(width), policy, mesh=mesh_of((2, 2)))
        model.set_requires_gradient_sync(False)
        return model

    def backward(model: Any, micro: int) -> None:
        model(_input(width, 0, micro, rank), micro).float().square().mean().backward()

    ours, torchs = model_of(fully_shard), model_of(torchs_fully_shard)
    backward(ours, 0)
    ours.zero_grad()
    for model in (ours, torchs):
        backward(model, 2)
        model.set_requires_gradient_sync(True)
        backward(model, 4)
    _same_gradients(ours, torchs, "after zero_grad")
    before = {name: full(p.grad) for name, p in ours.named_parameters() if p.grad is not None}
    ours = model_of(fully_shard)
    backward(ours, 2)
    ours.double()
    ours.set_requires_gradient_sync(True)
    backward(ours, 4)
    for name, p in ours.named_parameters():
        if p.requires_grad and name in before:
            torch.testing.assert_close(full(p.grad).float(), before[name], rtol=1e-2, atol=1e-3)


def test_beside_fully_shard_with_replicas_and_uneven_ranks() -> None:
    checks = (
        _beside_fully_shard_with_replicas,
        _gradients_on_some_ranks,
        _backwards_on_some_ranks,
        _converted_and_dropped,
    )
    run_checks(4, *checks, timeout=300.0)


def _many_small_terms(rank: int) -> None:
    """Sixty-four microbatches lose nothing that float32 holds; FSDP1's no_sync adds up in the
    dtype of the computation, as torch's does."""
    results = {}
    for face in ("fully_shard", "FSDP"):
        torch.manual_seed(0)
        net = nn.Linear(16, 16, bias=False)
        if face == "FSDP":
            model: Any = FullyShardedDataParallel(
                net,
                device_mesh=mesh_of((2,)),
                mixed_precision=MixedPrecision(param_dtype=BF16, reduce_dtype=FP32),
            )
        else:
            policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
            model = fully_shard(net, mesh=mesh_of((2,)), mp_policy=policy)
        expected = {FP32: torch.zeros(16, 16), BF16: torch.zeros(16, 16, dtype=BF16)}
        for micro in range(64):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(micro)).to(BF16)
            waits = micro < 63
            if face == "fully_shard":
                model.set_requires_gradient_sync(not waits)
            with model.no_sync() if waits and face == "FSDP" else nullcontext():
                model(x).sum().backward()
            term = torch.ones(4, 16, dtype=BF16).T @ x
            for total in expected.values():
                total += term
        results[face] = expected
        got = full(next(model.parameters()).grad)
        assert torch.equal(got, expected[FP32 if face == "fully_shard" else BF16].float()), face
    assert not torch.equal(results["FSDP"][FP32], results["FSDP"][BF16].float())


def _beside_fsdp1(rank: int) -> None:
    """no_sync beside torch's FSDP1. All units run: it never reduces what waits in one that the last
    microbatch leaves out."""
    for width in (7, 192):
        for param, reduce in ((BF16, FP32), (BF16, None), (None, BF16), (None, None)):
            wholes = []
            for face in (FullyShardedDataParallel, TorchsFSDP):
                model = face(
                    _net(width, skips=False),
                    device_id=torch.device(DEVICE),
                    use_orig_params=True,
                    auto_wrap_policy=ModuleWrapPolicy({Block}),
                    mixed_precision=MixedPrecision(param_dtype=param, reduce_dtype=reduce),
                )
                for micro in range(MICROBATCHES):
                    waits = micro < MICROBATCHES - 1
                    with model.no_sync() if waits else nullcontext():
                        out = model(_input(width, 0, micro, rank), micro)
                        out.float().square().mean().backward()
                with face.summon_full_params(model, with_grads=True):
                    wholes.append(
                        [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                    )
            for ours, torchs in zip(*wholes, strict=True):
                # A gradient that no rank has is None here, and zeros in a flat parameter's part.
                if ours is None:
                    assert torchs is None or not torchs.any()
                else:
                    assert torch.equal(ours, torchs), (width, param, reduce)


def _memory(rank: int) -> None:
    """No more than torch's own wrapper takes: one whole gradient a parameter, in float32."""
    taken = []
    for face in (fully_shard, torchs_fully_shard):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)])
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
        for layer in net:
            face(layer, mesh=mesh_of((2,)), mp_policy=policy)
        model: Any = face(net, mesh=mesh_of((2,)), mp_policy=policy)
        x = torch.ones(1, 1024)

        def steps(model: Any = model, x: torch.Tensor = x) -> None:
            for micro in range(3):
                model.set_requires_gradient_sync(micro == 2)
                model(x).sum().backward()

        steps()
        model.zero_grad()
        taken.append(memory_on_device_of(steps))
    assert taken[0] < 1.1 * taken[1] + (1 << 20), taken


def test_what_torchs_wrappers_keep() -> None:
    run_checks(2, _many_small_terms, _beside_fsdp1, _memory, timeout=300.0)
