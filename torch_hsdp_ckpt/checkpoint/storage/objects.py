"""Objects of a checkpoint, which are pickles: what may be made of them, and what may not."""

import io
import pickle
from typing import Any

import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from ... import _C
from ...errors import CheckpointError, CorruptCheckpointError


def load_object(data: bytes, what: str, trust: bool) -> Any:
    """The object in bytes that ``torch.save`` wrote. Unless ``trust``, nothing but tensors and
    plain data is made of them, nor anything run (``torch.load(weights_only=True)``;
    ``torch.serialization.add_safe_globals`` allows more classes).

    Raises:
        CheckpointError: the object needs more than that.
        CorruptCheckpointError: ``torch.load`` can't read the bytes.
    """
    # As in DCP, tensors go back to the device they were on; to the CPU where there is no such
    # device.
    location = None if torch.cuda.is_available() else "cpu"
    try:
        if not trust:
            check_explained(data, what)
        return torch.load(io.BytesIO(data), map_location=location, weights_only=not trust)
    except CorruptCheckpointError:
        raise
    except (pickle.UnpicklingError, CheckpointError) as error:
        if trust:
            raise CorruptCheckpointError(
                f"{what}: torch.load refuses the object: {error}"
            ) from error
        raise CheckpointError(
            f"{what}: the object is not loaded, for it needs more than plain data: {error}\nIf you "
            "trust the checkpoint's "
            "source, pass trust_objects=True, or allow the classes with "
            "torch.serialization.add_safe_globals"
        ) from error
    except Exception as error:
        raise CorruptCheckpointError(
            f"{what}: torch.load refuses the object: {type(error).__name__}: {error}"
        ) from error


def check_explained(data: bytes, what: str) -> None:
    """CorruptCheckpointError if ``torch.load(weights_only=True)`` would make more of ``data``,
    which ``torch.save`` wrote, than its own size explains. Raises CheckpointError for a pickle that
    it would refuse anyway."""
    _C.check_object(data, what, _TORCH_NAMES)


_TORCH_NAMES = _C.TorchNames(
    renamed_modules=IMPORT_MAPPING,
    renamed_globals=NAME_MAPPING,
    tensor_classes={
        f"{cls.__module__}.{cls.__name__}"
        for cls in (*torch._tensor_classes, *torch._storage_classes, torch.Tensor)
    },
    storage_item_sizes={
        name: dtype.itemsize for name, dtype in torch.storage._storage_type_to_dtype_map().items()
    },
)


def checked_stream(data: bytes, what: str, trust: bool) -> io.BytesIO:
    """For planners, which run an object's pickle: the bytes as they are if ``trust``, else bytes
    that this process made of what :func:`load_object` gave, so that nothing of the checkpoint's own
    reaches a pickle machine that runs code."""
    if trust:
        return io.BytesIO(data)
    stream = io.BytesIO()
    torch.save(load_object(data, what, trust=False), stream)
    stream.seek(0)
    return stream
