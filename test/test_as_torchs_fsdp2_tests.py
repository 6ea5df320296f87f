"""Public behaviour that torch's own tests of FSDP2 pin, on both sides."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from ranks import run_checks
from sides import SIDES, assert_same, layers, sharded, whole
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from training import mesh_of

import torch_hsdp_ckpt as ours


def _kept_parameters_show(rank: int) -> None:
    """``test_param_registration_after_forward``: what is not freed after forward is there to be
    used, and gets a gradient."""
    grads = []
    for side in SIDES:
        model = sharded(side, layers(3))
        for _ in range(2):
            model.zero_grad()
            hidden = model(torch.full((2, 4), rank + 1.0))
            assert all(isinstance(p, DTensor) for p in model.parameters())  # in children alone
            hidden.sum().backward()
        head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        torch.manual_seed(1)
        for p in head.parameters():
            nn.init.normal_(p)
        side.fully_shard(head)
        for _ in range(2):
            hidden = head(torch.full((2, 4), rank + 1.0))
            assert not any(isinstance(p, DTensor) for p in head.parameters())
            assert head[1].weight.shape == (4, 4)
            loss = nn.functional.linear(hidden, head[1].weight).square().sum()
            loss.backward()
            assert all(isinstance(p, DTensor) for p in head.parameters())
        grads.append([whole(p.grad) for p in (*model.parameters(), *head.parameters())])
        head(torch.ones(2, 4))
        head.reshard()
        assert all(isinstance(p, DTensor) for p in head.parameters())
        head(torch.ones(2, 4))
        assert all(isinstance(v, DTensor) for v in head.state_dict().values())
        frees = side.fully_shard(layers(), reshard_after_forward=True)
        frees(torch.ones(2, 4)).sum().backward()
        frees(torch.ones(2, 4))
        assert all(isinstance(p, DTensor) for p in frees.parameters())
    assert_same(grads)


def _unshard_before_any_forward(rank: int) -> None:
    """``test_unshard_async``, ``test_unshard_without_lazy_init``."""
    grads = []
    for side in SIDES:
        model = sharded(side, layers())
        handle = model[1].unshard(async_op=True)
        model(torch.ones(2, 4)).sum().backward()
        handle.wait()
        model[1].reshard()
        grads.append([whole(p.grad) for p in model.parameters()])
    assert_same(grads)


def _part_after_whole(rank: int) -> None:
    """``test_non_root_forward_backward``."""
    grads = []
    for side in SIDES:
        model = sharded(side, layers(3))
        model(torch.ones(2, 4)).sum().backward()
        model.zero_grad()
        model[0](torch.full((2, 4), rank + 1.0)).sum().backward()
        assert model[1].weight.grad is None
        grads.append([whole(p.grad) for p in model[0].parameters()])
    assert_same(grads)


def _replaced_before_forward(rank: int) -> None:
    """``test_reset_sharded_param_in_lazy_init``."""
    for side in SIDES:
        model = side.fully_shard(nn.Linear(4, 4))
        model.weight = nn.Parameter(torch.ones_like(model.weight) * 2)
        model(torch.ones(2, 4)).sum().backward()
        model.reshard()
        assert torch.equal(whole(model.weight), torch.full((4, 4), 2.0))
        assert model.weight.grad is not None
    recurrent = ours.fully_shard(nn.LSTM(4, 4))  # which has a __setattr__ of its own
    recurrent.weight_ih_l0 = nn.Parameter(torch.ones_like(recurrent.weight_ih_l0))
    recurrent(torch.ones(2, 3, 4))[0].sum().backward()
    recurrent.reshard()
    assert torch.equal(whole(recurrent.weight_ih_l0), torch.ones(16, 4))
    model = ours.fully_shard(nn.Linear(4, 4))
    if rank == 2:
        model.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match=r"rank 2: .*weight of module .* was replaced"):
        model(torch.ones(2, 4))


class _Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.body, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, tokens: Tensor, skip_head: bool) -> Tensor:
        hidden = self.norm(self.body(self.embed(tokens)))
        return hidden if skip_head else self.head(hidden)


def _chunked_backward(model: Any, rank: int) -> None:
    hidden = model(torch.arange(8).view(2, 4) + rank // 2, skip_head=True)
    pieces = []
    for chunk in torch.chunk(hidden.detach(), 2, dim=1):
        chunk = chunk.contiguous().requires_grad_()
        model.head(chunk).square().sum().backward()
        pieces.append(chunk.grad)
    hidden.backward(torch.cat(pieces, dim=1))


def _chunked_loss(rank: int) -> None:
    """``test_partial_group_forward_then_standalone``: one unit of two modules, of which forward
    runs one; the other runs alone, in pieces, before the backward of the first. Beside one process,
    as torch 2.11's own wrapper fails."""
    plain = _Chunked()
    _chunked_backward(plain, rank)
    for p in plain.parameters():
        dist.all_reduce(p.grad)
    model = _Chunked()
    ours.fully_shard(model.body)
    ours.fully_shard([model.norm, model.head])
    ours.fully_shard(model)
    for _ in range(2):
        model.zero_grad()
        _chunked_backward(model, rank)
    grads = [whole(p.grad) for p in model.parameters()]
    torch.testing.assert_close(grads, [p.grad / 4 for p in plain.parameters()])


class _Pair(NamedTuple):
    x: Tensor
    y: Tensor


class _PairLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, pair: _Pair) -> _Pair:
        return _Pair(self.linear(pair.x), self.linear(pair.y))


def _structured_values(rank: int) -> None:
    """``test_structured_input_output``: named tuples in and out, cast on the way."""
    results = []
    for side in SIDES:
        torch.manual_seed(0)
        model = nn.Sequential(_PairLayer(), _PairLayer())
        policy = side.MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        sharded(side, model, mp_policy=policy)
        x = torch.linspace(0, 1, 8).view(2, 4)
        out = model(_Pair(x, 2 * x))
        assert type(out) is _Pair and out.x.dtype == torch.float32
        (out.x.sum() + out.y.sum()).backward()
        results.append([out.x, out.y, *(whole(p.grad) for p in model.parameters())])
    assert_same(results)


def _settings_of_parts(rank: int) -> None:
    """``test_gradient_accumulation``: of the root alone, and gradients zeroed in place."""
    grads = []
    for side in SIDES:
        model = sharded(side, layers(3))
        for _ in range(2):
            for micro in range(3):
                model.set_requires_gradient_sync(micro == 2, recurse=False)
                model[0].set_requires_gradient_sync(micro != 1)
                model.set_reshard_after_backward(micro == 2, recurse=False)
                model(torch.full((2, 4), rank + micro + 1.0)).square().sum().backward()
            grads.append([whole(p.grad).clone() for p in model.parameters()])
            model.zero_grad(set_to_none=False)
    assert_same([grads[:2], grads[2:]])


def _replicas_by_hook(rank: int) -> None:
    """``test_custom_hsdp_all_reduce_hook``: on a mesh of shards, the user's own all-reduce."""
    grads = []
    for side in SIDES:
        mesh = mesh_of((2, 2))
        shards = DeviceMesh.from_group(mesh.get_group("shard"), DEVICE)
        replicas = mesh.get_group("replicate")
        model = side.fully_shard(layers(), mesh=shards)
        model.set_all_reduce_hook(lambda g, group=replicas: _sum_over(g, group))
        model(torch.full((2, 4), rank + 1.0)).sum().backward()
        grads.append([p.grad.to_local() for p in model.parameters()])
    assert_same(grads)


def _sum_over(gradient: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(gradient, group=group)


def _composable_checkpointing(rank: int) -> None:
    """``test_train_parity_with_activation_checkpointing``, two forwards before one backward."""
    grads = []
    for side in SIDES:
        model = layers(3)
        for child in model.children():
            checkpoint(child)
        sharded(side, model)
        for _ in range(2):
            model.zero_grad()
            first = model(torch.full((2, 4), rank + 1.0))
            second = model(torch.full((2, 4), rank + 2.0))
            (first.sum() - second.square().sum()).backward()
        grads.append([whole(p.grad) for p in model.parameters()])
    assert_same(grads)


def _slices_are_plain(rank: int) -> None:
    """``test_fully_shard_cls``."""
    for side in SIDES:
        model = side.fully_shard(layers(3))
        assert isinstance(model, side.FSDPModule) and not isinstance(model[:2], side.FSDPModule)


def _writes_into_locals(rank: int) -> None:
    """``test_hsdp_broadcast_across_replicas``, ``test_rank0_broadcast_meta_device_init``."""
    outputs = []
    for side in SIDES:
        mesh = mesh_of((2, 2))
        model = side.fully_shard(layers(), mesh=mesh)
        for p in model.parameters():
            with torch.no_grad():
                p.to_local().fill_(float(rank))
                dist.broadcast(p.to_local(), group=mesh.get_group("replicate"), group_src=0)
        outputs.append(model(torch.ones(2, 4)))
    assert_same(outputs)


def _piecewise_loads_on_meta(rank: int) -> None:
    """``test_dp_state_dict_cpu_offload``: one tensor at a time, by hand."""
    outputs = []
    for side in SIDES:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        sharded(side, model)
        for name, value in layers().state_dict().items():
            target = model.state_dict()[name]
            piece = distribute_tensor(value, target.device_mesh, target.placements)
            model.load_state_dict({name: piece}, strict=False, assign=True)
        outputs.append(model(torch.ones(2, 4)))
    assert_same(outputs)


def _one_rank(rank: int) -> None:
    """``TestFullyShardWorldSize1``: nobody to talk to."""
    alone = DeviceMesh(DEVICE, [rank])
    model = ours.fully_shard(layers(), mesh=alone)
    with CommDebugMode() as counts:
        model(torch.ones(2, 4)).sum().backward()
    assert counts.get_total_counts() == 0


class _MixedGrads(nn.Module):
    """Calls units with and without gradients in turn, and changes results in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.trained, self.frozen = (nn.Linear(4, 4) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.frozen(nn.functional.relu(self.trained(x)))
            with torch.no_grad():
                x += nn.functional.relu(self.trained(x))
        return x


def _mixed_gradients(rank: int) -> None:
    """``test_multi_forward_mixed_requires_grad``; and what was frozen at its first forward."""
    grads = []
    for side in SIDES:
        model = sharded(side, _MixedGrads())
        for _ in range(2):
            model(torch.full((2, 4), rank + 1.0)).sum().backward()
        model.frozen.requires_grad_(True)
        model(torch.full((2, 4), rank + 1.0)).sum().backward()
        grads.append([whole(p.grad) for p in model.parameters()])
    assert_same(grads)


def _one_low_part(rank: int) -> None:
    """``test_float16_on_one_submodule``: one module computes in less, inputs have gradients."""
    results = []
    for side in SIDES:
        model = layers(3)
        low = side.MixedPrecisionPolicy(param_dtype=torch.float16, output_dtype=torch.float32)
        side.fully_shard(model[1], mp_policy=low)
        side.fully_shard(model)
        seen: dict[int, torch.dtype] = {}
        for i, child in enumerate(model.children()):
            child.register_forward_pre_hook(
                lambda module, args, i=i, seen=seen: seen.__setitem__(i, args[0].dtype)
            )
        x = torch.linspace(0, 1, 8).view(2, 4).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        assert out.dtype == x.grad.dtype == torch.float32
        results.append([x.grad, *(whole(p.grad) for p in model.parameters())])
    assert_same(results)


class _Shared(nn.Module):
    """One module under two names, and one weight in two modules; uneven."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.once = self.twice = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.twice(self.once(self.embed(tokens))))


def _shared_modules_and_weights(rank: int) -> None:
    """``test_train_shared_params_uneven_shard``, ``test_shared_module_and_shared_parameter``."""
    outcomes = []
    for side in SIDES:
        model = side.fully_shard(_Shared())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.arange(6).view(2, 3) + (rank > 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = model.state_dict()
        assert {"once.weight", "twice.weight", "embed.weight", "head.weight"} <= set(state)
        outcomes.append({name: whole(value) for name, value in state.items()})
    assert_same(outcomes)


class _WithoutInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)

    def forward(self) -> Tensor:
        return self.inner(torch.ones(2, 4))


def _without_inputs(rank: int) -> None:
    """``test_root_no_forward_inputs``."""
    grads = []
    for side in SIDES:
        model = sharded(side, _WithoutInputs())
        model().sum().backward()
        grads.append([whole(p.grad) for p in model.parameters()])
    assert_same(grads)


def _state_taken_once(rank: int) -> None:
    """``test_cached_state_dict``: it shows what later steps do."""
    for side in SIDES:
        model = sharded(side, layers())
        state = model.state_dict()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in model.state_dict().items():
            assert value.to_local().data_ptr() == state[name].to_local().data_ptr()


def _wrong_prefetches(rank: int) -> None:
    """``test_backward_misprefetch``: they change no number."""
    grads = []
    for side in SIDES:
        model = sharded(side, layers(4))
        model[3].set_modules_to_backward_prefetch([model[0]])
        model[2].set_modules_to_backward_prefetch([model[3]])
        model[0].set_modules_to_forward_prefetch([model[2], model[3]])
        for _ in range(2):
            model(torch.full((2, 4), rank + 1.0)).square().sum().backward()
        grads.append([whole(p.grad) for p in model.parameters()])
    assert_same(grads)


def _biases_alone(rank: int) -> None:
    """``test_train_mixed_requires_grad_per_group``: only biases train, frozen before or after."""
    for frozen_first in (True, False):
        grads = []
        for side in SIDES:
            model = layers(3)
            if frozen_first:
                _freeze_weights(model)
            sharded(side, model)
            if not frozen_first:
                _freeze_weights(model)
            for _ in range(2):
                model(torch.full((2, 4), rank + 1.0)).square().sum().backward()
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
            grads.append([whole(p.grad) for p in model.parameters() if p.requires_grad])
        assert_same(grads)


def _freeze_weights(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))


def _float8_beside_float32(rank: int) -> None:
    """``TestFullyShardMixedDtypeParam``: a frozen parameter of a dtype that nothing reduces."""
    for side in SIDES:
        model = layers(1)
        low = torch.arange(16).view(4, 4).to(torch.float8_e4m3fn)
        model[0].register_parameter("low", nn.Parameter(low, requires_grad=False))
        model[0].register_forward_hook(lambda module, args, out: out + module.low.float().sum())
        side.fully_shard(model)
        out = model(torch.zeros(2, 4))
        out.sum().backward()
        model.reshard()
        assert torch.allclose(out, model[0].bias.full_tensor() + low.float().sum())


def _torchs_clipping(rank: int) -> None:
    """``test_clip_grad_norm_1d``, ``_2d``: torch's own function on DTensors."""
    for norm_type in (1.0, 2.0, float("inf")):
        outcomes = []
        for side in SIDES:
            model = sharded(side, layers(), mesh=mesh_of((2, 2)))
            model(torch.full((2, 4), rank + 1.0)).square().sum().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5, norm_type)
            outcomes.append([whole(norm), *(whole(p.grad) for p in model.parameters())])
        assert_same(outcomes)


def test_fsdp2() -> None:
    run_checks(
        4,
        _kept_parameters_show,
        _unshard_before_any_forward,
        _part_after_whole,
        _replaced_before_forward,
        _chunked_loss,
        _structured_values,
        _settings_of_parts,
        _replicas_by_hook,
        _composable_checkpointing,
        _slices_are_plain,
        _writes_into_locals,
        _piecewise_loads_on_meta,
        _one_rank,
        _mixed_gradients,
        _one_low_part,
        _shared_modules_and_weights,
        _without_inputs,
        _state_taken_once,
        _wrong_prefetches,
        _biases_alone,
        _float8_beside_float32,
        _torchs_clipping,
    )
