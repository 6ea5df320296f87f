"""Rules of torch's kinds: tensors from storages that the file holds, dtypes, devices, generators.
A tensor is made by ``set_`` on checked numbers; no class of a user's has a say in it."""

import collections
import math
from typing import Any

import torch
import torch._utils
import torch.serialization
from torch import Tensor

from ...errors import CheckpointError
from .object_table import (
    Arguments,
    Bounds,
    Function,
    MalformedError,
    Table,
    are,
    are_sizes,
    expect,
    show,
)

_Parameter = torch.nn.parameter.Parameter
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_QSCHEMES = ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")
_GENERATOR_BYTES = 5000  # of the CPU's, whose state is as long
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


def add_torch_kinds(table: Table) -> None:
    for name, dtype in _DTYPES.items():
        table.names[f"torch.{name}"] = dtype
    for name in _QSCHEMES:
        table.names[f"torch.{name}"] = getattr(torch, name)
    for cls in (torch.Size, torch.device, Tensor, torch.Generator):
        table.add_class(cls, f"torch.{cls.__name__}")
    table.add_class(_Parameter, "torch.nn.Parameter")
    for tensor_class in torch._tensor_classes:
        table.add_function(f"{tensor_class.__module__}.{tensor_class.__name__}")
    _add_descriptions(table)
    _add_strided(table)
    _add_parameters(table)
    _add_other_layouts(table)
    _add_return_types(table)


def _add_descriptions(table: Table) -> None:
    @table.on_call(torch.Size)
    def _size(bounds: Bounds, arguments: Arguments) -> torch.Size:
        fits = len(arguments) == 1 and are(arguments, tuple, list)
        expect(fits and are_sizes(tuple(arguments[0])), torch.Size, arguments)
        bounds.spend(len(arguments[0]))
        return torch.Size(arguments[0])

    @table.on_call(torch.device)
    def _device(bounds: Bounds, arguments: Arguments) -> torch.device:
        fits = len(arguments) in (1, 2) and are(arguments[:1], str) and are(arguments[1:], int)
        expect(fits, torch.device, arguments)
        try:
            return torch.device(*arguments)
        except RuntimeError as error:
            device = show(arguments[0])
            raise CheckpointError(f"it needs a device that this torch has not: {device}") from error

    @table.on_call(table.add_function("torch.serialization._get_layout"))
    def _layout(bounds: Bounds, arguments: Arguments) -> torch.layout:
        fits = len(arguments) == 1 and are(arguments, str) and arguments[0] in _LAYOUTS
        expect(fits, "torch.serialization._get_layout", arguments)
        return _LAYOUTS[arguments[0]]

    @table.on_call(torch.Generator)
    def _generator(bounds: Bounds, arguments: Arguments) -> torch.Generator:
        expect(len(arguments) == 1 and are(arguments, torch.device), torch.Generator, arguments)
        bounds.spend(_GENERATOR_BYTES if arguments[0].type == "cpu" else 0)
        try:
            return torch.Generator(arguments[0])
        except (RuntimeError, AssertionError) as error:
            raise CheckpointError(f"it needs a device that is not here: {error}") from error

    @table.on_state(torch.Generator)
    def _set_generator(bounds: Bounds, made: torch.Generator, state: Any) -> None:
        """(seed, offset, state)"""
        fits = type(state) is tuple and len(state) == 3 and type(state[2]) is Tensor
        fits = fits and type(state[0]) is int and are(state[1:2], int, type(None))
        expect(fits, torch.Generator, (state,))
        made.manual_seed(state[0])
        if state[1] is not None:
            made.set_offset(state[1])
        made.set_state(state[2].cpu())


def _strided(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor on a storage; MalformedError if it would reach beyond."""
    if type(storage) is not torch.storage.TypedStorage:
        raise MalformedError(f"makes a tensor of a {type(storage).__name__}")
    _check_shape(size, stride, offset)
    untyped = storage._untyped_storage
    dtype = dtype or storage.dtype
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * dtype.itemsize > untyped.nbytes():
        raise MalformedError("makes a tensor larger than its storage")
    return torch.empty((0,), dtype=dtype, device=untyped.device).set_(untyped, offset, size, stride)


def _check_shape(size: Any, stride: Any, offset: Any = 0) -> None:
    fits = are_sizes(size) and are_sizes(stride) and are_sizes((offset,))
    if not fits or len(size) != len(stride) or math.prod(size) >= 1 << 62:
        raise MalformedError("makes a tensor of a shape that none has")


def _add_strided(table: Table) -> None:
    utils = "torch._utils._rebuild_"

    @table.on_call(*map(table.add_function, (utils + "tensor", utils + "tensor_v2")))
    def _tensor(bounds: Bounds, arguments: Arguments) -> Tensor:
        """(storage, offset, size, stride[, requires grad, hooks[, metadata]])"""
        expect(len(arguments) in (4, 6, 7), utils + "tensor_v2", arguments)
        tensor = _strided(*arguments[:4])
        _set_grad(tensor, arguments[4:5])
        _set_bits(tensor, arguments[6:])
        return tensor

    @table.on_call(table.add_function(utils + "tensor_v3"))
    def _tensor_of_dtype(bounds: Bounds, arguments: Arguments) -> Tensor:
        """The same with a dtype before the metadata."""
        fits = len(arguments) in (7, 8) and type(arguments[6]) is torch.dtype
        expect(fits, utils + "tensor_v3", arguments)
        storage, offset, size, stride = arguments[:4]
        tensor = _strided(storage, offset, size, stride, arguments[6])
        _set_grad(tensor, arguments[4:5])
        _set_bits(tensor, arguments[7:])
        return tensor

    @table.on_call(table.add_function(utils + "meta_tensor_no_storage"))
    def _meta(bounds: Bounds, arguments: Arguments) -> Tensor:
        fits = len(arguments) == 4 and type(arguments[0]) is torch.dtype
        expect(fits, utils + "meta_tensor_no_storage", arguments)
        dtype, size, stride, requires_grad = arguments
        _check_shape(size, stride)
        tensor = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        _set_grad(tensor, (requires_grad,))
        return tensor

    @table.on_call(table.add_function(utils + "device_tensor_from_cpu_tensor"))
    def _converted(bounds: Bounds, arguments: Arguments) -> Tensor:
        """From devices that torch can't read storages of; it comes back on the CPU."""
        fits = len(arguments) == 4 and type(arguments[0]) is Tensor
        expect(fits and type(arguments[1]) is torch.dtype, utils + "device_tensor", arguments)
        bounds.spend(arguments[0].numel() * arguments[1].itemsize)
        tensor: Tensor = arguments[0].to(arguments[1])
        _set_grad(tensor, arguments[3:])
        return tensor


def _set_grad(tensor: Tensor, requires_grad: Arguments) -> None:
    expect(are(requires_grad, bool), "torch._utils._rebuild_tensor_v2", requires_grad)
    if any(requires_grad):
        tensor.requires_grad_()


def _set_bits(tensor: Tensor, metadata: Arguments) -> None:
    for bits in metadata:
        fits = type(bits) is dict and are(bits, str) and are(bits.values(), bool)
        expect(fits or bits is None, "torch._utils._rebuild_tensor_v2", metadata)
        if bits:
            torch._utils.set_tensor_metadata(tensor, bits)  # type: ignore[no-untyped-call]


def _add_parameters(table: Table) -> None:
    utils = "torch._utils._rebuild_"

    @table.on_call(*map(table.add_function, (utils + "parameter", utils + "parameter_with_state")))
    def _parameter(bounds: Bounds, arguments: Arguments) -> Tensor:
        """(data, requires grad, hooks[, state])"""
        fits = len(arguments) in (3, 4) and type(arguments[0]) is Tensor
        expect(fits and type(arguments[1]) is bool, _Parameter, arguments)
        parameter = _Parameter(arguments[0], arguments[1])
        set_attributes(bounds, parameter, arguments[3:])
        return parameter


def set_attributes(bounds: Bounds, tensor: Tensor, state: Arguments) -> None:
    """Python attributes that somebody has given a tensor; no descriptor of its class is asked."""
    for attributes in state:
        if type(attributes) is tuple and len(attributes) == 2:
            has_none = attributes[1] is None or (type(attributes[1]) is dict and not attributes[1])
            expect(has_none, type(tensor), attributes)
            attributes = attributes[0]  # slots, which tensors do not have
        if attributes is None:
            continue
        expect(type(attributes) is dict and are(attributes, str), type(tensor), (attributes,))
        bounds.spend(len(attributes))
        tensor.__dict__.update(attributes)


def _add_other_layouts(table: Table) -> None:
    utils = "torch._utils._rebuild_"

    @table.on_call(table.add_function(utils + "sparse_tensor"))
    def _sparse(bounds: Bounds, arguments: Arguments) -> Tensor:
        """(layout, (indices, values, size, ...))"""
        fits = len(arguments) == 2 and type(arguments[0]) is torch.layout
        expect(fits and type(arguments[1]) is tuple, utils + "sparse_tensor", arguments)
        layout, data = arguments
        parts = 2 if layout is torch.sparse_coo else 3
        expect(len(data) in (4, parts + 1) and are(data[:parts], Tensor), utils + "sparse", data)
        expect(are_sizes(data[parts]) and are(data[parts + 1 :], bool), utils + "sparse", data)
        for tensor in data[:parts]:
            bounds.spend(_bytes_if_copied(tensor))
        if layout is torch.sparse_coo:
            return _sparse_coo(*data)
        rows, columns, values, size = data
        # check_invariants looks at the indices: none may lead out of the values.
        return torch.sparse_compressed_tensor(
            rows, columns, values, size, layout=layout, check_invariants=True
        )

    @table.on_call(table.add_function(utils + "nested_tensor"))
    def _nested(bounds: Bounds, arguments: Arguments) -> Tensor:
        """(buffer, sizes, strides, offsets), of which each component is checked here: torch does
        not."""
        fits = len(arguments) == 4 and are(arguments, Tensor)
        expect(fits and arguments[0].dim() == 1, utils + "nested_tensor", arguments)
        buffer, sizes, strides, offsets = arguments
        for tensor in arguments:
            bounds.spend(_bytes_if_copied(tensor))
        whole = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
            wrap_storage=buffer.untyped_storage(), dtype=buffer.dtype, _internal=True
        )
        rows = zip(offsets.tolist(), sizes.tolist(), strides.tolist(), strict=True)
        parts = [_strided(whole, at, tuple(size), tuple(stride)) for at, size, stride in rows]
        expect(all(part.numel() <= buffer.numel() for part in parts), utils + "nested", arguments)
        return torch._nested_view_from_buffer(buffer, sizes, strides, offsets)

    @table.on_call(table.add_function(utils + "qtensor"))
    def _quantized(bounds: Bounds, arguments: Arguments) -> Tensor:
        """(storage, offset, size, stride, quantizer, requires grad, no hooks)"""
        fits = len(arguments) == 7 and type(arguments[4]) is tuple and type(arguments[5]) is bool
        expect(fits, utils + "qtensor", arguments)
        checked = _strided(*arguments[:4])
        _check_quantizer(arguments[4], arguments[2])
        has_none = type(arguments[6]) is collections.OrderedDict and not arguments[6]
        expect(has_none, utils + "qtensor", arguments)
        bounds.spend(checked.numel() * checked.itemsize)
        return torch._utils._rebuild_qtensor(*arguments)  # type: ignore[no-untyped-call,no-any-return]


def _check_quantizer(quantizer: Arguments, size: tuple[int, ...]) -> None:
    """(scheme, scale, zero point), or (scheme, scales, zero points, axis) with one of each along
    the axis; torch does not look at these."""
    target = "torch._utils._rebuild_qtensor"
    if len(quantizer) == 3 and quantizer[0] is torch.per_tensor_affine:
        return expect(are(quantizer[1:], float, int), target, quantizer)
    fits = len(quantizer) == 4 and type(quantizer[0]) is torch.qscheme
    axis = quantizer[3] if fits and type(quantizer[3]) is int else -1
    expect(0 <= axis < len(size), target, quantizer)
    for each in quantizer[1:3]:
        if type(each) is Tensor:
            expect(tuple(each.shape) == (size[axis],), target, quantizer)
        else:
            fits = type(each) is list and are(each, float, int)
            expect(fits and len(each) == size[axis], target, quantizer)
    return None


def _sparse_coo(indices: Tensor, values: Tensor, size: Any, is_coalesced: Any = None) -> Tensor:
    tensor = torch.sparse_coo_tensor(
        indices, values, size, check_invariants=True, is_coalesced=is_coalesced
    )
    return tensor


def _bytes_if_copied(tensor: Tensor) -> int:
    return 0 if tensor.is_contiguous() else math.prod(tensor.shape) * tensor.itemsize


def _add_return_types(table: Table) -> None:
    """What torch.max and others give. Of tensors only: such tuples are let go of without regard to
    how deep they lie in each other."""
    for name, cls in vars(torch.return_types).items():
        if not isinstance(cls, type) or not issubclass(cls, tuple):
            continue
        table.add_class(cls, f"torch.return_types.{name}")

        def _result(bounds: Bounds, arguments: Arguments, cls: Any = cls) -> Any:
            fits = len(arguments) in (1, 2) and type(arguments[0]) is tuple
            expect(fits and are(arguments[0], Tensor, int, float), cls, arguments)
            return cls(arguments[0])

        table.calls[cls] = _result


def storage_dtypes() -> dict[str, torch.dtype]:
    """The classes of storages that pickles name, and what they hold; bytes for those without a
    type."""
    kinds = {"UntypedStorage": torch.uint8, **torch.storage._storage_type_to_dtype_map()}
    modules = ("torch", "torch.cuda", "torch.storage")
    return {f"{module}.{name}": dtype for module in modules for name, dtype in kinds.items()}


def add_storages(table: Table) -> dict[Function, torch.dtype]:
    return {table.add_function(name): dtype for name, dtype in storage_dtypes().items()}
