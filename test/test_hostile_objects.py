"""Objects of a checkpoint that want more memory than their bytes explain, and zips that two readers
see two ways."""

import codecs
import collections
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.storage.objects import Trust, load_object

UNTRUSTED = Trust.of(False, ())


class Calls:
    """Pickles as a call of a function that torch.load(weights_only=True) lets a pickle call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("writer", [h.FileSystemWriter, dcp.FileSystemWriter])
def test_objects_that_their_bytes_do_not_explain(
    tmp_path: Path, writer: Callable[..., Any]
) -> None:
    plain = {
        "b": [b"text", b"a", b"a", bytes(range(256))],
        "a": [bytearray(b"text"), bytearray(), bytearray(b"a"), bytearray(b"a")],
    }
    text = "x" * 1000
    hostile = {
        "bytearray of a number": Calls(bytearray, 3 << 30),
        "a bytearray in a list": [Calls(bytearray, b"a"), Calls(bytearray, 3 << 30)],
        "one text, often": [Calls(codecs.encode, text, "latin1") for _ in range(10)],
    }
    for i, (kind, value) in enumerate(hostile.items()):
        path = tmp_path / str(i)
        dcp.save({"plain": plain, "evil": value}, storage_writer=writer(path), no_dist=True)
        with pytest.raises(h.CorruptCheckpointError, match=r"(?s)evil.*makes"):
            h.load({"evil": None}, checkpoint_id=path, no_dist=True)
        with pytest.raises(CheckpointException, match=r"(?s)evil.*makes"):
            dcp.load({"evil": None}, storage_reader=h.FileSystemReader(path), no_dist=True)
        state: dict[str, Any] = {"plain": {"b": None, "a": None}}
        h.load(state, checkpoint_id=path, no_dist=True)
        assert state["plain"] == plain, kind


def test_compressed_objects_and_objects_of_the_old_format(tmp_path: Path) -> None:
    """The first may be a bomb; the second is what torch wrote before 1.6."""
    stream, old = io.BytesIO(), io.BytesIO()
    torch.save({"zeros": torch.zeros(1 << 20), "b": b"text"}, stream)
    torch.save({"zeros": torch.zeros(4), "b": b"text"}, old, _use_new_zipfile_serialization=False)
    with (
        zipfile.ZipFile(stream) as archive,
        zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    with pytest.raises(h.CorruptCheckpointError, match="expected a stored entry, got a packed"):
        load_object((tmp_path / "z").read_bytes(), "here", UNTRUSTED)
    assert load_object(old.getvalue(), "here", UNTRUSTED)["b"] == b"text"
    bomb = io.BytesIO()
    torch.save([Calls(bytearray, 3 << 30)], bomb, _use_new_zipfile_serialization=False)
    with pytest.raises(h.CorruptCheckpointError, match="makes bytes by"):
        load_object(bomb.getvalue(), "here", UNTRUSTED)


def _number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _tensor(stored: int, size: int, stride: int, key: str = "0") -> bytes:
    storage = (
        _tuple(
            _text("storage"), b"ctorch\nFloatStorage\n", _text(key), _text("cpu"), _number(stored)
        )
        + b"Q"
    )
    shape, strides, hooks = (
        _tuple(_number(size)),
        _tuple(_number(stride)),
        b"ccollections\nOrderedDict\n)R",
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n"
        + _tuple(storage, _number(0), shape, strides, b"\x89", hooks)
        + b"R"
    )


def _zip(pickle: bytes, name: str = "data.pkl", comment: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        entries = {
            name: b"\x80\2" + pickle + b".",
            "byteorder": b"little",
            "data/0": bytes(64),
            "version": b"3\n",
        }
        for entry, data in entries.items():
            archive.writestr(f"archive/{entry}", data)
        archive.infolist()[-1].comment = comment
    return stream.getvalue()


LARGE = _tuple(_number(3 << 30))
FROM_TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\n"
LIST = b"](" + b"".join(_number(i) for i in range(1000)) + b"eq\0"
STATE = b"}(" + b"".join(_text(f"a{i}") + b"N" for i in range(1000)) + b"uq\0"
HOSTILE = {
    "a bytearray by way of another call": FROM_TYPE
    + _tuple(b"cbuiltins\nbytearray\n", _text("x"), LARGE, b"}")
    + b"R",
    "of another spelling": b"ctorch\n_tensor._rebuild_from_type_v2\n"
    + _tuple(b"cbuiltins\nbytearray\n", _text("x"), LARGE, b"}")
    + b"R",
    "arguments in a list": b"cbuiltins\nbytearray\n](" + _number(3 << 30) + b"eR",
    "a tensor of a number": b"ctorch\nTensor\n" + LARGE + b"R",
    "a new tensor of a number": b"ctorch\nFloatTensor\n" + LARGE + b"\x81",
    "a storage of a number": b"ctorch.storage\nUntypedStorage\n" + LARGE + b"R",
    "a tensor by way of another call": FROM_TYPE
    + _tuple(*2 * [b"ctorch\nTensor\n"], LARGE, b"}")
    + b"R",
    "a storage longer than its entry": _tensor(17, 17, 1),
    "a storage without an entry": _tensor(16, 16, 1, "1"),
    "a tensor longer than its storage": _tensor(16, 17, 1),
    "a tensor set anew": _tensor(16, 16, 1) + b"q\0" + _tuple(_number(1)) + b"b",
    "one value, copied out in full": b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n"
    + _tuple(_tensor(16, 3 << 30, 0), b"ctorch\nfloat64\n", _text("cpu"), b"\x89")
    + b"R",
    "a set of a tensor's rows": b"c__builtin__\nset\n" + _tuple(_tensor(16, 3 << 30, 0)) + b"R",
    "a text that grows with each encoding": b"c_codecs\nencode\nq\1"
    + _tuple(b"c_codecs\nencode\n" + _tuple(_text("x" * 50), _text("latin1")) + b"R", _text("hex"))
    + b"R",
    "one entry under several names": _tensor(16, 16, 1, "A") + _tensor(16, 16, 1, "a"),
    "a size of two thousand bits": _tensor(16, 1 << 2000, 0),
    "a storage of a negative size": _tensor(-1, 0, 1),
    "other data for a tensor": b"c__builtin__\nset\n"
    + _tuple(
        FROM_TYPE
        + _tuple(
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ctorch\nTensor\n",
            _tensor(16, 16, 1)
            .removeprefix(b"ctorch._utils\n_rebuild_tensor_v2\n")
            .removesuffix(b"R"),
            b"}" + _text("data") + _tensor(16, 3 << 30, 0) + b"s",
        )
        + b"R"
    )
    + b"R",
    "a sparse tensor of one index, again and again": b"ctorch._utils\n_rebuild_sparse_tensor\n"
    + b"ctorch.serialization\n_get_layout\n"
    + _tuple(_text("torch.sparse_coo"))
    + b"R"
    + _tuple(_tensor(16, 3 << 30, 0), _tensor(16, 3 << 30, 0), _tuple(_number(1)), b"\x89")
    + b"\x86R",
    "one list, again and again": _tuple(LIST, *100 * [b"cbuiltins\nset\nh\0\x85R"]),
    "one state, again and again": _tuple(STATE, *100 * [b"ccollections\nOrderedDict\n)Rh\0b"]),
}


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _dict(*pairs: bytes) -> bytes:
    return b"}(" + b"".join(pairs) + b"u"


def _room(size: int) -> bytes:
    """Bytes that explain what is made behind them, and that nothing is made of."""
    return _text("x" * size) + b"0"


MILLION_BITS = b"\x8b" + struct.pack("<I", 1 << 17) + b"\1" * (1 << 17)
DTYPE = _name("numpy", "dtype") + _tuple(_text("V8"), b"\x89", b"\x88") + b"R"
GENERATOR = (
    _room(1000)
    + _name("numpy.random._pickle", "__bit_generator_ctor")
    + _tuple(_text("MT19937"))
    + b"R"
)
ITSELF = b"}q\1(" + _text("state") + b"h\1u"
SPARSE = _name("torch._utils", "_rebuild_sparse_tensor")
COO = _name("torch.serialization", "_get_layout") + _tuple(_text("torch.sparse_coo")) + b"R"
# 2^40 lists, had anybody unfolded them.
UNFOLDS = b"]q\1" + b"".join(b"](h\1h\1eq\1" for _ in range(40))


def _dtype_state(order: bytes, subarray: bytes, names: bytes, fields: bytes) -> bytes:
    parts = (_number(3), order, subarray, names, fields, _number(8), _number(1), _number(0))
    return DTYPE + _tuple(*parts) + b"b"


def _nested_dtypes(levels: int) -> bytes:
    made = DTYPE + b"q\2"
    for _ in range(levels):
        field = _tuple(b"h\2", _number(0))
        fields = _dict(_text("a"), field, _text("b"), field)
        state = _tuple(
            _number(3), _text("|"), b"N", _tuple(_text("a"), _text("b")), fields,
            _number(8), _number(1), _number(0),
        )  # fmt: skip
        made += DTYPE + state + b"bq\2"
    return made


# Left in the memo alone.
MANY_FIELDS = b"(" + _nested_dtypes(12) + b"1"
# Of that dtype, and of no elements.
MASKED = (
    _name("numpy.ma.core", "_mareconstruct")
    + _tuple(
        _name("numpy.ma.core", "MaskedArray"),
        _name("numpy", "ndarray"),
        _tuple(_number(0)),
        _text("b"),
    )
    + b"R"
    + _tuple(_number(1), _tuple(_number(0)), b"h\2", b"\x89", b"C\0", b"C\0", b"N")
    + b"b"
)
UNBOUNDED = {
    "a random state that holds itself": GENERATOR + ITSELF + b"b",
    "an order that unfolds": _dtype_state(UNFOLDS, b"N", b"N", b"N"),
    "fields that are no dict": _dtype_state(_text("|"), b"N", _tuple(_text("a")), UNFOLDS),
    "formats that unfold": _dtype_state(
        _text("|"), b"N", _tuple(_text("a")), _dict(_text("a"), _tuple(UNFOLDS, _number(0)))
    ),
    "a subarray of what is no dtype": _dtype_state(
        _text("|"), _tuple(UNFOLDS, _tuple(_number(1))), b"N", b"N"
    ),
    "dtypes that unfold": _nested_dtypes(30),
    "indices that unfold": SPARSE
    + _tuple(COO, _tuple(UNFOLDS, b"h\1", _tuple(_number(1)), b"\x89"))
    + b"R",
    "a fraction of a million bits": _name("fractions", "Fraction")
    + _tuple(_number(1), MILLION_BITS)
    + b"R",
    "a range of a million bits": _name("builtins", "range")
    + _tuple(_number(0), MILLION_BITS, _number(3))
    + b"R",
    "a seed of a million bits": _name("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence")
    + _tuple(
        _name("numpy.random.bit_generator", "SeedSequence"),
        _number(0),
        _tuple(MILLION_BITS, _number(0), b"N", _number(4), b")"),
    )
    + b"R",
    "keys of a dtype of many fields": b"}"
    + _room(200_000)
    + MANY_FIELDS
    + b"("
    + b"".join(_tuple(b"h\2", _number(i)) + b"N" for i in range(100))
    + b"u",
    "masks of many fields": b"]" + _room(200_000) + MANY_FIELDS + b"(" + 50 * MASKED + b"e",
    "very many arguments": _name("builtins", "range") + _tuple(*5000 * [_number(1)]) + b"R",
    "a time zone that is a path": _name("zoneinfo", "ZoneInfo._unpickle")
    + _tuple(_text("../../etc/passwd"), _number(1))
    + b"R",
    "a placement without a state": _name("torch.distributed.tensor.placement_types", "Partial")
    + b")\x81",
    "a key without a state": b"}"
    + _name("torch.distributed.tensor.placement_types", "Partial")
    + b")\x81Ns",
    "a gradient that is no bool": _tensor(16, 16, 1).replace(b"\x89", UNFOLDS),
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_libraries_get_nothing_that_unfolds(kind: str) -> None:
    with pytest.raises(h.CorruptCheckpointError, match=r"here: the object is not loaded") as raised:
        load_object(_zip(UNBOUNDED[kind]), "here", UNTRUSTED)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "pickle",
    [
        _name("m" * 5000, "n" * 5000),
        _name("torch", "device") + _tuple(_text("d" * 5000)) + b"R",
        _name("decimal", "Decimal") + _tuple(_text("z" * 5000)) + b"R",
    ],
)
def test_messages_show_long_names_in_part(pickle: bytes) -> None:
    with pytest.raises(h.CheckpointError, match=r"here: the object is not loaded") as raised:
        load_object(_zip(pickle), "here", UNTRUSTED)
    assert len(str(raised.value)) < 1000


FUNCTION = _name("builtins", "getattr")
KEPT = {
    "itself": FUNCTION,
    "in a tuple": _tuple(FUNCTION),
    "in a list": b"]" + FUNCTION + b"a",
    "a tensor's old class": _tuple(_name("torch", "FloatTensor")),
    "in a deque": _name("collections", "deque") + _tuple(_tuple(FUNCTION)) + b"R",
}


@pytest.mark.parametrize("kind", KEPT)
def test_no_function_stays_in_an_object(kind: str) -> None:
    with pytest.raises(h.CheckpointError, match="it holds a function"):
        load_object(_zip(KEPT[kind]), "here", UNTRUSTED)


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_way_a_pickle_takes_memory(kind: str) -> None:
    for name in ("data.pkl", "DATA.PKL"):
        with pytest.raises(
            h.CheckpointError,
            match=r"here: the object is not loaded.*: (its pickle (makes|sets|calls|names)|"
            "it needs a call of)",
        ):
            load_object(_zip(HOSTILE[kind], name), "here", UNTRUSTED)


def test_a_storage_of_the_old_format_that_is_not_there() -> None:
    """Its size is the pickle's word alone, where the file's last pickle does not name it."""
    old = io.BytesIO()
    torch.save(torch.zeros(4), old, _use_new_zipfile_serialization=False)
    hostile = old.getvalue().replace(b"cpuq\x04K\x04", b"cpuq\x04J\0\0\0\x40", 1)
    assert len(hostile) > len(old.getvalue())
    with pytest.raises(h.CorruptCheckpointError, match=r"makes storage \d+ of 4294967296 bytes"):
        load_object(hostile, "here", UNTRUSTED)


def test_what_torch_saves_of_plain_data_is_let_through() -> None:
    shared = torch.arange(1000.0)
    with_state = torch.ones(3)
    with_state.note = "text"  # type: ignore[attr-defined]
    values: dict[str, Any] = {
        "views": [shared[i:] for i in range(100)],
        "parameters": [torch.nn.Parameter(shared[i:]) for i in range(100)],
        "expanded": torch.zeros(1).expand(1 << 20),
        "strided": shared.view(10, 100).t()[::2],
        "with a state": with_state,
        "sets": [set(range(i)) for i in range(50)],
        "counters": collections.Counter("text"),
        "ordered": collections.OrderedDict((str(i), i) for i in range(50)),
        "sparse": torch.eye(100).to_sparse(),
        "compressed": torch.eye(100).to_sparse_csr(),
        "meta": torch.empty(1 << 40, device="meta"),
        "narrow": torch.zeros(5, dtype=torch.float8_e4m3fn),
        "unsigned": torch.zeros(5, dtype=torch.uint16),
        "size": torch.Size([1, 2]),
        "others": [
            1.5,
            2**70,
            True,
            None,
            complex(1, 2),
            torch.device("cpu"),
            torch.float16,
            "\u20ac",
        ],
        "random": torch.get_rng_state(),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(shared.clone())]).state_dict(),
    }
    for name, value in values.items():
        for zipped in (True, False):
            if not zipped and name in ("narrow", "unsigned"):
                continue  # torch does not read them from the old format itself
            stream = io.BytesIO()
            torch.save(value, stream, _use_new_zipfile_serialization=zipped)
            loaded = load_object(stream.getvalue(), name, UNTRUSTED)
            expected = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
            assert type(loaded) is type(expected) and repr(loaded) == repr(expected), name


class Named(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def test_classes_that_somebody_has_allowed_are_let_through() -> None:
    shared = torch.arange(1000.0)
    values: list[Any] = [
        [Named(shared, torch.eye(50).to_sparse()) for _ in range(5)],
        torch.nn.Linear(3, 4),
        np.arange(20_000),
        np.zeros(100_000, dtype=np.uint8),
        np.random.RandomState(0).get_state()[1],
    ]
    classes = [
        Named,
        torch.nn.Linear,
        np.ndarray,
        np.dtype,
        type(np.dtype("i8")),
        type(np.dtype("u1")),
        type(np.dtype("u4")),
    ]
    with torch.serialization.safe_globals([*classes, np._core.multiarray._reconstruct, set]):
        for value in values:
            stream = io.BytesIO()
            torch.save(value, stream)
            loaded = load_object(stream.getvalue(), "here", Trust.of(False, ()))
            assert type(loaded) is type(value) and repr(loaded) == repr(value)


def test_objects_without_the_zips_own_checksums(tmp_path: Path) -> None:
    """Which torch leaves out if it is told to; ours cover the bytes all the same."""
    torch.serialization.set_crc32_options(False)
    try:
        h.save({"o": [1, b"text"]}, checkpoint_id=tmp_path, no_dist=True)
    finally:
        torch.serialization.set_crc32_options(True)
    state: dict[str, Any] = {"o": None}
    h.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert state["o"] == [1, b"text"]


def test_a_zip_that_two_readers_see_two_ways(tmp_path: Path) -> None:
    """Python's zip reader takes the directory at the end and leaves a zip64 one that is not where
    it looks; torch's follows the pointer to it. The one that is checked would not be the one that
    is loaded."""
    hidden = _zip(_text("hidden"))
    entries, directory, offset = struct.unpack("<HII", hidden[-12:-2])
    data = hidden[:-22] + struct.pack(
        "<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, entries, entries, directory, offset
    )
    locator = struct.pack(
        "<IIQI", 0x07064B50, 0, offset + directory, 1
    )  # where the end's own has to be
    data += _zip(_text("seen"), comment=locator)
    assert torch.load(io.BytesIO(data), weights_only=True) == "hidden"
    assert load_object(_zip(_text("seen")), "here", UNTRUSTED) == "seen"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert b"seen" in archive.read("archive/data.pkl")
    for writer in (h.FileSystemWriter, dcp.FileSystemWriter):
        path = tmp_path / writer.__module__
        dcp.save({"o": io.BytesIO(data)}, storage_writer=writer(path), planner=_Raw(), no_dist=True)
        with pytest.raises(
            h.CorruptCheckpointError, match=r"o: (the object: )?expected the zip64 end"
        ):
            h.load({"o": None}, checkpoint_id=path, no_dist=True)


class _Raw(dcp.DefaultSavePlanner):
    """Writes objects as the bytes that they are."""

    def resolve_data(self, write_item: Any) -> Any:
        return self.lookup_object(write_item.index)
