"""Which tensors our own records hold, and how their bytes are brought into contiguous CPU
memory."""

import contextlib
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.nn.parameter import is_lazy

from .. import _C
from ..errors import CheckpointError

# Versions of torch differ in the dtypes that they have.
RECORD_DTYPES: dict[torch.dtype, str] = {
    getattr(torch, name): name for name in _C.record_dtypes() if hasattr(torch, name)
}


def local_of(tensor: Tensor) -> Tensor:
    """A DTensor's local tensor itself, of which ``to_local`` would return a view; a plain tensor is
    its own."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def dtensor_around(local: Tensor, spec: DTensorSpec) -> DTensor:
    """A DTensor with ``local`` itself inside, this rank's part.

    ``DTensor.from_local`` would put a view of it there, which can't be deep-copied or saved
    alone."""
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]


def is_plain(tensor: Tensor) -> bool:
    """Whether our own record holds all there is to a tensor: dense, of a dtype that has a record
    format, no subclass."""
    is_dense = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_nested
    return is_dense and tensor.dtype in RECORD_DTYPES


def is_plain_subclass(tensor: Tensor) -> bool:
    """Whether a tensor of a subclass is a dense one with a name of its own: its class changes
    neither how it is stored nor what its operations do with the storage."""
    cls = type(tensor)
    return (
        tensor.layout == torch.strided
        and tensor.dtype in RECORD_DTYPES
        and not tensor.is_nested
        and not hasattr(cls, "__tensor_flatten__")
        and cls.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def without_subclass(tensor: Tensor) -> Tensor:
    """The same memory as a plain tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


def why_not_saved(tensor: Tensor) -> str:
    """What a tensor is that no record of DCP's brings back, and what to do; "" for others."""
    if is_lazy(tensor):
        return "an uninitialized parameter has no values yet: run a forward pass first"
    if tensor.is_nested:
        return "a nested tensor is not saved: save its values and offsets, or its components"
    if tensor.layout != torch.strided:
        return (
            f"a tensor of layout {tensor.layout} is not saved: save its dense form, or its parts "
            "(such as indices and values)"
        )
    return ""


def row_major_on_cpu(tensor: Tensor) -> Tensor:
    """The tensor's elements, contiguous in CPU memory: itself if it is so already."""
    return tensor.cpu().resolve_conj().resolve_neg().contiguous()


def is_row_major_on_cpu(tensor: Tensor) -> bool:
    """Whether :func:`row_major_on_cpu` gives the tensor itself."""
    return (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def check_storage(tensor: Tensor, name: str) -> None:
    """Refuses a tensor without values, and one whose memory was freed under it, as FSDP frees full
    parameters: reading it would end the process."""
    if tensor.is_meta:
        raise CheckpointError(f"{name} is on the meta device and has no values")
    if tensor.layout != torch.strided or type(tensor) is not Tensor or not tensor.numel():
        return
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needed = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    if tensor.untyped_storage().size() < needed:
        raise CheckpointError(
            f"{name}: shape {list(tensor.shape)} needs {needed} bytes, its storage has "
            f"{tensor.untyped_storage().size()}; "
            "was its memory freed, as that of a sharded module's full parameters is?"
        )
    try:
        tensor.data_ptr()
    except RuntimeError as error:  # this package's own sharded modules free in another way
        raise CheckpointError(f"{name}: {error}") from None


def row_major_parts(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Parts of at most ``limit`` bytes that, one after the other, are the elements in row-major
    order."""
    if tensor.nbytes <= limit or tensor.dim() == 0:
        yield tensor
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), max(1, limit // tensor.itemsize))
    else:
        rows = max(1, limit * tensor.shape[0] // tensor.nbytes)
        for part in torch.split(tensor, rows):
            # A single row may be too large: it is divided along its own dimensions.
            inner = part.squeeze(0) if part.shape[0] == 1 else part
            yield from row_major_parts(inner, limit)


def scratch(size: int, huge: bool = False) -> Tensor:
    """``size`` bytes (one or more), page-aligned, that go back to the system with the tensor:
    malloc may keep a large block and put the next one elsewhere. ``huge``: of huge pages where the
    system has them, for memory that will be filled."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        with contextlib.suppress(OSError):  # a hint: a kernel without huge pages refuses it
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
