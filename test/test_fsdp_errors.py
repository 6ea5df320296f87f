"""What goes wrong in and around a step: the error says what to do, and what was reduced stays
right."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import NETS, Block, batch
from ranks import run_checks
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint
from training import assert_close, full, grads, loss_of, mean_grads, mesh_of, wrap

from torch_hsdp_ckpt import FullyShardedDataParallel, ShardingStrategy, fully_shard


class EitherBlock(nn.Module):
    """Runs one of two blocks, the same on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(6, 10), Block(6, 10)

    def forward(self, x: torch.Tensor, use: str) -> torch.Tensor:
        return self.a(x) if use == "a" else self.b(x)


def _kept_gradients(rank: int) -> None:
    """What no_sync has kept of unit a is reduced by a backward that runs only unit b."""
    torch.manual_seed(0)
    net = EitherBlock()
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]

    def loss(n: nn.Module, r: int) -> torch.Tensor:
        return n(x[r], "a").square().mean() + n(x[r], "b").square().mean()

    ours = wrap(copy.deepcopy(net))
    for _ in range(2):
        ours.zero_grad()
        with ours.no_sync():
            ours(x[rank], "a").square().mean().backward()
        ours(x[rank], "b").square().mean().backward()
        assert_close(grads(ours), mean_grads(net, loss))


def _kept_gradients_of_changed_parameters(rank: int) -> None:
    """Unfreezing and converting in the middle of an accumulation lose nothing; freezing what has a
    gradient is refused."""
    net = NETS["uneven"]()
    net.head.bias.requires_grad_(False)
    for change in ("unfreeze", "convert"):
        ours, single = wrap(copy.deepcopy(net)), copy.deepcopy(net)
        dtype = torch.float64 if change == "convert" else torch.float32
        with ours.no_sync():
            loss_of(ours, batch(net, 0, rank)).backward()
        for r in range(4):
            (loss_of(single, batch(net, 0, r)) / 4).backward()
        for model in (ours, single):
            model.double() if change == "convert" else model.head.bias.requires_grad_(True)
        loss_of(ours, batch(net, 1, rank).to(dtype)).backward()
        for r in range(4):
            (loss_of(single, batch(net, 1, r).to(dtype)) / 4).backward()
        assert_close(grads(ours), {name: p.grad for name, p in single.named_parameters()})

    ours = wrap(copy.deepcopy(net))
    with ours.no_sync():
        loss_of(ours, batch(net, 0, rank)).backward()
    ours.head.weight.requires_grad_(False)
    with pytest.raises(
        RuntimeError,
        match=r"of unit \(outermost\) \(Net\) holds a gradient that has not been reduced",
    ):
        ours(batch(net, 0, rank))
    ours.zero_grad()
    loss_of(ours, batch(net, 1, rank)).backward()
    assert ours.head.weight.grad is None

    def fail(grad: torch.Tensor) -> None:
        raise KeyError("asked for")

    # A backward that raised has left gradients too, of half a unit. Those nobody wants.
    up = ours.blocks[1].up
    handle = up.register_forward_hook(lambda _, args, out: out.register_hook(fail) and None)
    with pytest.raises(KeyError, match="asked for"):
        loss_of(ours, batch(net, 0, rank)).backward()
    handle.remove()
    ours.zero_grad()
    ours.blocks[1].down.requires_grad_(False)
    loss_of(ours, batch(net, 1, rank)).backward()
    assert ours.blocks[1].down.weight.grad is None and ours.blocks[1].up.weight.grad is not None


def _zero_grad_of_what_waits(rank: int) -> None:
    """The model's zero_grad forgets what no_sync, or a backward without an all-reduce, has kept; a
    wrapper's inside its own."""
    net = NETS["uneven"]()
    once = mean_grads(net, lambda n, r: loss_of(n, batch(net, 1, r)))
    face = copy.deepcopy(net)
    for module in (*face.blocks, face):
        fully_shard(module, mesh=mesh_of((2, 2)))
    for set_to_none in (True, False):
        for keep in (face.set_requires_gradient_sync, face.set_requires_all_reduce):
            keep(False)
            loss_of(face, batch(net, 0, rank)).backward()
            keep(True)
            face.zero_grad(set_to_none)
            loss_of(face, batch(net, 1, rank)).backward()
            assert_close(grads(face), once)
            face.zero_grad()
    ours = wrap(copy.deepcopy(net))
    with ours.no_sync():
        loss_of(ours, batch(net, 0, rank)).backward()
    ours.blocks[1].zero_grad()
    loss_of(ours, batch(net, 1, rank)).backward()
    both = mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r)) + loss_of(n, batch(net, 1, r)))
    assert_close(
        grads(ours), {name: (once if name.startswith("blocks.1.") else both)[name] for name in both}
    )


def _nothing_left_behind(rank: int) -> None:
    """A backward that raises midway: reductions that had been started do not meet those of the next
    one."""
    net = NETS["uneven"]()
    ours = wrap(copy.deepcopy(net))

    def fail(grad: torch.Tensor) -> None:
        raise KeyError("asked for")

    for step in range(3):  # more often than reductions may be in flight
        x = batch(net, step, rank).requires_grad_()
        x.register_hook(
            fail
        )  # the last gradient of all: every unit has been reduced, or is being so
        with pytest.raises(KeyError, match="asked for"):
            loss_of(ours, x).backward()
        ours.zero_grad()
        loss_of(ours, batch(net, step, rank)).backward()
        assert_close(
            grads(ours), mean_grads(net, lambda n, r, step=step: loss_of(n, batch(net, step, r)))
        )
        ours.zero_grad()


def _groups_are_made_once(rank: int) -> None:
    net = NETS["even"]()
    mesh = mesh_of((2, 2))
    models = []
    counts = []
    for _ in range(3):
        models.append(FullyShardedDataParallel(copy.deepcopy(net), device_mesh=mesh))
        models[-1](batch(net, 0, rank))
        counts.append(len(dist.distributed_c10d._world.pg_map))
    assert counts == [counts[0]] * 3, counts


def _norms(rank: int) -> None:
    """Units on two meshes and a parameter that the wrapper leaves alone: one norm, as of the whole
    gradients."""
    net = NETS["uneven"]()
    blocks, kept = net.blocks, net.blocks[1].up.bias
    blocks[0] = wrap(blocks[0], (4, 1))
    ours = wrap(net, (2, 2), policy=lambda **_: False, ignored_states=[kept])
    loss_of(
        ours, batch(NETS["uneven"](), 0, 0)
    ).backward()  # one batch for all: the ignored gradient is the same everywhere
    whole = {name: grad.clone() for name, grad in grads(ours).items() if grad is not None}
    assert not isinstance(kept.grad, DTensor) and kept.grad is not None
    expected = nn.utils.get_total_norm(list(whole.values()))
    for norm_type in (2.0, float("inf")):
        torch.testing.assert_close(
            ours.clip_grad_norm_(1e9, norm_type),
            nn.utils.get_total_norm(list(whole.values()), norm_type),
        )
    norm = ours.clip_grad_norm_(0.25 * expected.item())
    assert type(norm) is torch.Tensor and norm.ndim == 0
    torch.testing.assert_close(norm, expected)
    for name, grad in grads(ours).items():
        torch.testing.assert_close(grad, 0.25 * whole[name], rtol=1e-4, atol=1e-6)


def _ignored(rank: int) -> None:
    """A module that ignored_states names is left alone by the policy too."""
    net = NETS["even"]()
    kept = net.blocks[0]
    ours = wrap(net, ignored_states=[kept])
    assert ours.module.blocks[0] is kept and not isinstance(kept.up.weight, DTensor)
    assert len(FullyShardedDataParallel.fsdp_modules(ours)) == 2


def _refusals(rank: int) -> None:
    odd = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex64, whose gradients are not reduced"):
        wrap(odd)
    odd.requires_grad_(False)
    wrap(odd)  # frozen: nothing to reduce

    net = NETS["even"]()
    ours = wrap(net)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            copied(ours)

    state = {k: torch.ones_like(v) for k, v in ours.state_dict().items()}
    state["calls"] = torch.ones(2, dtype=torch.int64)
    before = {name: full(p).clone() for name, p in ours.named_parameters()}
    with pytest.raises(RuntimeError, match=r'size mismatch for "calls"'):
        ours.load_state_dict(state)
    for name, p in ours.named_parameters():
        assert torch.equal(full(p), before[name]), name


def test_after_errors_and_around_them() -> None:
    checks = (_kept_gradients, _kept_gradients_of_changed_parameters, _zero_grad_of_what_waits)
    run_checks(4, *checks, _nothing_left_behind, _groups_are_made_once, _norms, _ignored, _refusals)


# -- one rank's own error, and ranks that part ways


def _ask(parameter: torch.Tensor) -> None:
    raise KeyError("asked for")


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(5, 6), Block(6, 10), nn.Linear(6, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.embedding(tokens)))


def _one_rank_fails(rank: int) -> None:
    """An error in taking one rank's gradients is raised there, when its peers have got what they
    wait for."""
    torch.manual_seed(0)
    net = Words()
    tokens = torch.tensor([1, 2, 4])
    ours = wrap(copy.deepcopy(net), policy=ModuleWrapPolicy({Block, nn.Embedding}))

    def loss() -> torch.Tensor:
        return ours(tokens).square().mean()

    loss().backward()
    expected = grads(ours)
    for case in ("a hook that raises", "a sparse gradient"):
        ours.zero_grad()
        if rank == 1 and case == "a hook that raises":
            handle = ours.module.head.weight.register_post_accumulate_grad_hook(_ask)
            with pytest.raises(KeyError, match="asked for"):
                loss().backward()
            handle.remove()
        elif rank == 1:
            ours.module.embedding.module.sparse = True
            with pytest.raises(
                RuntimeError, match=r"rank 1: the reduction of module embedding .* is sparse"
            ):
                loss().backward()
            ours.module.embedding.module.sparse = False
        else:
            loss().backward()
        got = grads(ours)
        if case == "a sparse gradient":  # this rank's part is missing there, and only there
            got.pop("embedding.weight")
        assert_close(got, {name: grad for name, grad in expected.items() if name in got})
    ours.zero_grad()
    loss().backward()
    assert_close(grads(ours), expected)


def _replaced(rank: int) -> None:
    net = NETS["uneven"]()
    ours = wrap(copy.deepcopy(net))
    loss_of(ours, batch(net, 0, rank))
    up = ours.module.blocks[0].module.up
    before = up.weight
    for change in (
        lambda: setattr(up, "weight", nn.Parameter(torch.zeros(13, 7))),
        lambda: delattr(up, "weight"),
    ):
        change()
        with pytest.raises(
            RuntimeError,
            match=r"parameter up.weight of module blocks.0 \(Block\) was replaced or removed",
        ):
            ours(batch(net, 0, rank))
        up.weight = before
    loss_of(ours, batch(net, 0, rank)).backward()
    assert_close(grads(ours), mean_grads(net, lambda n, r: loss_of(n, batch(net, 0, r))))


class Detaching(nn.Module):
    """A block whose result needs no gradient on some ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.detach = Block(6, 10), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        return x.detach() if self.detach else x


def _outputs_that_differ(rank: int) -> None:
    """Which outputs require gradients does not change what a rank gathers: ranks that differ in it
    stay in step."""
    torch.manual_seed(0)
    net = nn.Sequential(Detaching(), Detaching(), Detaching(), nn.Linear(6, 2))
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]

    def loss(n: nn.Module, r: int) -> torch.Tensor:
        for i, module in enumerate(m for m in n.modules() if isinstance(m, Detaching)):
            module.detach = i in ((), (0,), (0, 2), (1,))[r]
        return n(x[r]).square().mean()

    for kinds in ({Detaching}, {Detaching, nn.Linear}):
        ours = wrap(
            copy.deepcopy(net),
            policy=ModuleWrapPolicy(kinds),
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        )
        for _ in range(3):
            ours.zero_grad()
            loss(ours, rank).backward()
            assert_close(grads(ours), mean_grads(net, loss))


class Broken:
    """A pytree whose tensors can't be looked at."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


def _broken(broken: Broken) -> Any:
    raise KeyError("asked for")


class Property(nn.Module):
    """Returns an object that raises when somebody looks for tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.fail = Block(6, 10), False

    def forward(self, x: torch.Tensor) -> Any:
        out = self.block(x)
        return Broken(out) if self.fail else out


def _results_that_raise(rank: int) -> None:
    register_pytree_node(Broken, _broken, lambda values, context: Broken(*values))
    torch.manual_seed(0)
    net = nn.Sequential(Property(), nn.Linear(6, 2))
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    ours = wrap(copy.deepcopy(net), policy=ModuleWrapPolicy({Property, Block}))
    for fail in (True, False, True, False, False):
        ours.module[0].module.fail = fail
        ours.zero_grad()
        if fail:
            with pytest.raises(KeyError, match="asked for"):
                ours(x[rank])
            continue
        ours(x[rank]).square().mean().backward()
        assert_close(grads(ours), mean_grads(net, lambda n, r: n(x[r]).square().mean()))


def _frozen_is_freed(rank: int) -> None:
    """A unit with frozen parameters is freed when its inputs' gradients are there, not at the end
    of backward."""
    torch.manual_seed(0)
    net = nn.Sequential(*[Block(6, 10) for _ in range(4)])
    for i in (1, 2):
        net[i].up.requires_grad_(False)
    net[3].requires_grad_(False)
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]
    expected = mean_grads(net, lambda n, r: n(x[r]).square().mean())
    ours = wrap(copy.deepcopy(net))
    held: list[list[int]] = []

    def look(grad: torch.Tensor) -> None:
        held.append([i for i, w in enumerate(ours.module) if w._unit.core.is_unsharded])

    for reentrant in (None, True, False):
        ours.zero_grad()
        h = x[rank].clone().requires_grad_()
        h.register_hook(look)
        if reentrant is None:
            out = ours(h)
        else:
            out = checkpoint(ours, h, use_reentrant=reentrant)
        out.square().mean().backward()
        assert_close(grads(ours), expected)
    assert len(held) == 3
    for late in held:
        assert not {1, 2, 3} & set(late), held


def test_what_one_rank_does_leaves_its_peers_in_step() -> None:
    run_checks(
        4, _one_rank_fails, _replaced, _outputs_that_differ, _results_that_raise, _frozen_is_freed
    )
