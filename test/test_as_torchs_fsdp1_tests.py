"""Public behaviour that torch's own tests of FSDP1 pin, on both sides."""

from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from ranks import run_checks
from sides import HERE, SIDES, assert_same, fsdp1, gradients, layers, values
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, always_wrap_policy, enable_wrap, wrap
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from training import mesh_of

import torch_hsdp_ckpt as ours


class _Inner(nn.Module):
    def __init__(self, side: ModuleType) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(fsdp1(side, nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _wrapped_again(rank: int) -> None:
    """``test_multiple_wrapping``; and the first wrapper goes on."""
    for side in SIDES:
        inner = _Inner(side)
        model = fsdp1(side, inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = model(torch.ones(1, 4))
        assert torch.equal(before, fsdp1(side, inner)(torch.ones(1, 4)))
    again = fsdp1(ours, inner := _Inner(ours))
    lost = again(torch.ones(1, 4))
    fsdp1(ours, inner)(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="used within another outermost module"):
        lost.sum().backward()
    assert again(torch.ones(1, 4)).sum().backward() is None
    with again.no_sync():
        again(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=f"rank {rank}: .* keeps gradients that no backward"):
        fsdp1(ours, inner)(torch.ones(1, 4))


def _optimizers_in_backward(rank: int) -> None:
    """``test_fsdp_optimizer_overlap``."""
    for before_wrapping in (False, True):
        trained = []
        for side in SIDES:
            module = layers()
            if before_wrapping:
                _apply_optimizer_in_backward(torch.optim.SGD, module.parameters(), {"lr": 0.1})
            model = fsdp1(side, module)
            if not before_wrapping:
                _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
            before = values(side, model)
            for step in range(2):
                model(torch.full((2, 4), rank + step + 1.0)).square().sum().backward()
                assert all(p.grad is None for p in model.parameters())
            trained.append(values(side, model))
            moved = [not torch.equal(a, b) for a, b in zip(before, trained[-1], strict=True)]
            assert all(moved), (side.__name__, before_wrapping)
        assert_same(trained)


def _attributes(rank: int) -> None:
    for side in SIDES:
        model = fsdp1(side, layers())
        assert (model.rank, model.world_size) == (rank, 4)
        assert dist.get_world_size(model.process_group) == 4
        assert model.compute_device == HERE
        assert not model.cpu_offload.offload_params
        assert model.mixed_precision == side.MixedPrecision()
        plain = fsdp1(side, layers(), sharding_strategy=side.ShardingStrategy.NO_SHARD)
        assert (plain.rank, plain.world_size) == (rank, 4)
        hybrid = fsdp1(
            side,
            layers(),
            device_mesh=mesh_of((2, 2)),
            sharding_strategy=side.ShardingStrategy.HYBRID_SHARD,
        )
        assert (hybrid.rank, hybrid.world_size) == (rank % 2, 2)
        assert hybrid._fsdp_wrapped_module is hybrid.module
        states = [model.training_state.name]
        model.module[0].register_forward_hook(
            lambda *_, of=model, to=states: to.append(of.training_state.name)
        )
        model(torch.ones(2, 4)).sum().backward()
        with side.FullyShardedDataParallel.summon_full_params(model):
            states.append(model.training_state.name)
        states.append(model.training_state.name)
        assert states == ["IDLE", "FORWARD_BACKWARD", "SUMMON_FULL_PARAMS", "IDLE"], side


def _arguments_that_contradict(rank: int) -> None:
    for side in SIDES:
        inside = nn.Sequential(fsdp1(side, nn.Linear(4, 4)), nn.Linear(4, 4))
        with pytest.raises(ValueError):
            fsdp1(side, inside, ignored_modules=[inside[0]])
        with pytest.raises(ValueError):
            fsdp1(side, inside, auto_wrap_policy=always_wrap_policy)
        with pytest.raises(ValueError):
            fsdp1(side, nn.Linear(2, 2, device="meta"), param_init_fn=42)


class _Low(Tensor):
    """A parameter that says how it is gathered."""

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple:
        return (self,), None


class _Named(Tensor):
    pass


class _Opaque(Tensor):
    """Its values are nobody's but its own."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "_Opaque":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> "_Opaque":
        assert func is torch.ops.aten.detach.default
        return cls(torch.empty(args[0].shape))


def _tensor_subclasses(rank: int) -> None:
    for wrapped in (ours.fully_shard, ours.FullyShardedDataParallel):
        module = nn.Linear(4, 4)
        module.weight = nn.Parameter(module.weight.detach().as_subclass(_Low))
        with pytest.raises(ValueError, match=r"Linear: parameter weight .* fsdp_pre_all_gather"):
            wrapped(module)

        module.weight = nn.Parameter(_Opaque(torch.ones(4, 4)))
        with pytest.raises(ValueError, match=r"weight .* is a tensor subclass, "):
            wrapped(module)

        module.weight = nn.Parameter(torch.ones(4, 4).as_subclass(_Named))
        wrapped(module)(torch.ones(4)).sum().backward()
        assert type(module.weight) is DTensor and type(module.weight.to_local()) is Tensor


def _clipping(rank: int) -> None:
    """``test_ddp_parity`` of clipping: norms of every kind, strategies mixed."""
    for norm_type in (1.0, 2.0, 3.0, float("inf")):
        for mixed in (False, True):
            outcomes = []
            for side in SIDES:
                net = layers(3, width=6)
                if mixed:
                    strategy = side.ShardingStrategy.NO_SHARD
                    net[0] = fsdp1(side, net[0], sharding_strategy=strategy)
                model = fsdp1(side, net)
                model(torch.full((2, 6), rank + 1.0)).square().sum().backward()
                norm = model.clip_grad_norm_(0.5, norm_type)
                outcomes.append([norm, *gradients(side, model)])
            assert_same(outcomes)


def _clipping_in_float16(rank: int) -> None:
    """A norm whose square float16 has no place for."""
    low = ours.MixedPrecision(param_dtype=torch.float16, keep_low_precision_grads=True)
    model = fsdp1(ours, nn.Linear(4, 4, bias=False), mixed_precision=low)
    (200 * model(torch.ones(2, 4))).sum().backward()
    norm = model.clip_grad_norm_(1.0, "2")
    assert float(norm) == 400.0 * 4
    assert all(bool(p.grad.to_local().abs().gt(0).all()) for p in model.parameters())


def _tied_on_meta(rank: int) -> None:
    """A parameter of two units is refused on the meta device as elsewhere."""
    with torch.device("meta"):
        net = layers()
    net[1].weight = net[0].weight
    net[0] = fsdp1(ours, net[0])
    with pytest.raises(ValueError, match="weight is shared with another wrapped module"):
        fsdp1(ours, net)


def _zeroed_between(rank: int) -> None:
    """``test_multiple_optimizers``."""
    trained = []
    for side in SIDES:
        model = fsdp1(side, layers())
        first = torch.optim.SGD(model.module[0].parameters(), lr=0.1)
        second = torch.optim.Adam(model.module[1].parameters(), lr=0.1)
        for step in range(3):
            loss = model(torch.full((2, 4), rank + step + 1.0)).square().sum()
            first.zero_grad()
            loss.backward()
            first.step()
            second.step()
            second.zero_grad(set_to_none=False)
        trained.append(values(side, model))
    assert_same(trained)


def _summons_between(rank: int) -> None:
    """``test_summon_between_two_forwards``."""
    grads = []
    for side in SIDES:
        model = fsdp1(side, layers(), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}))
        fsdp = side.FullyShardedDataParallel
        x = torch.full((2, 4), rank + 1.0)
        loss = model(x).sum()
        with fsdp.summon_full_params(model):
            pass
        loss = loss + model(2 * x).square().sum()
        with fsdp.summon_full_params(model, writeback=False):
            pass
        loss.backward()
        grads.append(gradients(side, model))
    assert_same(grads)


def _wrapping_policies(rank: int) -> None:
    """``test_always_wrap``, ``test_main_wrap_api``, ``test_no_params``."""
    grads = []
    for side in SIDES:
        fsdp = side.FullyShardedDataParallel
        with enable_wrap(wrapper_cls=fsdp, device_id=HERE, use_orig_params=True):
            torch.manual_seed(0)
            net = nn.Sequential(wrap(nn.Linear(4, 4)), nn.ReLU())
        assert isinstance(net[0], fsdp)
        assert type(wrap(nn.Linear(2, 2))) is nn.Linear
        torch.manual_seed(0)
        every = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        every = fsdp1(side, every, auto_wrap_policy=always_wrap_policy)
        assert isinstance(every.module[1], fsdp)
        for model in (fsdp1(side, net), every):
            model(torch.full((2, 4), rank + 1.0)).sum().backward()
            grads.append(gradients(side, model))
        assert torch.equal(fsdp1(side, nn.ReLU())(torch.ones(2)), torch.ones(2))
    assert_same([grads[:2], grads[2:]])


def _scaler(rank: int) -> None:
    """``test_fsdp_sharded_grad_scaler``: what one rank overflows nobody steps."""
    for side in SIDES:
        model = fsdp1(side, layers())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = ShardedGradScaler(device=DEVICE, init_scale=2.0**10)
        before = values(side, model)
        scaler.scale(model(torch.ones(2, 4)).sum()).backward()
        with torch.no_grad():
            for p in model.parameters():
                local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                if rank == 1 and local is not None and local.numel():
                    local.view(-1)[:1] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        assert_same([before, values(side, model)])


def _experts(rank: int) -> None:
    """``test_mixture_of_experts``: a wrapper on a group of one inside one of all."""
    trained = []
    for side in SIDES:
        alone = dist.new_group([rank], use_local_synchronization=True)
        net = layers()
        with torch.no_grad():
            net[1].weight.fill_(rank)
        net[1] = fsdp1(side, net[1], process_group=alone)
        model = fsdp1(side, net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            model(torch.full((2, 4), rank + 1.0)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(values(side, model))
    assert_same(trained)


def _recursing_initialisation(rank: int) -> None:
    """``test_nested_model_with_meta_device_reset_params``: ``param_init_fn`` of a whole with
    wrapped parts."""

    def fill(module: nn.Module) -> None:
        module.to_empty(device=DEVICE, recurse=False)
        with torch.no_grad():
            for p in module.parameters(recurse=False):
                p.fill_(0.5)

    outputs = []
    for side in SIDES:
        with torch.device("meta"):
            net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        policy = ModuleWrapPolicy({nn.Linear})
        model = fsdp1(side, net, auto_wrap_policy=policy, param_init_fn=fill)
        outputs.append(model(torch.full((2, 4), rank + 1.0)))
        outputs[-1].sum().backward()
    assert_same(outputs)


def _accumulation_in_turns(rank: int) -> None:
    """``test_grad_acc``: synchronised and not, in turns, without zeroing between."""
    strategies = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")
    for strategy in strategies:
        grads = []
        for side in SIDES:
            arguments = {"sharding_strategy": side.ShardingStrategy[strategy]}
            model = fsdp1(side, layers(), **arguments)
            for micro in range(6):
                with model.no_sync() if micro in (2, 3) else nullcontext():
                    x = torch.full((2, 4), rank + micro + 1.0)
                    model(x).square().sum().backward()
            grads.append(gradients(side, model))
        assert_same(grads)


def _inputs_of_any_kind(rank: int) -> None:
    """``test_input_type``: dicts, tuples and nests of them."""

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, given: dict) -> Tensor:
            return self.linear(given["in"][0]["deep"]) * given["scale"]

    for side in SIDES:
        model = fsdp1(side, Takes())
        model({"in": ({"deep": torch.ones(2, 4)},), "scale": 2.0}).sum().backward()


def _ignored_around_wrapped(rank: int) -> None:
    """``test_ignored_modules_nested``: what is ignored stays plain, wherever it is."""
    for side in SIDES:
        net = nn.Sequential(layers(), nn.Linear(4, 4), nn.Linear(4, 4))
        model = fsdp1(
            side,
            net,
            ignored_modules=[net[1]],
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        )
        assert type(model.module[1]) is nn.Linear
        assert model.module[1].weight.shape == (4, 4)
        model(torch.ones(2, 4)).sum().backward()
        assert model.module[1].weight.grad is not None


def test_fsdp1() -> None:
    run_checks(
        4,
        _wrapped_again,
        _optimizers_in_backward,
        _attributes,
        _arguments_that_contradict,
        _tensor_subclasses,
        _clipping,
        _clipping_in_float16,
        _tied_on_meta,
        _zeroed_between,
        _summons_between,
        _wrapping_policies,
        _scaler,
        _experts,
        _recursing_initialisation,
        _accumulation_in_turns,
        _inputs_of_any_kind,
        _ignored_around_wrapped,
    )
