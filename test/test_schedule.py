"""When wrapped modules gather, free and reduce: the order of the collectives, what stays in memory,
what backward waits for."""

import copy
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from device import cpu_only
from models import Net, batch
from ranks import memory_on_device_of, run_checks
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.profiler import ProfilerActivity, profile, record_function
from training import assert_close, full, grads, loss_of, mean_grads, mesh_of, wrap

from torch_hsdp_ckpt import BackwardPrefetch, fully_shard

ROWS = 64  # of piece 0; piece i has i + 1 times as many, which tells the gathers apart


def _mark(name: str) -> None:
    with record_function(f"mark {name}"):
        pass


class Piece(nn.Module):
    """Marks its forward (f), the moment when backward reaches it (o), and the one when its gradient
    is computed (v)."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.weight = nn.Parameter(torch.ones(ROWS * (index + 1), 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _mark(f"f{self.index}")
        value = self.weight * 1.0
        out = x + value.sum(0)
        for name, tensor in (("v", value), ("o", out)):
            if tensor.requires_grad:
                tensor.register_hook(lambda _, name=name: _mark(f"{name}{self.index}"))
        return out


def _pieces() -> nn.Sequential:
    return nn.Sequential(*[Piece(i) for i in range(4)])


def _order(
    model: nn.Module,
    passes: int = 2,
    reductions: bool = False,
    inputs: tuple = (),
    needs_grad: bool = False,
) -> str:
    """Marks, gathers (g) and ``reductions`` (r) of the last of so many passes, in the order in
    which they are issued."""
    for last in range(1, passes + 1):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            model(torch.ones(2, 4, requires_grad=needs_grad), *inputs).sum().backward()
        if last == passes:
            break
    found = []
    for event in sorted(profiler.events(), key=lambda e: e.time_range.start):
        if event.name.startswith("mark "):
            found.append(event.name.removeprefix("mark "))
        elif event.name == "gloo:recv":
            index, rest = divmod(
                event.input_shapes[0][0], ROWS // 2 * 4 * 4
            )  # bytes; a reduction's are floats, and flags
            if rest == 0:
                found.append(f"g{index - 1}")
            elif reductions:
                found.append(f"r{event.input_shapes[0][0] // (ROWS // 2 * 4) - 1}")
    return " ".join(found)


def _assert_order(model: nn.Module, expected: str, passes: int = 2) -> None:
    found = _order(model, passes)
    assert found == expected, found


@cpu_only("it reads the profile of Gloo's messages")
def _gathers_are_started_ahead(rank: int) -> None:
    forward = "g0 g1 f0 g2 f1 g3 f2 f3 "
    backwards = {
        BackwardPrefetch.BACKWARD_PRE: "o3 g2 v3 o2 g1 v2 o1 g0 v1 o0 v0",
        BackwardPrefetch.BACKWARD_POST: "o3 v3 g2 o2 v2 g1 o1 v1 g0 o0 v0",
        None: "o3 v3 o2 g2 v2 o1 g1 v1 o0 g0 v0",
    }
    for prefetch, backward in backwards.items():
        for ahead in (False, True):  # forward_prefetch asks for what is done anyway
            ours = wrap(
                _pieces(),
                (2,),
                policy=ModuleWrapPolicy({Piece}),
                backward_prefetch=prefetch,
                forward_prefetch=ahead,
            )
            _assert_order(ours, forward + backward)
    ours = wrap(_pieces(), (2,), policy=ModuleWrapPolicy({Piece}))
    _assert_order(
        ours, "g0 f0 g1 f1 g2 f2 g3 f3 o3 g3 g2 v3 o2 g1 v2 o1 g0 v1 o0 v0", passes=1
    )  # no pass to go by yet


def _pieces_sharded(**options) -> nn.Sequential:
    model = _pieces()
    for piece in model:
        fully_shard(piece, mesh=mesh_of((2,)), **options)
    return fully_shard(model, mesh=mesh_of((2,)), **options)


@cpu_only("it reads the profile of Gloo's messages")
def _gathers_are_started_as_told(rank: int) -> None:
    ours = _pieces_sharded()
    ours[0].set_modules_to_forward_prefetch([ours[2], ours[1]])
    ours[3].set_modules_to_backward_prefetch([ours[1]])
    ours[2].set_modules_to_backward_prefetch([ours[1], ours[0]])
    expected = "g0 g2 g1 f0 f1 g3 f2 f3 o3 g1 v3 o2 g2 g0 v2 o1 v1 o0 v0"
    _assert_order(ours, expected)
    ours.set_reshard_after_forward(False)
    _assert_order(ours, "g0 g2 g1 f0 f1 g3 f2 f3 o3 v3 o2 v2 o1 v1 o0 v0")


def _in_memory(units: Iterable) -> str:
    return "".join("x" if unit.core.is_unsharded else "." for unit in units)


def _what_forward_frees(rank: int) -> None:
    """Outermost unit first. Absent: all but what backward needs first, as with torch, which keeps
    the outermost one."""
    for given, expected in ((None, "x.x"), (True, "..."), (False, "xxx")):
        torch.manual_seed(0)
        net = Net(6, 10, 3)
        ours = copy.deepcopy(net)
        for block in ours.blocks:
            fully_shard(block, mesh=mesh_of((2,)), reshard_after_forward=given)
        fully_shard(ours, mesh=mesh_of((2,)), reshard_after_forward=given)
        units = [module._unit for module in (ours, *ours.blocks)]
        for _ in range(2):  # the first pass does not know which module will be the last one
            ours.zero_grad()
            loss = loss_of(ours, batch(net, 0, rank))
            held = _in_memory(units)
            loss.backward()
            assert _in_memory(units) == "..."
            assert_close(grads(ours), mean_grads(net, lambda n, r: loss_of(n, batch(n, 0, r))))
        assert held == expected, (given, held)
        with torch.no_grad():
            ours(batch(net, 0, rank))
        assert _in_memory(units) == "..."
        ours.set_reshard_after_forward(True)
        loss = loss_of(ours, batch(net, 0, rank))
        assert _in_memory(units) == "..."


def _memory_of_what_backward_skips(rank: int) -> None:
    """Units that no rank's backward reaches are gathered all the same, in case a peer's does; never
    all at once."""
    layers = 24
    net = nn.Sequential(
        *[nn.Linear(1024, 1024) for _ in range(layers)], nn.Linear(1024, 4)
    )  # 4 MiB each, but for the last
    for layer in net[:layers]:
        fully_shard(layer.requires_grad_(False), mesh=mesh_of((2,)))
    ours = fully_shard(net, mesh=mesh_of((2,)))

    def step() -> None:
        ours(torch.ones(2, 1024)).sum().backward()

    for _ in range(2):
        step()
    assert memory_on_device_of(step) < layers * (4 << 20) * 3 // 4


class _Cut(nn.Module):
    """Pieces; backward ends before the one with the index ``cut``."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(Piece(i) for i in range(8))

    def forward(self, x: torch.Tensor, cut: int) -> torch.Tensor:
        for piece in self.pieces:
            x = piece(x.detach() if piece.index == cut else x)
        return x


@cpu_only("it reads the profile of Gloo's messages")
def _what_backward_has_no_use_for(rank: int) -> None:
    """Frozen units that no rank's gradients pass through, and what a user has said so of."""
    forward = "g0 g1 f0 g2 f1 g3 f2 f3 "
    ours = _pieces_sharded()
    for piece in ours[:2]:
        piece.requires_grad_(False)
    _assert_order(ours, forward + "o3 g2 v3 o2 v2")
    ours = _pieces_sharded()
    for piece in ours[:2]:
        piece.requires_grad_(False)
    found = _order(ours, needs_grad=rank == 1)  # by one rank's they do
    assert found == forward + ("o3 g2 v3 o2 g1 v2 o1 g0 o0" if rank else "o3 g2 v3 o2 g1 v2 g0"), (
        found
    )
    ours = _pieces_sharded()
    ours[0].set_unshard_in_backward(False)
    _assert_order(ours, forward + "o3 g2 v3 o2 g1 v2 o1 v1 o0 v0")
    assert all(p.grad is not None for p in ours.parameters())
    ours[1].set_unshard_in_backward(False)
    ours[1].register_forward_hook(lambda module, _, out: out @ module.weight[:4])
    with pytest.raises(RuntimeError, match=r"1 \(Piece\) is used while it has no memory"):
        ours(torch.ones(2, 4, requires_grad=True)).sum().backward()


@cpu_only("it reads the profile of Gloo's messages")
def _what_one_rank_skips(rank: int) -> None:
    """The units that its peer's backward reaches it gathers and reduces too, in the peer's order,
    and no two reductions late: the peer would wait for it at each of them, and it would hold all of
    them in memory."""
    net = _Cut()
    ours = copy.deepcopy(net)
    for piece in ours.pieces:
        fully_shard(piece, mesh=mesh_of((2,)))
    fully_shard(ours, mesh=mesh_of((2,)))
    forward = "g0 g1 f0 g2 f1 g3 f2 g4 f3 g5 f4 g6 f5 g7 f6 f7 o7 g6 v7 r7 o6 g5 v6 r6 "
    reached = " ".join(f"o{i} g{i - 1} v{i} r{i}" if i else "o0 v0 r0" for i in range(5, -1, -1))
    skipped = "g4 g3 r5 g2 r4 g1 r3 g0 r2 r1 r0"
    found = _order(ours, reductions=True, inputs=(6 if rank else 0,))
    assert found == forward + (skipped if rank else reached), found
    ours.zero_grad()
    ours(torch.ones(2, 4), 6 if rank else 0).sum().backward()
    assert_close(
        grads(ours), mean_grads(net, lambda n, r: n(torch.ones(2, 4), 6 if r else 0).sum())
    )


def _not_the_last_backward(rank: int) -> None:
    torch.manual_seed(0)
    net = Net(6, 10, 3, blocks=1)
    store = dist.distributed_c10d._get_default_store()

    def micro(steps: int):
        return mean_grads(
            net, lambda n, r: sum(loss_of(n, batch(n, step, r)) for step in range(steps))
        )

    ours = copy.deepcopy(net)
    for module in (ours.blocks[0], ours):
        fully_shard(module, mesh=mesh_of((2,)), reshard_after_forward=False)
    ours.set_is_last_backward(False)  # before the first forward and after it
    for step in range(2):
        loss = loss_of(ours, batch(net, step, rank))
        if rank == 0:
            loss.backward()
            store.set(f"back {step}", "")
        else:  # would never get there if rank 0 waited for its reductions
            store.wait([f"back {step}"])
            loss.backward()
    ours.set_is_last_backward(True)
    loss_of(ours, batch(net, 2, rank)).backward()
    assert_close(grads(ours), micro(3))

    # Whoever looks at the sharded parameters before the last backward finds all gradients there.
    norm = nn.utils.get_total_norm([g for g in micro(2).values() if g is not None])
    for look in ("norm", "state_dict", "frozen", "zero_grad"):
        ours.zero_grad()
        ours.set_is_last_backward(False)
        for step in range(2):
            loss_of(ours, batch(net, step, rank)).backward()
        if look == "frozen":  # the parameters are bound anew
            ours.head.bias.requires_grad_(False)
            loss_of(ours, batch(net, 0, rank))
            for module in (ours.blocks[0], ours):
                module.reshard()  # what forward has kept is shown
            ours.head.bias.requires_grad_(True)
        elif look == "norm":
            wrapped = (
                nn.utils.clip_grad_norm_
            )  # torch's own, which knows nothing of this: after a look
            ours.state_dict()
            torch.testing.assert_close(full(wrapped(ours.parameters(), 1e9)), norm)
        elif look == "state_dict":
            ours.state_dict()
        else:
            ours.zero_grad()
            assert all(p.grad is None for p in ours.parameters())
            continue
        assert_close(grads(ours), micro(2))


def test_when_units_gather_free_and_reduce() -> None:
    run_checks(
        2,
        _gathers_are_started_ahead,
        _gathers_are_started_as_told,
        _what_forward_frees,
        _memory_of_what_backward_skips,
        _what_backward_has_no_use_for,
        _what_one_rank_skips,
        _not_the_last_backward,
    )
