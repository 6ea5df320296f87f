"""A user's own collectives and memory for them, by torch FSDP2's ``Comm`` protocol
(``torch/distributed/fsdp/_fully_shard/_fsdp_api.py``)."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Comm(Protocol):
    """``allocate(size, dtype=, device=)`` gives memory of ``size`` elements; a call sends:
    ``comm(output_tensor=, input_tensor=, group=, async_op=False)``, of a reduce-scatter with
    ``op=`` as well, which is AVG or SUM. It may return a Work."""

    allocate: Callable[..., torch.Tensor]

    def __call__(self, **arguments: Any) -> dist.Work | None: ...


class UnitComm:
    """What one unit's gathers or reduce-scatters among the ranks of ``group`` are sent by.
    ``comm``: None sends as ever. ``allocate``: as ``Comm.allocate``."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        allocate: Callable[..., torch.Tensor],
        comm: Comm | None = None,
        is_reduction: bool = False,
    ) -> None:
        self._group, self._allocate, self._comm = group, allocate, comm
        self._is_reduction = is_reduction

    @property
    def sends(self) -> bool:
        """Whether the collectives are a user's too."""
        return self._comm is not None

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a collective. ValueError for what can't hold it."""
        memory = self._allocate((numel,), dtype=dtype, device=device)
        fits = isinstance(memory, torch.Tensor) and memory.numel() == numel
        if not (fits and memory.dtype == dtype and memory.device == device):
            raise ValueError(
                f"rank {dist.get_rank()}: {self._allocate!r} was asked for {numel} elements of "
                f"{dtype} on {device}, and gave {_described(memory)}"
            )
        if not memory.is_contiguous():
            raise ValueError(f"{self._allocate!r} gave a tensor that is not contiguous")
        return memory.view(-1)

    def run(self, output: torch.Tensor, input: torch.Tensor, average: bool) -> None:
        """The collective, over when this returns: for the current stream, on the CPU for the
        host."""
        assert self._comm is not None
        arguments: dict[str, Any] = {
            "output_tensor": output,
            "input_tensor": input,
            "group": self._group,
            "async_op": False,
        }
        if self._is_reduction:
            arguments["op"] = dist.ReduceOp.AVG if average else dist.ReduceOp.SUM
        work = self._comm(**arguments)
        if work is not None:
            work.wait()


def on_stream(hook: Callable[[torch.Tensor], None], stream: Any) -> Callable[[torch.Tensor], None]:
    """``hook`` on ``stream``, behind what the current one has been given, which goes on behind
    it."""

    def call(averages: torch.Tensor) -> None:
        current = torch.get_device_module(averages.device.type).current_stream(averages.device)
        stream.wait_stream(current)
        with torch.get_device_module(averages.device.type).stream(stream):
            hook(averages)
        current.wait_stream(stream)

    return call


def _described(memory: Any) -> str:
    if not isinstance(memory, torch.Tensor):
        return f"a {type(memory).__name__}"
    return f"{tuple(memory.shape)} of {memory.dtype} on {memory.device}"


def allocator_of(group: dist.ProcessGroup) -> Callable[..., torch.Tensor]:
    """The backend's own memory, which it may send without a copy; torch's where it has none."""

    def allocate(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        backend: Any = group._get_backend(device)
        if not backend.supports_tensor_alloc(device):
            return torch.empty(size, dtype=dtype, device=device)
        memory: torch.Tensor = backend.allocate_tensor(size[0], dtype=dtype, device=device)
        return memory

    return allocate


def symmetric_memory(group: dist.ProcessGroup, backend: str) -> Callable[..., torch.Tensor]:
    """torch's symmetric memory, for what the ranks of ``group`` send each other. Collective."""
    import torch.distributed._symmetric_memory as symm_mem

    symm_mem.set_backend(backend)  # type: ignore[arg-type]
    dist.barrier(group=group)  # the communicator has to be there

    def allocate(size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        pool = symm_mem.get_mem_pool(device)
        with torch.get_device_module(device).use_mem_pool(pool):
            return torch.empty(size, dtype=dtype, device=device)

    return allocate
