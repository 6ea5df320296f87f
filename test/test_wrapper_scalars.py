"""Parameters without dimensions: replicated DTensors on every dimension of the mesh."""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Block
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from training import assert_close, full, grads, mean_grads, mesh_of, wrap

from torch_hsdp_ckpt import (
    FullyShardedDataParallel,
    MixedPrecision,
    fully_shard,
    load,
    save,
)


class Gated(nn.Module):
    """Parameters without dimensions: in a block and outside, a frozen one, one that only some ranks
    use."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Block(6, 10))
        self.inner[0].gate = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(6, 3)
        self.scale, self.some = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.25))
        self.fixed = nn.Parameter(torch.tensor(3.0), requires_grad=False)

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        x = self.head(self.inner(x)) * self.scale
        return x * self.fixed + self.some if use else x * self.fixed


def _without_dimensions(rank: int, directory: str) -> None:
    """Replicated DTensors: gradients averaged over the whole mesh, states as of any other
    parameter."""

    class GatedBlock(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.gate

    torch.manual_seed(0)
    net = Gated()
    net.inner[0].__class__ = GatedBlock
    x = [torch.randn(3, 6, generator=torch.Generator().manual_seed(r)) for r in range(4)]

    def loss(n: nn.Module, r: int) -> torch.Tensor:
        return n(x[r], r % 2 == 1).square().mean()

    expected = mean_grads(net, loss)
    single = copy.deepcopy(net)
    steps = torch.optim.AdamW(single.parameters(), lr=0.01)
    for _ in range(3):
        steps.zero_grad()
        torch.stack([loss(single, r) for r in range(4)]).mean().backward()
        steps.step()
    for shape in ((2, 2), (1, 4), (4, 1), (4,)):
        kinds = ModuleWrapPolicy({GatedBlock})
        ours = wrap(copy.deepcopy(net), shape, policy=kinds)
        face = copy.deepcopy(net)
        fully_shard(face.inner[0], mesh=mesh_of(shape))
        fully_shard(face, mesh=mesh_of(shape))
        for model in (face, ours):
            loss(model, rank).backward()
            assert_close(grads(model), expected)
            scale = dict(model.named_parameters())["scale"]
            assert scale.placements == (Replicate(),) * len(shape) and scale.to_local().shape == ()
            loss(model, rank).backward()  # adds
            assert_close(
                grads(model), {name: None if g is None else 2 * g for name, g in expected.items()}
            )
            foreach = model is ours
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=foreach)
            for _ in range(3):
                optimizer.zero_grad()
                loss(model, rank).backward()
                optimizer.step()
            for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(full(p), q.detach(), rtol=1e-4, atol=1e-5, msg=name)
            own = torch.stack([p.detach().to_local() for p in model.parameters() if p.ndim == 0])
            everyones = [torch.empty_like(own) for _ in range(4)]
            dist.all_gather(everyones, own)
            assert all(torch.equal(other, own) for other in everyones), (
                "the same bits on every rank"
            )
        loss(ours, rank).backward()
        norm = nn.utils.get_total_norm([g for g in grads(ours).values() if g is not None])
        torch.testing.assert_close(ours.clip_grad_norm_(1e9), norm)
        with FullyShardedDataParallel.summon_full_params(ours), torch.no_grad():
            assert ours.scale.shape == () and not isinstance(ours.scale, DTensor)
            ours.scale.fill_(7.0)
        assert full(ours.scale) == 7
        # Ours saves and stock torch loads, onto another mesh, and the other way round; also whole
        # state dicts.
        path = f"{directory}/{'x'.join(map(str, shape))}"
        state = {
            "model": ours.state_dict(),
            "optim": FullyShardedDataParallel.optim_state_dict(ours, optimizer),
        }
        save(state, checkpoint_id=path)
        other = wrap(copy.deepcopy(net), (2, 2), policy=kinds)
        into = {"model": other.state_dict()}
        dcp.load(into, checkpoint_id=path)
        other.load_state_dict(into["model"])
        assert full(other.scale) == 7
        dcp.save({"model": other.state_dict()}, checkpoint_id=f"{path}-stock")
        load(into, checkpoint_id=f"{path}-stock")
        with FullyShardedDataParallel.state_dict_type(other, StateDictType.FULL_STATE_DICT):
            whole = other.state_dict()
            assert whole["scale"].shape == () and whole["scale"] == 7
            whole["scale"] = torch.tensor(8.0)
            other.load_state_dict(whole)
        assert full(other.scale) == 8

    low = wrap(
        copy.deepcopy(net),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )
    low(x[rank], True).square().mean().backward()
    wide = mean_grads(net, lambda n, r: n(x[r], True).square().mean())
    assert low.scale.dtype == low.scale.grad.dtype == torch.float32
    torch.testing.assert_close(full(low.scale.grad), wide["scale"], rtol=2e-2, atol=1e-3)


def test_parameters_without_dimensions(tmp_path: Path) -> None:
    run_ranks(_without_dimensions, 4, str(tmp_path))
