"""FSDP2's gather extensions: tensor subclasses that say themselves what is gathered of them, float8
weights say. The protocol is that of torch's ``_fsdp_param.py``."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import DeviceMesh

from .. import _C
from ..common.agreement import problems_of_all_ranks
from ..common.tensors import local_of
from .callbacks import weak_callback
from .layout import ParameterLayout
from .slots import RegisteredParameter

_BEFORE, _AFTER = "fsdp_pre_all_gather", "fsdp_post_all_gather"
_RELEASES = "fsdp_should_release_all_gather_outputs_after_post_all_gather"


def is_extended(parameter: Tensor) -> bool:
    """Whether the parameter's own class gathers it. ValueError, without its name, where that has
    half of the protocol only."""
    local = local_of(parameter)
    has_before, has_after = hasattr(local, _BEFORE), hasattr(local, _AFTER)
    if has_before != has_after:
        raise ValueError(f"has one of {_BEFORE} and {_AFTER}, which go together")
    if hasattr(local, _RELEASES) and not has_before:
        raise ValueError(f"has {_RELEASES}, but not {_BEFORE} and {_AFTER}")
    return has_before


def shard_of_extended(full: Tensor, dim: int, shards: int, rank: int) -> Tensor:
    """This rank's shard of a tensor of a class of its own: ``torch.chunk``'s, at the beginning of
    memory for a whole chunk, as torch's FSDP2 makes it."""
    chunks = torch.chunk(full, shards, dim=dim)
    padded = full.new_zeros(chunks[0].size())
    if rank >= len(chunks):
        return padded.narrow(dim, 0, 0)
    own = chunks[rank]
    shard = padded.narrow(dim, 0, own.size(dim))
    shard.copy_(own)
    return shard


class ExtendedParameter:
    """Gathers one parameter. ``sharded``: gives it as it is now; ``full_size``: of this rank's part
    where other mesh dimensions cut it too; ``module``, ``policy``: what the extension is told.

    ``start`` and ``finish`` are collective over the shards."""

    def __init__(
        self,
        sharded: Callable[[], Tensor],
        layout: ParameterLayout,
        full_size: torch.Size,
        shard_mesh: DeviceMesh,
        module: nn.Module,
        policy: Any,
    ) -> None:
        self._sharded = sharded
        self._layout = layout
        self._full_size = full_size
        self._full_stride = torch.empty(full_size, device="meta").stride()
        self._mesh = shard_mesh
        self._module = module
        self._policy = policy
        self._inputs: Sequence[Tensor] = ()  # of the gather that is under way
        self._outputs: list[Tensor] = []  # of the gathers, the same ones each time
        self._inner: Sequence[Tensor] = ()  # what the full tensor holds besides
        self._input_sizes: list[torch.Size] = []
        self._metadata: Any = None
        self._works: list[dist.Work] = []
        self.full: nn.Parameter | None = None

    def check(self) -> None:
        """Raises ValueError, on all ranks of the shards, if the extension raises on any, or gives
        tensors that do not gather: the others would wait for its."""
        problems = []
        try:
            self._asked(local_of(self._sharded()))
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        problems = problems_of_all_ranks(self._mesh, problems)
        if problems:
            raise ValueError(
                f"rank {dist.get_rank()}: module {type(self._module).__name__}: a parameter of "
                f"shape {tuple(self._full_size)} can't be gathered: {'; '.join(problems)}"
            )

    def start(self) -> None:
        """Begins a gather of what the extension gives."""
        local = local_of(self._sharded())
        inputs, self._metadata = self._asked(local)
        self._input_sizes = [each.size() for each in inputs]
        self._inputs = [each.reshape(-1) for each in inputs]
        if not self._outputs:
            self._outputs = [each.new_empty(each.numel() * self._mesh.size()) for each in inputs]
        for output, given in zip(self._outputs, self._inputs, strict=True):
            _allocate(output)
            work = dist.all_gather_into_tensor(
                _bytes_of(output), _bytes_of(given), group=self._mesh.get_group(), async_op=True
            )
            if work is not None:
                self._works.append(work)

    def _asked(self, local: Any) -> tuple[Sequence[Tensor], Any]:
        before = local.fsdp_pre_all_gather
        if len(inspect.signature(before).parameters) == 1:
            answer: tuple[Sequence[Tensor], Any] = before(self._mesh)
            return answer
        inputs, metadata = before(
            self._mesh, self._full_size, self._full_stride, self._module, self._policy
        )
        padded = self._padded_size()
        wrong = [tuple(each.size()) for each in inputs if each.size() != padded]
        if local.size() != padded and wrong:
            raise ValueError(
                f"{type(local).__name__}.{_BEFORE} gave tensors of {wrong}: where shards are "
                f"uneven it has to give those of a whole chunk, {tuple(padded)}"
            )
        return inputs, metadata

    def _padded_size(self) -> torch.Size:
        size, dim = list(self._full_size), self._layout.dim
        size[dim] = _C.shard_rows(size[dim], self._mesh.size(), 0).count
        return torch.Size(size)

    def finish(self) -> None:
        """The full parameter can be used on the current stream."""
        self._join()
        outputs = tuple(
            output.view(-1, *size[1:])
            for output, size in zip(self._outputs, self._input_sizes, strict=True)
        )
        local: Any = local_of(self._sharded())
        dtype = self._policy.param_dtype or local.dtype
        if self.full is None:
            self._make_full(*local.fsdp_post_all_gather(outputs, self._metadata, dtype))
        else:
            for inner in self._inner:
                _allocate(inner)
            local.fsdp_post_all_gather(outputs, self._metadata, dtype, out=self.full)
        self._metadata = None
        if getattr(local, _RELEASES, bool)():
            self._free_outputs()

    def _join(self) -> None:
        """What has been started is over, for the current stream. The gathers' stream, to which the
        memory goes back, does not wait for that."""
        for work in self._works:
            work.wait()
        self._works = []
        for tensor in (*self._inputs, *self._outputs):
            if tensor.device.type != "cpu":
                tensor.record_stream(torch.get_device_module(tensor.device).current_stream())
        self._inputs = ()

    def _make_full(self, full: Tensor, inner: Sequence[Tensor]) -> None:
        self._inner = inner
        full = torch.as_strided(full, self._full_size, self._full_stride, storage_offset=0)
        needs_gradient = self._sharded().requires_grad
        self.full = nn.Parameter(self._layout.full_around(full), requires_grad=needs_gradient)

    def free(self) -> None:
        """Gives back what the full parameter has for memory."""
        self._join()
        self._free_outputs()
        for inner in self._inner:
            inner.untyped_storage().resize_(0)

    def _free_outputs(self) -> None:
        for output in self._outputs:
            output.untyped_storage().resize_(0)

    def forget(self) -> None:
        """What follows has other sizes or dtypes."""
        self.full = None
        self._outputs, self._inner = [], ()


class ExtendedParameters:
    """Those of one unit, by number."""

    def __init__(self, members: dict[int, ExtendedParameter]) -> None:
        self._members = members

    def __contains__(self, index: int) -> bool:
        return index in self._members

    def for_core(self) -> _C.Extension | None:
        """What gathers them with all others; None if there are none."""
        if not self._members:
            return None
        return _C.Extension(
            start=weak_callback(self._start),
            finish=weak_callback(self._finish),
            free=weak_callback(self._free),
        )

    def full_at(self, index: int) -> nn.Parameter:
        """The full parameter, without memory. It is gathered once for that: collective."""
        member = self._members[index]
        member.forget()
        with torch.no_grad():
            member.check()
            member.start()
            member.finish()
            member.free()
        assert member.full is not None
        return member.full

    def without(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``tensors``, one for each parameter of the unit, with empty plain ones in place of
        these."""
        return [
            torch.empty(0, dtype=each.dtype, device=each.device) if i in self else each
            for i, each in enumerate(tensors)
        ]

    def with_own(self, tensors: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """``tensors`` with what ``own`` has of these."""
        return [own[i] if i in self else each for i, each in enumerate(tensors)]

    def _start(self) -> None:
        with torch.no_grad():
            for member in self._members.values():
                member.start()

    def _finish(self) -> None:
        with torch.no_grad():
            for member in self._members.values():
                member.finish()

    def _free(self) -> None:
        for member in self._members.values():
            member.free()


def extended_among(
    registered: Sequence[RegisteredParameter],
    layouts: Sequence[ParameterLayout],
    mesh: DeviceMesh,
    policy: Any,
    sharded_at: Callable[[int], Tensor],
) -> ExtendedParameters:
    """Those of ``registered``, parameters of one unit on ``mesh``, that gather themselves.
    ``sharded_at``: gives a sharded parameter by its number."""
    names = mesh.mesh_dim_names
    shards = mesh if names is None else mesh[names[-1]]
    members = {}
    for i, each in enumerate(registered):
        if is_extended(each.parameter):
            size, module = local_of(each.parameter).size(), each.slots[0].module
            sharded = functools.partial(sharded_at, i)
            members[i] = ExtendedParameter(sharded, layouts[i], size, shards, module, policy)
    return ExtendedParameters(members)


def _bytes_of(tensor: Tensor) -> Tensor:
    """Backends need not know the dtype to gather: Gloo knows none of eight bits but integers."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _allocate(tensor: Tensor) -> None:
    """Memory for a tensor whose storage has been resized to nothing. Autograd takes no note."""
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.untyped_storage().size() != nbytes:
        with _unsafe_preserve_version_counter(tensor):
            tensor.untyped_storage().resize_(nbytes)
