"""Objects of a checkpoint, which are pickles: what may be made of them, and what may not."""

import io
import pickle
from typing import Any

import torch

from ... import _C
from ...errors import CheckpointError, CorruptCheckpointError
from .pickle_check import NAMES_A_GLOBAL, PickleCheck


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
    except pickle.UnpicklingError as error:
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
    which ``torch.save`` wrote, than its own size explains. Raises UnpicklingError for a pickle that
    it would refuse anyway."""
    calls = NAMES_A_GLOBAL.search(data) is not None  # else the walk is not worth its time
    try:
        if data.startswith(b"PK\3\4"):
            entries = _C.zip_entries(data, what)
            # torch finds an entry by what follows the first slash, in upper or lower case.
            sizes = {name.lower().partition(b"/")[2].decode(): size for name, _, size in entries}
            if len(sizes) != len(entries):
                raise ValueError("two of its entries have one name")
            for name, offset, size in entries if calls else ():
                if name.lower().endswith(b"data.pkl"):
                    PickleCheck(_TIMES * len(data), sizes).run(
                        io.BytesIO(data[offset : offset + size])
                    )
        elif calls:  # one pickle after the other; what follows them are the tensors' bytes
            stream, check = io.BytesIO(data), PickleCheck(_TIMES * len(data))
            for _ in range(_LEGACY_PICKLES):
                check.run(stream)
    except (CorruptCheckpointError, pickle.UnpicklingError):
        raise
    except Exception as error:
        raise CorruptCheckpointError(
            f"{what}: the object is not loaded: {type(error).__name__}: {error}"
        ) from error


_TIMES = 4  # an array passes through text and bytes on its way
_LEGACY_PICKLES = 5  # magic, version, system, object, storage keys


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
