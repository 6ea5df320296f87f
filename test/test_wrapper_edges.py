"""Arguments and methods at their edges: groups of some of the ranks, buffers that are sent,
gradients that are written through ``summon_full_params``, methods that train, parameters that
tensor parallelism has placed."""

import copy
import functools
import gc
import inspect
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as torchs
from device import DEVICE
from models import NETS, Block, Net, batch
from ranks import run_checks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as torchs_register
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, lambda_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import assert_close, full, grads, loss_of, mean_grads, mesh_of, wrap

import torch_hsdp_ckpt
from torch_hsdp_ckpt import (
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
    StateDictType,
    fully_shard,
    register_fsdp_forward_method,
)

summon = FullyShardedDataParallel.summon_full_params


def _everywhere(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, tensor.contiguous(), group=group)
    return found


def _synchronised_buffers(rank: int) -> None:
    """Those of wrapped modules inside, without dimensions, not persistent, of integers; not what is
    ignored."""
    net = NETS["uneven"](seed=rank)
    net.blocks[0].register_buffer("running", torch.full((5,), float(rank + 1), dtype=torch.float64))
    net.blocks[1].register_buffer("strided", torch.full((3, 2), rank + 1.0).t())
    net.calls.fill_(rank + 10)
    net.scratch.fill_(rank + 1)
    kept = net.blocks[1].up.bias
    before = kept.detach().clone()
    ours = wrap(net, sync_module_states=True, ignored_states=[kept])
    buffers = dict(ours.named_buffers())
    assert set(buffers) == {"blocks.0.running", "blocks.1.strided", "calls", "scratch"}
    for name, buffer in buffers.items():
        assert (buffer == (10 if name == "calls" else 1)).all(), name
    assert buffers["calls"].dtype == torch.int64 and buffers["blocks.1.strided"].shape == (2, 3)
    for (name, p), q in zip(
        ours.named_parameters(), NETS["uneven"](seed=0).parameters(), strict=True
    ):
        assert torch.equal(full(p), before if name == "blocks.1.up.bias" else q), name


def _written_gradients(rank: int) -> None:
    net = NETS["uneven"]()
    for options in ({}, {"offload_to_cpu": True}):
        ours = wrap(copy.deepcopy(net))
        ours.head.bias.requires_grad_(False)
        loss_of(ours, batch(net, 0, rank)).backward()
        late = ours.blocks[0].up.bias.requires_grad_(False)  # which keeps the gradient that it has
        expected = {
            name: None if grad is None else grad.clone() for name, grad in grads(ours).items()
        }
        held = {name: p.grad for name, p in ours.named_parameters()}
        with summon(ours, with_grads=True, **options):
            for name, p in ours.named_parameters():
                if name == "head.bias":
                    assert p.grad is None
                    continue
                assert type(p.grad) is torch.Tensor and torch.equal(p.grad, expected[name]), name
                if name == "head.weight":
                    p.grad = torch.full_like(p, 2.0)  # another tensor in its place
                else:
                    p.grad.mul_(3)
        wanted = {name: 3 * grad for name, grad in expected.items() if grad is not None}
        wanted |= {"head.bias": None, "head.weight": torch.full_like(expected["head.weight"], 2.0)}
        assert_close(grads(ours), wanted)
        for name, p in ours.named_parameters():
            assert p.grad is held[name], "written in place: who holds the gradient sees it"
        with summon(ours, with_grads=True, writeback=False, **options):
            for p in ours.parameters():
                if p.grad is not None:
                    p.grad.zero_()
        assert_close(grads(ours), wanted)
        with summon(ours, **options):
            assert all(p.grad is None for p in ours.parameters())
        late.requires_grad_(True)
        loss_of(ours, batch(net, 0, rank)).backward()  # adds to what was written
        assert_close(
            grads(ours), {n: None if g is None else g + expected[n] for n, g in wanted.items()}
        )

    low = wrap(
        copy.deepcopy(net),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True),
    )
    low(batch(net, 0, rank)).float().square().mean().backward()
    with summon(low, with_grads=True):
        assert (
            low.head.weight.dtype == torch.float32 and low.head.weight.grad.dtype == torch.bfloat16
        )
        low.head.weight.grad.fill_(0.5)
    assert (
        full(low.head.weight.grad) == 0.5
    ).all() and low.head.weight.grad.dtype == torch.bfloat16


def _some_ranks(rank: int) -> None:
    """``process_group`` of some ranks: each half trains a model of its own, as one process would on
    the half's batches."""
    net = NETS["uneven"]()
    halves = [dist.new_group(ranks) for ranks in ((0, 2), (1, 3))]
    group, ranks = halves[rank % 2], (rank % 2, rank % 2 + 2)
    single = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(single.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        torch.stack([loss_of(single, batch(net, step, r)) for r in ranks]).mean().backward()
        optimizer.step()
    for strategy in (None, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        ours = FullyShardedDataParallel(
            copy.deepcopy(net) if rank < 2 else NETS["uneven"](seed=5),
            process_group=group,
            sharding_strategy=strategy,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            sync_module_states=True,
        )
        assert ours.device_mesh.mesh.flatten().tolist() == list(ranks)
        whole = strategy is ShardingStrategy.NO_SHARD
        assert tuple(ours.device_mesh.shape) == ((2, 1) if whole else (2,))
        assert ours.head.weight.to_local().shape[0] == (3 if whole else 2 if rank < 2 else 1)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=0.01)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(ours, batch(net, step, rank)).backward()
            optimizer.step()
        norm = nn.utils.get_total_norm([p.grad for p in single.parameters()])
        torch.testing.assert_close(ours.clip_grad_norm_(1e9), norm, rtol=1e-4, atol=1e-6)
        with summon(ours, writeback=False):
            for (name, p), q in zip(
                ours.named_parameters(), single.named_parameters(), strict=True
            ):
                torch.testing.assert_close(p, q[1], rtol=1e-4, atol=1e-5, msg=name)
        with FullyShardedDataParallel.state_dict_type(ours, StateDictType.FULL_STATE_DICT):
            state = ours.state_dict()
            states = FullyShardedDataParallel.optim_state_dict(ours, optimizer)
            assert all(type(value) is torch.Tensor for value in state.values())
            assert states["state"]["head.weight"]["exp_avg"].shape == (3, 7)
            optimizer.load_state_dict(
                FullyShardedDataParallel.optim_state_dict_to_load(ours, optimizer, states)
            )
            with pytest.raises(RuntimeError, match=r'Missing key: "head\.bias"'):
                ours.load_state_dict(
                    {k: v for k, v in state.items() if k != "head.bias" or rank >= 2}
                )
            ours.load_state_dict({k: torch.ones_like(v) for k, v in state.items()})
        assert all((p.to_local() == 1).all() for p in ours.parameters())
    with pytest.raises(
        ValueError, match=f"^rank {rank}: module Net: this rank is not in process_group"
    ):
        FullyShardedDataParallel(copy.deepcopy(net), process_group=halves[1 - rank % 2])


def _lambda_policy(rank: int) -> None:
    net = NETS["uneven"]()
    policy = functools.partial(
        lambda_auto_wrap_policy, lambda_fn=lambda module: isinstance(module, (Block, nn.LayerNorm))
    )
    ours = wrap(copy.deepcopy(net), policy=policy)
    inside = [type(w.module) for w in FullyShardedDataParallel.fsdp_modules(ours)]
    assert inside == [Net, Block, nn.LayerNorm, Block, nn.LayerNorm]
    loss_of(ours, batch(net, 0, rank)).backward()
    assert_close(grads(ours), mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r))))


class Scoring(Net):
    """Two ways in, and one that calls the other."""

    def score(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"score": self.head(self.blocks[0](x)).square().sum() * scale}

    def both(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(x, scale=0.5)["score"] + self(x).sum()


def _forward_methods(rank: int) -> None:
    """Methods that were registered train to the last bit as under torch's FSDP2, with forward in
    between."""
    torch.manual_seed(0)
    net = Scoring(7, 13, 3)
    seen: list[list[torch.Tensor]] = []
    for face, register in (
        (fully_shard, register_fsdp_forward_method),
        (torchs_fully_shard, torchs_register),
    ):
        model = copy.deepcopy(net)
        for block in model.blocks:
            face(block, mesh=mesh_of((2, 2)))
        face(model, mesh=mesh_of((2, 2)))
        for name in ("score", "both"):
            register(model, name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        values = []
        for step, call in enumerate((model.score, model, model.both, model.score)):
            optimizer.zero_grad()
            out = call(batch(net, step, rank))
            loss = out["score"] if isinstance(out, dict) else out.sum()
            loss.backward()
            assert all(isinstance(p, DTensor) for p in model.parameters())
            values += [
                loss.detach(),
                *(torch.zeros(()) if p.grad is None else full(p.grad) for p in model.parameters()),
            ]
            optimizer.step()
        seen.append([*values, *(full(p) for p in model.parameters())])
    assert len(seen[0]) == len(seen[1]) and all(map(torch.equal, *seen))
    with pytest.raises(ValueError, match="no method nothing"):
        register_fsdp_forward_method(fully_shard(nn.Linear(2, 2), mesh=mesh_of((2, 2))), "nothing")
    plain = Scoring(7, 13, 3)
    register_fsdp_forward_method(plain, "score")
    assert "score" not in plain.__dict__


def _dtypes_that_nothing_computes_in(rank: int) -> None:
    net = NETS["even"]()
    for dtypes in ({"param_dtype": torch.int8}, {"reduce_dtype": torch.float8_e5m2}):
        (dtype,) = dtypes.values()
        message = (
            f"^rank {rank}: module Net: mixed precision in {dtype} is not supported: pass "
            "torch.float64"
        )
        with pytest.raises(ValueError, match=message):
            wrap(net, mixed_precision=MixedPrecision(**dtypes))
        with pytest.raises(ValueError, match=message):
            fully_shard(net, mesh=mesh_of((2, 2)), mp_policy=MixedPrecisionPolicy(**dtypes))
    assert type(net) is Net and not any(isinstance(p, DTensor) for p in net.parameters())


def _tensor_parallel(rank: int) -> None:
    """Parameters that torch's parallelize_module has placed are sharded by both faces alike;
    ignored, they compute as they did."""
    mesh = init_device_mesh(DEVICE, (2, 2), mesh_dim_names=("data", "tensor"))
    net = NETS["even"]()

    def parallel() -> Net:
        model = copy.deepcopy(net)
        return parallelize_module(
            model,
            mesh["tensor"],
            {"blocks.0.up": ColwiseParallel(), "blocks.0.down": RowwiseParallel()},
        )

    outcomes = []
    for wrapped in (
        FullyShardedDataParallel(parallel(), device_mesh=mesh["data"]),
        fully_shard(parallel(), mesh=mesh["data"]),
    ):
        loss_of(wrapped, batch(net, 0, mesh["data"].get_local_rank())).backward()
        outcomes.append(grads(wrapped))
    assert all(torch.equal(outcomes[0][name], grad) for name, grad in outcomes[1].items())
    model = parallel()
    placed = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert len(placed) == 4
    ours = FullyShardedDataParallel(
        model, device_mesh=mesh["data"], ignored_states=list(placed.values())
    )
    row = mesh["data"].get_local_rank()
    loss_of(ours, batch(net, 0, row)).backward()
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r // 2)))
    loss_of(net, batch(net, 0, row)).backward()
    expected |= {
        name: p.grad for name, p in net.named_parameters() if name in placed
    }  # nobody reduces it
    for name, p in ours.named_parameters():
        assert (
            p is placed.get(name, p)
            and p.device_mesh == mesh["tensor" if name in placed else "data"]
        ), name
    assert_close(grads(ours), expected)


def _changing_the_import(rank: int) -> None:
    """What a script takes from torch.distributed.fsdp is here under its name, with the same
    arguments; or says what to do."""
    assert all(hasattr(torch_hsdp_ckpt, name) for name in torchs.__all__)
    assert set(torch_hsdp_ckpt.__all__) >= set(torchs.__all__)
    for face in ("FSDPModule", "FullyShardedDataParallel"):
        ours, theirs = getattr(torch_hsdp_ckpt, face), getattr(torchs, face)
        for name in vars(theirs):
            if name.startswith("_") or not callable(getattr(theirs, name)):
                continue
            assert hasattr(ours, name), f"{face}.{name}"
            asked, taken = (
                inspect.signature(getattr(of, name)).parameters for of in (theirs, ours)
            )
            assert list(asked) == list(taken), f"{face}.{name}"
    for ours, theirs in (
        (FullyShardedDataParallel, torchs.FullyShardedDataParallel),
        (fully_shard, torchs.fully_shard),
    ):
        asked, taken = inspect.signature(theirs).parameters, inspect.signature(ours).parameters
        assert list(asked) == list(taken)[: len(asked)]

    net = NETS["uneven"]()
    once = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))
    ours = copy.deepcopy(net)
    for module in (*ours.blocks, ours):
        fully_shard(module, mesh=mesh_of((2, 2)))
    with pytest.raises(TypeError, match=f"^rank {rank}: module Linear: dp_mesh_dims is a Data"):
        fully_shard(nn.Linear(2, 2), mesh=mesh_of((2, 2)), dp_mesh_dims=("replicate", "shard"))

    def fail(grad: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("in the middle of a backward")

    out = ours(batch(net, 0, rank))
    out.register_hook(fail)
    with pytest.raises(ArithmeticError):
        out.square().mean().backward()
    ours.reset_iter_state()
    assert all(isinstance(p, DTensor) and p.grad is None for p in ours.parameters())
    ours.set_reduce_scatter_unused_params(True)
    ours.set_separate_reduce_scatter_group()
    ours.set_post_optim_event(None)
    ours.set_reduce_scatter_divide_factor(2.0)  # of the root unit's alone: the head
    loss_of(ours, batch(net, 0, rank)).backward()
    assert_close(grads(ours), {n: 2 * g if n.startswith("head") else g for n, g in once.items()})


def _used_model(rank: int) -> FullyShardedDataParallel:
    """A model that was trained, loaded, and refused a load."""
    net = NETS["even"]()
    ours = wrap(net)
    optimizer = torch.optim.Adam(ours.parameters())
    loss_of(ours, batch(net, 0, rank)).backward()
    optimizer.step()
    state = FullyShardedDataParallel.optim_state_dict(ours, optimizer)
    FullyShardedDataParallel.optim_state_dict_to_load(ours, optimizer, state)
    with summon(ours):
        pass
    ours.load_state_dict(ours.state_dict())

    def refuse(*_: object) -> None:
        raise ValueError("refused")

    ours.head.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="refused"):
        ours.load_state_dict(ours.state_dict())
    return ours


def _freed_at_once(rank: int) -> None:
    """A deleted model's memory is free before the garbage collector comes."""
    gc.collect()
    gc.disable()
    try:
        ours = _used_model(rank)
        remaining = [weakref.ref(ours), *map(weakref.ref, ours.parameters())]
        del ours
        assert [reference() for reference in remaining] == [None] * len(remaining)
    finally:
        gc.enable()


def test_edges_of_arguments_and_methods() -> None:
    run_checks(
        4,
        _synchronised_buffers,
        _written_gradients,
        _some_ranks,
        _lambda_policy,
        _forward_methods,
        _tensor_parallel,
        _dtypes_that_nothing_computes_in,
        _changing_the_import,
        _freed_at_once,
    )
