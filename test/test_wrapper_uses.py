"""What training scripts do around a wrapped module: autocast, loss scaling, compiling, conversions,
hooks, odd settings."""

import copy
import dataclasses
import os
from collections import OrderedDict, UserDict, UserList
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE
from models import NETS, Block, Net, batch
from ranks import run_checks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from training import assert_close, full, grads, loss_of, mean_grads, mesh_of, wrap, wrap_fsdp2

from torch_hsdp_ckpt import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    fully_shard,
)


def shard(net: Net, face=fully_shard, shape: tuple[int, ...] = (2, 2), **options) -> Net:
    for block in net.blocks:
        face(block, mesh=mesh_of(shape), **options)
    return face(net, mesh=mesh_of(shape), **options)


def _assert_same_bits(ours: nn.Module, reference: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local()), name
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad.to_local(), q.grad.to_local()), name


def _retain_graph(rank: int) -> None:
    net = NETS["uneven"]()
    once = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))
    twice = {name: 2 * grad for name, grad in once.items()}
    for make in (wrap, shard):
        ours = make(copy.deepcopy(net))
        for _ in range(2):
            ours.zero_grad()
            loss = loss_of(ours, batch(net, 0, rank))
            loss.backward(retain_graph=True)
            assert_close(grads(ours), once)
            loss.backward()
            assert_close(grads(ours), twice)


def _autocast_and_scaler(rank: int) -> None:
    """Values of torch's FSDP2 to the bit; an infinity in one shard makes every rank skip its
    step."""
    net = NETS["uneven"]()
    models = [
        wrap(copy.deepcopy(net)),
        shard(copy.deepcopy(net)),
        wrap_fsdp2(copy.deepcopy(net), (2, 2)),
    ]
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16):
                out = model(batch(net, step, rank))
                assert out.dtype == torch.bfloat16
                loss = out.float().square().mean()
            scaler.scale(loss).backward()
            before = [p.to_local().clone() for p in model.parameters()]
            if step == 2 and rank % 2:  # the second shard of every replica
                next(model.parameters()).grad.to_local().view(-1)[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            moved = any(
                not torch.equal(p.to_local(), b)
                for p, b in zip(model.parameters(), before, strict=True)
            )
            assert moved == (step != 2)
        assert scaler.get_scale() == 2.0**9
    for ours in models[:2]:
        optimizer.zero_grad()
        ours.zero_grad()
        _assert_same_bits(ours, models[2])


def _compiled(rank: int) -> None:
    net = NETS["even"]()
    expected = [
        mean_grads(net, lambda n, r, step=step: loss_of(n, batch(net, step, r)))
        for step in range(2)
    ]

    def blocks_before(backend: str) -> nn.Module:
        inner = copy.deepcopy(net)
        for block in inner.blocks:
            block.compile(backend=backend)
        return wrap(inner, (2,))

    def blocks_after(backend: str) -> nn.Module:
        ours = shard(copy.deepcopy(net), shape=(2,))
        for block in ours.blocks:
            block.compile(backend=backend)
        return ours

    for make, backend, whole in (
        (blocks_before, "aot_eager", False),
        (blocks_after, "eager", False),
        (lambda _: wrap(copy.deepcopy(net), (2,)), "aot_eager", True),
        (lambda _: shard(copy.deepcopy(net), shape=(2,)), "eager", True),
    ):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        ours = make(backend)
        call = torch.compile(ours, backend=backend) if whole else ours
        for step in (0, 1, 0):
            ours.zero_grad()
            loss_of(call, batch(net, step, rank)).backward()
            assert_close(grads(ours), expected[step])
        # The blocks, and in a whole compiled wrapper the head; never the wrapper's own code.
        assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3, (
            torch._dynamo.utils.counters
        )


class Seeing(nn.Module):
    """Keeps which dtype came in and casts it to what its parameters have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = nn.Linear(6, 4), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x.dtype
        return self.inner(x.to(self.inner.weight.dtype))


def _half(rank: int) -> None:
    net = NETS["even"]()
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))
    for keep, dtype in ((True, torch.float16), (False, torch.float32)):
        precision = MixedPrecision(param_dtype=torch.float16, keep_low_precision_grads=keep)
        ours = wrap(copy.deepcopy(net), mixed_precision=precision)
        out = ours(batch(net, 0, rank))
        assert out.dtype == torch.float16
        out.float().square().mean().backward()
        for name, p in ours.named_parameters():
            assert p.dtype == torch.float32 and p.grad.dtype == dtype, name
            torch.testing.assert_close(full(p.grad).float(), expected[name], rtol=2e-2, atol=2e-3)
    policy = MixedPrecisionPolicy(param_dtype=torch.float16)
    models = [
        shard(copy.deepcopy(net), face, mp_policy=policy)
        for face in (fully_shard, torchs_fully_shard)
    ]
    outs = [model(batch(net, 0, rank)) for model in models]
    assert outs[0].dtype == torch.float16 and torch.equal(*outs)
    for cast, dtype in ((True, torch.float16), (False, torch.float32)):
        ours = wrap(
            Seeing(),
            mixed_precision=MixedPrecision(
                param_dtype=torch.float16, cast_root_forward_inputs=cast
            ),
        )
        assert ours(torch.ones(2, 6)).dtype == torch.float16 and ours.module.seen == dtype


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Seeing()
        self.register_buffer("table", torch.full((4,), 1.0 + 2.0**-9))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.table


def _dtypes_of_buffers_inputs_and_scaled_gradients(rank: int) -> None:
    bf16 = torch.bfloat16
    for cast, seen in ((True, bf16), (False, torch.float32)):
        precision = MixedPrecision(
            param_dtype=bf16,
            buffer_dtype=bf16,
            cast_forward_inputs=cast,
            cast_root_forward_inputs=False,
        )
        ours = FullyShardedDataParallel(
            Buffered(),
            device_mesh=mesh_of((2, 2)),
            auto_wrap_policy=ModuleWrapPolicy({Seeing}),
            mixed_precision=precision,
            device_id=torch.device(DEVICE),
        )
        out = ours(torch.ones(2, 6))
        assert ours.module.inner.module.seen == seen and out.dtype == bf16
        assert (
            ours.table.dtype == bf16 and (ours.table == 1).all() and ours.count.dtype == torch.int64
        )
    other = "cuda" if DEVICE == "cpu" else "cpu"
    with pytest.raises(ValueError, match=f"device_id is {other}"):
        FullyShardedDataParallel(
            Seeing(), device_mesh=mesh_of((2, 2)), device_id=torch.device(other, 0)
        )
    items = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()), device_mesh=mesh_of((2, 2))
    )
    assert items[1] is items.module[1] and items.module[0].weight.shape == (2, 2)

    net = NETS["even"]()
    ours = wrap(copy.deepcopy(net), mixed_precision=MixedPrecision(param_dtype=torch.float16))
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    before = {name: full(p).clone() for name, p in ours.named_parameters()}
    scaler.scale(ours(batch(net, 0, rank)).float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(before[name] - full(p), expected[name], rtol=2e-2, atol=2e-3)


class Named(dict):
    """A dict of another class, as libraries return them; no pytree."""


@dataclasses.dataclass
class Result:
    inner: Any = None
    other: Any = None


RESULTS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "dict's subclass": (lambda y: Named(out=y), lambda result: result["out"]),
    "OrderedDict's subclass": (
        lambda y: type("Ordered", (OrderedDict,), {})(out=y),
        lambda result: result["out"],
    ),
    "UserDict in a list": (lambda y: [None, UserDict(out=y)], lambda result: result[1]["out"]),
    "set": (lambda y: {y}, lambda result: next(iter(result))),
    "list's subclass": (lambda y: type("Items", (list,), {})([y]), lambda result: result[0]),
    "UserList": (lambda y: UserList([y]), lambda result: result[0]),
    "dataclass": (
        lambda y: Result(None, {"a": [Named(out=y)]}),
        lambda result: result.other["a"][0]["out"],
    ),
    "packed": (
        lambda y: nn.utils.rnn.pack_padded_sequence(y[None], [3], batch_first=True),
        lambda result: result.data,
    ),
}


class Returning(nn.Module):
    """Its backward needs the full parameters, which only what it returns announces."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(6, 6), kind

    def forward(self, x: torch.Tensor) -> Any:
        return RESULTS[self.kind][0](torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class TakingApart(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Returning(kind) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = RESULTS[part.kind][1](part(x))
        return self.head(x)


def _results_of_any_kind(rank: int) -> None:
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    for kind in RESULTS:
        torch.manual_seed(0)
        net = TakingApart(kind)
        expected = mean_grads(net, lambda n, r: loss_of(n, x[r]))
        face = copy.deepcopy(net)
        for module in (*face.parts, face):
            fully_shard(module, mesh=mesh_of((2, 2)), reshard_after_forward=True)
        for ours in (face, wrap(copy.deepcopy(net), policy=ModuleWrapPolicy({Returning}))):
            for _ in range(2):
                ours.zero_grad()
                loss_of(ours, x[rank]).backward()
                assert_close(grads(ours), expected)


def _converted_past_the_wrapper(rank: int) -> None:
    """``to`` and its kin of a plain module inside a unit: the unit follows, with the values that
    come after."""
    net = NETS["uneven"]()
    for make, runs_before in ((wrap, True), (shard, True), (wrap, False)):
        ours, plain = make(copy.deepcopy(net)), copy.deepcopy(net)
        if runs_before:
            loss_of(ours, batch(net, 0, rank)).backward()
            ours.zero_grad()
        ours.blocks[0].up.double()
        ours.blocks[0].up.float()
        (ours.module if make is wrap else ours).head.double()
        plain.head.double()
        with torch.no_grad():
            for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
                p.mul_(0.5)
                q.mul_(0.5)

        def loss(n: nn.Module, r: int) -> torch.Tensor:
            handle = n.head.register_forward_pre_hook(lambda _, args: (args[0].double(),))
            try:
                return loss_of(n, batch(net, 1, r))
            finally:
                handle.remove()

        loss(ours, rank).backward()
        assert ours.head.weight.dtype == ours.head.weight.grad.dtype == torch.float64
        assert_close(grads(ours), mean_grads(plain, loss))


def _given_initialisation(rank: int) -> None:
    def fill(module: nn.Module) -> None:
        module.to_empty(device=DEVICE, recurse=False)
        called.append(module)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            nn.init.constant_(tensor, rank + 1)

    for sync in (False, True):
        called: list[nn.Module] = []
        with torch.device("meta"):
            empty = Net(7, 13, 3)
        ours = wrap(empty, param_init_fn=fill, sync_module_states=sync)
        assert len(called) == len(set(called)) and {type(m) for m in called} >= {
            Net,
            Block,
            nn.Linear,
            nn.LayerNorm,
        }
        for name, p in ours.named_parameters():
            assert (p.to_local() == (1 if sync else rank + 1)).all(), name
        assert ours(torch.ones(1, 7)).isfinite().all()


def _more_settings(rank: int) -> None:
    net = NETS["uneven"]()
    once = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))

    def step(ours: nn.Module) -> dict[str, torch.Tensor | None]:
        ours.zero_grad()
        loss_of(ours, batch(net, 0, rank)).backward()
        return grads(ours)

    ours = shard(copy.deepcopy(net))
    seen: list[tuple[int, torch.dtype]] = []

    def triple(buffer: torch.Tensor) -> None:
        seen.append((buffer.ndim, buffer.dtype))
        buffer.mul_(3)

    ours.blocks[0].set_all_reduce_hook(triple)
    hooked = {
        name: 3 * grad if name.startswith("blocks.0.") else grad for name, grad in once.items()
    }
    assert_close(step(ours), hooked)
    assert seen == [(1, torch.float32)]
    with pytest.raises(ValueError, match="stream"):
        ours.set_all_reduce_hook(triple, stream=object())

    ours = shard(copy.deepcopy(net))
    ours.set_reshard_after_backward(False)
    ours.set_reshard_after_forward(False)
    for change in (0.0, 0.5):  # a changed parameter is seen after reshard
        for module in (ours, *ours.blocks):
            module.reshard()
        with torch.no_grad():
            for p, q in zip(ours.parameters(), net.parameters(), strict=True):
                p.add_(change), q.add_(change)
        assert_close(step(ours), mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r))))
    ours.set_reshard_after_backward(True)
    ours.set_reshard_after_forward(True)
    for _ in range(2):
        assert_close(step(ours), mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r))))
        assert all(isinstance(p, DTensor) for p in ours.parameters())


def _other_shapes_of_use(rank: int) -> None:
    """Several modules as one unit, parameters left out, conversions after wrapping, a mesh made
    from the hosts."""
    net = NETS["uneven"]()
    models = []
    for face in (fully_shard, torchs_fully_shard):
        model = copy.deepcopy(net)
        face([model.blocks[0].norm, model.blocks[0].up], mesh=mesh_of((2, 2)))
        face(list(model.blocks), mesh=mesh_of((2, 2)))
        models.append(face(model, mesh=mesh_of((2, 2))))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, batch(net, step, rank)).backward()
            optimizer.step()
    _assert_same_bits(*models)

    ours = copy.deepcopy(net)
    kept = ours.head.weight
    shard(ours, ignored_params={kept})
    assert ours.head.weight is kept and isinstance(ours.head.bias, DTensor)
    loss_of(ours, batch(net, 0, rank)).backward()
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))
    alone = copy.deepcopy(net)
    loss_of(alone, batch(net, 0, rank)).backward()
    expected["head.weight"] = alone.head.weight.grad  # nobody reduces it
    assert_close(grads(ours), expected)

    ours = shard(copy.deepcopy(net))
    loss_of(ours, batch(net, 0, rank)).backward()
    ours.to(torch.float64)
    wide = copy.deepcopy(net).double()
    ours.zero_grad()
    loss_of(ours, batch(net, 0, rank).double()).backward()
    assert all(p.dtype == p.grad.dtype == torch.float64 for p in ours.parameters())
    assert_close(grads(ours), mean_grads(wide, lambda n, r: loss_of(n, batch(net, 0, r).double())))

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    policy = ModuleWrapPolicy({Block})
    ours = FullyShardedDataParallel(
        copy.deepcopy(net), sharding_strategy=ShardingStrategy.HYBRID_SHARD, auto_wrap_policy=policy
    )
    assert tuple(ours.device_mesh.shape) == (2, 2)
    loss_of(ours, batch(net, 0, rank)).backward()
    assert_close(grads(ours), mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r))))


def _backward_hooks_read_parameters(rank: int) -> None:
    """Full parameters go as their gradients come; not where a user's hooks may read them."""
    torch.manual_seed(0)
    net = Net(256, 512, 3, blocks=2)  # weights large enough to go alone
    whole = {name: p.detach().clone() for name, p in net.named_parameters()}
    ours = shard(net)
    seen = []
    for name, module in ours.named_modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(
                lambda module, *_, name=name: seen.append(
                    torch.equal(module.weight, whole[f"{name}.weight"])
                )
            )
    x = batch(net, 0, rank).requires_grad_()
    loss_of(ours, x).backward()
    assert seen == [True] * 5


def test_around_a_step() -> None:
    run_checks(
        4,
        _backward_hooks_read_parameters,
        _results_of_any_kind,
        _retain_graph,
        _autocast_and_scaler,
        _half,
        _dtypes_of_buffers_inputs_and_scaled_gradients,
    )


def test_settings_and_construction() -> None:
    run_checks(
        4, _given_initialisation, _more_settings, _other_shapes_of_use, _converted_past_the_wrapper
    )


def test_compiled() -> None:
    run_checks(2, _compiled)
