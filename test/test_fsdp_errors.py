"""What goes wrong in and around a step: the error says what to do, and what was reduced stays right."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from models import NETS, Block, batch
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from training import assert_close, full, grads, loss_of, mean_grads, mesh_of, wrap

from torch_hsdp_ckpt import FullyShardedDataParallel


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


def _nothing_left_behind(rank: int) -> None:
    """A backward that raises midway: reductions that had been started do not meet those of the next one."""
    net = NETS["uneven"]()
    ours = wrap(copy.deepcopy(net))

    def fail(grad: torch.Tensor) -> None:
        raise KeyError("asked for")

    for step in range(3):  # more often than reductions may be in flight
        x = batch(net, step, rank).requires_grad_()
        x.register_hook(fail)  # the last gradient of all: every unit has been reduced, or is being so
        with pytest.raises(KeyError, match="asked for"):
            loss_of(ours, x).backward()
        ours.zero_grad()
        loss_of(ours, batch(net, step, rank)).backward()
        assert_close(grads(ours), mean_grads(net, lambda n, r, step=step: loss_of(n, batch(net, step, r))))
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
    """Units on two meshes and a parameter that the wrapper leaves alone: one norm, as of the whole gradients."""
    net = NETS["uneven"]()
    blocks, kept = net.blocks, net.blocks[1].up.bias
    blocks[0] = wrap(blocks[0], (4, 1))
    ours = wrap(net, (2, 2), policy=lambda **_: False, ignored_states=[kept])
    loss_of(ours, batch(NETS["uneven"](), 0, 0)).backward()  # one batch for all: the ignored gradient is the same everywhere
    whole = {name: grad.clone() for name, grad in grads(ours).items() if grad is not None}
    assert not isinstance(kept.grad, DTensor) and kept.grad is not None
    expected = nn.utils.get_total_norm(list(whole.values()))
    for norm_type in (2.0, float("inf")):
        torch.testing.assert_close(
            ours.clip_grad_norm_(1e9, norm_type), nn.utils.get_total_norm(list(whole.values()), norm_type)
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


def _checks(rank: int) -> None:
    for check in (_kept_gradients, _nothing_left_behind, _groups_are_made_once, _norms, _ignored, _refusals):
        try:
            check(rank)
        except BaseException as error:
            raise AssertionError(f"in {check.__name__}") from error


def test_after_errors_and_around_them() -> None:
    run_ranks(_checks, 4)
