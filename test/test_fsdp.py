"""Training under FullyShardedDataParallel: the numbers of torch's FSDP2 and of one process,
whatever the graph looks like."""

import copy
import functools
import os

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from models import NETS, Block, Net, batch
from ranks import run_checks, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, Replicate, Shard
from training import assert_close, full, grads, loss_of, mean_grads, wrap, wrap_fsdp2

from torch_hsdp_ckpt import BackwardPrefetch, FullyShardedDataParallel, ShardingStrategy

HYBRID, FULL = ShardingStrategy.HYBRID_SHARD, ShardingStrategy.FULL_SHARD


# -- the same numbers


def _train(model: nn.Module, net: Net, rank: int, device: str, steps: int = 10) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(net, step, rank).to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _same_bits_as_fsdp2(rank: int, device: str, shape: tuple[int, int]) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    for make in NETS.values():
        plain = make()
        reference, ours = wrap_fsdp2(make(), shape, device), wrap(make(), shape, device)
        assert _train(ours, plain, rank, device) == _train(reference, plain, rank, device)
        expected = dict(reference.named_parameters())
        assert [name for name, _ in ours.named_parameters()] == list(expected)
        for name, p in ours.named_parameters():
            assert p.placements == (Replicate(), Shard(0)), name
            assert torch.equal(p.to_local(), expected[name].to_local()), name


def test_training_is_fsdp2s_to_the_last_bit() -> None:
    run_ranks(_same_bits_as_fsdp2, 4, DEVICE, (2, 2))


@pytest.mark.gpu
def test_training_is_fsdp2s_to_the_last_bit_on_nccl() -> None:
    run_ranks(_same_bits_as_fsdp2, 1, "cuda", (1, 1), backend="nccl")


@pytest.mark.gpu
def test_training_is_fsdp2s_to_the_last_bit_on_cuda() -> None:
    run_ranks(_same_bits_as_fsdp2, 4, "cuda", (2, 2), backend="cpu:gloo,cuda:gloo")


def _one_process(net: Net, steps: int = 10) -> tuple[nn.Module, list[float]]:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        parts = [loss_of(net, batch(net, step, rank)) for rank in range(dist.get_world_size())]
        optimizer.zero_grad()
        torch.stack(parts).mean().backward()
        optimizer.step()
        losses.append(parts[dist.get_rank()].item())
    return net, losses


def _within_rounding(rank: int) -> None:
    strategies = {
        (1, 4): [HYBRID],
        (4, 1): [HYBRID],
        (2, 2): [ShardingStrategy._HYBRID_SHARD_ZERO2],
        (4,): [FULL, ShardingStrategy.SHARD_GRAD_OP],
    }
    for make in NETS.values():
        single, losses = _one_process(make())
        expected = {name: p.detach() for name, p in single.named_parameters()}
        for shape, kinds in strategies.items():
            reference = wrap_fsdp2(make(), shape)
            _train(reference, single, rank, DEVICE)
            for strategy in kinds:
                ours = wrap(make(), shape, sharding_strategy=strategy)
                torch.testing.assert_close(
                    _train(ours, single, rank, DEVICE), losses, rtol=1e-4, atol=1e-5
                )
                for (name, p), q in zip(
                    ours.named_parameters(), reference.parameters(), strict=True
                ):
                    torch.testing.assert_close(full(p), full(q), rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(full(p), expected[name], rtol=1e-4, atol=1e-4)


def test_other_meshes_and_strategies_train_within_rounding() -> None:
    """A shard group of one (4x1) included: it still averages over the replicas."""
    run_ranks(_within_rounding, 4)


# -- graphs that are not a plain chain


class Branches(nn.Module):
    """Two blocks, of which a call may leave out either, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(6, 10), Block(6, 10)
        self.own = nn.Parameter(torch.ones(5, 6))
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, use: str) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        out = x @ self.own.t() if "o" in use else x[:, :5]
        if "a" in use:
            out = out + a[:, :5]
        return out + b[:, :5] if "b" in use else out


def _unused(rank: int) -> None:
    torch.manual_seed(0)
    net = Branches()
    x = [
        torch.randn(3, 6, generator=torch.Generator().manual_seed(r), requires_grad=True)
        for r in range(4)
    ]
    # By rank: which parts the loss depends on. "": on no parameter at all.
    for uses in (
        ["abo", "abo", "abo", "abo"],
        ["a", "b", "o", "ab"],
        ["a", "a", "a", "a"],
        ["o", "ao", "", "o"],
    ):
        expected = mean_grads(net, lambda n, r, uses=uses: n(x[r], uses[r]).square().mean())
        ours = wrap(copy.deepcopy(net))
        for _ in range(2):  # the second step has gathers started ahead
            ours.zero_grad()
            ours(x[rank], uses[rank]).square().mean().backward()
            assert_close(grads(ours), expected)
        assert ours.module.never.grad is None


def _frozen_and_toggled(rank: int) -> None:
    net = NETS["uneven"]()
    net.blocks[0].requires_grad_(False)
    net.blocks[1].up.requires_grad_(False)
    ours = wrap(copy.deepcopy(net))
    for flag in (False, True, False):
        net.blocks[1].down.requires_grad_(flag)
        ours.module.blocks[1].module.down.requires_grad_(flag)
        ours.zero_grad()
        loss_of(ours, batch(net, 0, rank)).backward()
        assert_close(grads(ours), mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r))))


def _evaluation(rank: int) -> None:
    net = NETS["uneven"]()
    ours = wrap(copy.deepcopy(net))
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with context():
            out = ours(batch(net, 0, rank))
            assert not out.requires_grad
        # A step in between: nothing gathered for evaluation may be used after it.
        loss_of(ours, batch(net, 1, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            whole = NETS["uneven"](seed=5)
            for (_, p), q in zip(ours.named_parameters(), whole.parameters(), strict=True):
                q.copy_(full(p))
            assert torch.equal(ours(batch(net, 2, rank)), whole(batch(net, 2, rank)))


def _accumulation(rank: int) -> None:
    net = NETS["uneven"]()

    def both(n: nn.Module, r: int) -> torch.Tensor:
        return loss_of(n, batch(net, 0, r)) + loss_of(n, batch(net, 1, r))

    expected = mean_grads(net, both)
    ours = wrap(copy.deepcopy(net))
    held = []
    for _ in range(2):
        ours.zero_grad()
        loss_of(ours, batch(net, 0, rank)).backward()
        loss_of(ours, batch(net, 1, rank)).backward()
        assert_close(grads(ours), expected)

        ours.zero_grad()
        with ours.no_sync():
            loss_of(ours, batch(net, 0, rank)).backward()
        assert all(p.grad is None for p in ours.parameters())
        loss_of(ours, batch(net, 1, rank)).backward()
        assert_close(grads(ours), expected)

        ours.zero_grad()
        first, second = loss_of(ours, batch(net, 0, rank)), loss_of(ours, batch(net, 1, rank))
        first.backward()
        # Somebody keeps a gradient: the next backward must not write into it.
        held.append([(p.grad, full(p.grad)) for p in ours.parameters()])
        ours.zero_grad()
        second.backward()
        for grad, value in held[-1]:
            assert torch.equal(full(grad), value)
        assert_close(grads(ours), mean_grads(net, lambda n, r: loss_of(n, batch(net, 1, r))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(6, 10), Block(6, 10)
        self.own = nn.Parameter(torch.full((6,), 0.5))

    def forward(self, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        return {"out": [self.a(self.b(self.a(x)) * self.own), x]}


def _called_twice(rank: int) -> None:
    torch.manual_seed(0)
    net = Twice()
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]

    def once(n: nn.Module, r: int) -> torch.Tensor:
        return n(x[r])["out"][0].square().mean()

    def both(n: nn.Module, r: int) -> torch.Tensor:
        return once(n, r) + n(2 * x[r])["out"][0].square().mean()

    for prefetch in (BackwardPrefetch.BACKWARD_PRE, BackwardPrefetch.BACKWARD_POST, None):
        ours = wrap(copy.deepcopy(net), backward_prefetch=prefetch)
        for _ in range(2):
            for loss in (once, both):
                ours.zero_grad()
                loss(ours, rank).backward()
                assert_close(grads(ours), mean_grads(net, loss))


class Failing(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.fail = net, ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net(x)
        if self.fail == "forward":
            raise KeyError("asked for")
        if self.fail == "backward":
            x.register_hook(self._raise)
        return x

    @staticmethod
    def _raise(grad: torch.Tensor) -> None:
        raise KeyError("asked for")


def _exceptions(rank: int) -> None:
    net = NETS["uneven"]()
    expected = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)))
    ours = wrap(Failing(copy.deepcopy(net)))
    for where in ("forward", "backward", "forward"):
        ours.module.fail = where
        with pytest.raises(KeyError, match="asked for"):
            loss_of(ours, batch(net, 0, rank)).backward()
        assert all(
            isinstance(p, DTensor)
            for p in ours.state_dict(keep_vars=True).values()
            if isinstance(p, nn.Parameter)
        )
        ours.module.fail = ""
        ours.zero_grad()
        loss_of(ours, batch(net, 0, rank)).backward()
        assert_close({k.removeprefix("net."): v for k, v in grads(ours).items()}, expected)


def _after_a_backward_that_raised(rank: int) -> None:
    """The gradients that reached the shards before the error are cleared by the model as by its
    optimizer."""

    def fail(parameter: torch.Tensor) -> None:
        raise KeyError("asked for")

    net = NETS["uneven"]()
    ours = wrap(copy.deepcopy(net))
    hook = ours.module.head.weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(KeyError, match="asked for"):
        loss_of(ours, batch(net, 0, rank)).backward()
    hook.remove()
    ours.zero_grad()
    loss_of(ours, batch(net, 0, rank)).backward()
    assert_close(grads(ours), mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r))))


def test_after_a_backward_that_raised() -> None:
    run_ranks(_after_a_backward_that_raised, 4)


def _mixed_dtypes_and_shared(rank: int) -> None:
    """float64 beside float32 in one unit, one parameter in two places of it, an LSTM (which keeps
    its own list of weights)."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.tied, self.wide = (
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 3, dtype=torch.float64),
            )
            self.tied.weight = self.first.weight
            self.lstm = nn.LSTM(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(self.lstm(self.tied(torch.tanh(self.first(x))))[0].double())

    torch.manual_seed(0)
    net = Odd()
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    ours = wrap(copy.deepcopy(net))
    assert ours.module.tied.weight is ours.module.first.weight
    for _ in range(2):
        ours.zero_grad()
        ours(x[rank]).square().mean().backward()
        assert_close(grads(ours), mean_grads(net, lambda n, r: n(x[r]).square().mean()))


def _conversions(rank: int) -> None:
    net = NETS["uneven"]()
    ours = wrap(copy.deepcopy(net))
    loss_of(ours, batch(net, 0, rank)).backward()
    ours.double()
    wide = copy.deepcopy(net).double()
    assert all(
        p.dtype == torch.float64 and p.grad.dtype == torch.float64 for p in ours.parameters()
    )
    ours.zero_grad()
    loss_of(ours, batch(net, 0, rank).double()).backward()
    assert_close(grads(ours), mean_grads(wide, lambda n, r: loss_of(n, batch(net, 0, r).double())))
    norm = nn.utils.get_total_norm([g for g in grads(ours).values() if g is not None])
    torch.testing.assert_close(ours.clip_grad_norm_(0.5 * norm.item()), norm)
    torch.testing.assert_close(
        nn.utils.get_total_norm([g for g in grads(ours).values() if g is not None]),
        0.5 * norm,
        rtol=1e-5,
        atol=1e-5,
    )


def test_graphs_that_are_no_plain_chain() -> None:
    checks = (
        _unused,
        _frozen_and_toggled,
        _evaluation,
        _accumulation,
        _called_twice,
        _exceptions,
    )
    run_checks(4, *checks, _mixed_dtypes_and_shared, _conversions)


# -- construction


def _construction(rank: int) -> None:
    net = NETS["even"]
    policy = size_based_auto_wrap_policy
    small = FullyShardedDataParallel(
        net(), auto_wrap_policy=lambda *args, **kwargs: policy(*args, min_num_params=200, **kwargs)
    )
    assert small.sharding_strategy is FULL and small.device_mesh.ndim == 1
    assert len(FullyShardedDataParallel.fsdp_modules(small)) == 3  # two blocks and the root
    assert FullyShardedDataParallel.fsdp_modules(small, root_only=True) == [small]
    assert (
        small.head is small.module.head and small.blocks[0].up is small.module.blocks[0].module.up
    )

    layers = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block})
    by_layer = FullyShardedDataParallel(net(), auto_wrap_policy=layers)
    assert FullyShardedDataParallel.fsdp_modules(by_layer) == [by_layer, *by_layer.blocks]
    loss_of(by_layer, batch(net(), 0, rank)).backward()
    assert_close(grads(by_layer), mean_grads(net(), lambda n, r: loss_of(n, batch(n, 0, r))))

    ignoring = net()
    kept = ignoring.blocks[0]
    ours = wrap(ignoring, ignored_modules=[kept])
    assert all(not isinstance(p, DTensor) for p in kept.parameters())
    assert isinstance(ours.module.head.weight, DTensor)

    different = net(seed=rank)
    synced = wrap(different, sync_module_states=True)
    for (name, p), q in zip(synced.named_parameters(), net(seed=0).parameters(), strict=True):
        assert torch.equal(full(p), q), name

    tied = nn.Sequential(Block(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].up.weight
    cube = init_device_mesh(DEVICE, (2, 2, 1), mesh_dim_names=("a", "b", "c"))
    crossed = [
        [dist.new_group(ranks) for ranks in pairs] for pairs in (((0, 1), (2, 3)), ((0, 3), (1, 2)))
    ]
    no_mesh = tuple(
        next(g for g in groups if rank in dist.get_process_group_ranks(g)) for groups in crossed
    )
    half = DeviceMesh(DEVICE, [0, 1])
    wrong = [
        (lambda: wrap(tied), "Linear", "shared with another wrapped module"),
        (lambda: wrap(ours.module), r"\w+", "is a DTensor on .*wrap it once"),
        (lambda: wrap(net(), sharding_strategy=FULL), "Net", "FULL_SHARD does not fit a 2-D"),
        (
            lambda: wrap(net(), (4,), sharding_strategy=HYBRID),
            "Net",
            "HYBRID_SHARD does not fit a 1-D",
        ),
        (lambda: wrap(net(), sharding_strategy=ShardingStrategy.NO_SHARD), "Net", "NO_SHARD"),
        (
            lambda: wrap(net(), process_group=dist.group.WORLD),
            "Net",
            "pass device_mesh or process_group, not both",
        ),
        (lambda: wrap(nn.ModuleList([nn.Linear(2, 2)])), "ModuleList", "it has no forward"),
        (
            lambda: FullyShardedDataParallel(net(), device_mesh=cube),
            "Net",
            "device_mesh has 3 dimensions",
        ),
        (
            lambda: FullyShardedDataParallel(net(), sharding_strategy=HYBRID),  # 3 ranks a host
            "Net",
            "HYBRID_SHARD without device_mesh",
        ),
        (
            lambda: FullyShardedDataParallel(net(), no_mesh),
            "Net",
            "the pair of process groups makes no mesh",
        ),
        (
            lambda: FullyShardedDataParallel(net(), no_mesh, FULL),
            "Net",
            "FULL_SHARD takes one process group",
        ),
        (
            lambda: FullyShardedDataParallel(net(), no_mesh[0], HYBRID),
            "Net",
            "HYBRID_SHARD needs two process groups",
        ),
    ]
    if rank in (2, 3):
        wrong.append(
            (
                lambda: FullyShardedDataParallel(net(), device_mesh=half),
                "Net",
                "this rank is not in device_mesh",
            )
        )
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    for make, module, message in wrong:
        with pytest.raises(ValueError, match=f"^rank {rank}: module {module}: .*{message}"):
            make()


def test_construction() -> None:
    run_ranks(_construction, 4)


def test_without_a_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        FullyShardedDataParallel(nn.Linear(2, 2))
