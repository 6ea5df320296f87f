"""Objects of a checkpoint, which are pickles: what may be made of them, and what may not."""

import io
import pickle
import pickletools
import zipfile
from typing import Any

import torch

from .errors import CheckpointError, CorruptCheckpointError


def load_object(data: bytes, what: str, trust: bool) -> Any:
    """The object in bytes that ``torch.save`` wrote. Unless ``trust``, nothing but tensors and plain data is made of them, nor
    anything run (``torch.load(weights_only=True)``; ``torch.serialization.add_safe_globals`` allows more classes).

    Raises:
        CheckpointError: the object needs more than that.
        CorruptCheckpointError: ``torch.load`` can't read the bytes.
    """
    if not trust:
        check_explained(data, what)
    # As in DCP, tensors go back to the device they were on; to the CPU where there is no such device.
    location = None if torch.cuda.is_available() else "cpu"
    try:
        return torch.load(io.BytesIO(data), map_location=location, weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise CorruptCheckpointError(f"{what}: torch.load refuses the object: {error}") from error
        raise CheckpointError(
            f"{what}: the object is not loaded, for it needs more than plain data: {error}\nIf you trust the checkpoint's "
            "source, pass trust_objects=True, or allow the classes with torch.serialization.add_safe_globals"
        ) from error
    except Exception as error:
        raise CorruptCheckpointError(f"{what}: torch.load refuses the object: {type(error).__name__}: {error}") from error


def check_explained(data: bytes, what: str) -> None:
    """CorruptCheckpointError if ``torch.load(weights_only=True)`` would make more of ``data``, which ``torch.save`` wrote, than
    its own size explains: ``bytearray`` of a number, the same text encoded again and again, or compressed entries."""
    makes_bytes = b"_codecs" in data or b"bytearray" in data  # else the walk is not worth its time
    try:
        if data.startswith(b"PK\3\4"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = archive.infolist()
                if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > len(data):
                    raise ValueError("its entries are compressed, which torch.save's are not")
                for entry in entries if makes_bytes else ():
                    if entry.filename.endswith("data.pkl"):
                        _check_pickle(io.BytesIO(archive.read(entry)), len(data))
        elif makes_bytes:  # one pickle after the other; what follows them are the tensors' bytes
            stream = io.BytesIO(data)
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(stream, len(data))
    except Exception as error:
        raise CorruptCheckpointError(f"{what}: the object is not loaded: {error}") from error


_LEGACY_PICKLES = 5  # magic, version, system, object, storage keys
# What `weights_only` lets a pickle call that makes bytes from an argument: how pickle writes bytes, and bytearrays.
_MAKES_BYTES = frozenset(("_codecs encode", "builtins bytearray", "__builtin__ bytearray"))


def _check_pickle(stream: io.BytesIO, limit: int) -> None:
    makers: set[int] = set()  # where the memo has one of them
    lengths: dict[int, int] = {}  # of the memo's texts and bytes
    made = 0
    calling = False  # a maker was pushed; the next thing pushed is what it makes bytes from
    maker = False  # what was pushed last is one
    length: int | None = None  # of what was pushed last
    argument_length: int | None = None  # of what the last maker is given
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("BINPUT", "LONG_BINPUT"):
            assert isinstance(argument, int)
            if maker:
                makers.add(argument)
            elif length is not None:
                lengths[argument] = length
            continue
        recalled = argument if name in ("BINGET", "LONG_BINGET") else None
        maker = recalled in makers or (name == "GLOBAL" and argument in _MAKES_BYTES)
        if name == "REDUCE":
            length, argument_length = argument_length, None
        elif isinstance(recalled, int):
            length = lengths.get(recalled)
        else:
            length = len(argument) if isinstance(argument, (str, bytes)) and name != "GLOBAL" else None
        if calling and not maker:
            if length is None and name != "EMPTY_TUPLE":
                raise ValueError(f"its pickle makes bytes from {name}, not from bytes that it holds")
            argument_length = length
            made += length or 0
            if made > limit:
                raise ValueError(f"its pickle makes more than {limit} bytes, its own size")
        calling = maker


def checked_stream(data: bytes, what: str, trust: bool) -> io.BytesIO:
    """For planners, which run an object's pickle: the bytes as they are if ``trust``, else bytes that this process made of what
    :func:`load_object` gave, so that nothing of the checkpoint's own reaches a pickle machine that runs code."""
    if trust:
        return io.BytesIO(data)
    stream = io.BytesIO()
    torch.save(load_object(data, what, trust=False), stream)
    stream.seek(0)
    return stream
