"""`.metadata`: the decoder gives what pickle.load gives, runs nothing, and sees every flipped bit
under our checksum."""

import dataclasses
import io
import os
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from torch_hsdp_ckpt import _C, CheckpointError, CorruptCheckpointError
from torch_hsdp_ckpt.checkpoint.storage.metadata import (
    decode_metadata,
    encode_metadata,
    read_metadata,
)

DATA = Path(__file__).parent / "data" / "metadata"
DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
LAYOUTS = sorted({v for v in vars(torch).values() if isinstance(v, torch.layout)}, key=str)
FORMATS = [torch.contiguous_format, torch.channels_last, torch.preserve_format]


def _tensor(
    size: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]], **properties: Any
) -> Any:
    return TensorStorageMetadata(
        properties=TensorProperties(**properties),
        size=torch.Size(size),
        chunks=[
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in chunks
        ],
    )


def _example(planner_data: Any = None) -> Metadata:
    entries: dict[str, Any] = {
        "w": _tensor((5, 3), [((0, 0), (3, 3)), ((3, 0), (2, 3))]),
        "scalar": _tensor((), [((), ())], dtype=torch.bfloat16, requires_grad=True),
        "empty": _tensor((0, 3), [((0, 0), (0, 3))], pin_memory=True),
        "past the end": _tensor((2,), [((0,), (2,)), ((3,), (0,))]),
        "no chunks \N{SNOWMAN} \ud800": _tensor((2**40,), []),
        "object": BytesStorageMetadata(),
    }
    storage = {
        MetadataIndex("w", (0, 0), 0): _StorageInfo("__0_0.distcp", 0, 100),
        MetadataIndex("w", (3, 0)): _StorageInfo("deep/er/__1_0.distcp", 2**40, 2**33, ["zstd"]),
        MetadataIndex("scalar", (), 0): _StorageInfo("..distcp", 100, 0, []),
        MetadataIndex("object"): _StorageInfo("__0_0.distcp", 100, 3),
    }
    meta = StorageMeta(checkpoint_id=Path("/a/b"), save_id="s", modules=["m"])
    return Metadata(entries, planner_data, storage, meta, "1.0.0")


def _assert_same(got: Any, want: Any) -> None:
    """Equal, of the same types all the way down, and with the same instance attributes."""
    assert type(got) is type(want)
    if dataclasses.is_dataclass(want):
        assert {f.name for f in dataclasses.fields(want)} >= set(vars(got))
        for field in dataclasses.fields(want):
            _assert_same(getattr(got, field.name), getattr(want, field.name))
        assert set(vars(got)) == set(vars(want))
    elif isinstance(want, dict):
        for (got_key, got_value), (want_key, want_value) in zip(
            got.items(), want.items(), strict=True
        ):
            _assert_same(got_key, want_key)
            _assert_same(got_value, want_value)
    elif isinstance(want, (list, tuple)):
        for got_item, want_item in zip(got, want, strict=True):
            _assert_same(got_item, want_item)
    elif isinstance(want, float):
        assert repr(got) == repr(want)
    else:
        assert got == want


PLAIN = [
    None,
    {"w": ("w",), "o.x.0": ("o", "x", 0)},
    [True, False, 0, 1, 255, 256, 65535, 65536, -1, -(2**31), 2**31, 2**63 - 1, -(2**63)],
    [
        0.0,
        -0.0,
        1e300,
        float("inf"),
        float("nan"),
        "",
        "\x00\\u0041\n",
        "\N{GRINNING FACE}",
        b"",
        b"\x00\xff",
        b"x" * 300,
    ],
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, set(), frozenset()],
    {1: {2, 3}, (1, ("a", None)): frozenset({"x"}), 2.5: [[[]]], b"k": {"n": {}}},
    "x" * 70000,
    list(range(3000)),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("planner_data", PLAIN, ids=lambda value: type(value).__name__)
def test_decodes_to_what_pickle_gives(protocol: int, planner_data: Any) -> None:
    data = pickle.dumps(_example(planner_data), protocol=protocol)
    _assert_same(decode_metadata(data, "f"), pickle.loads(data))


def test_big_integers() -> None:
    data = pickle.dumps(_example([2**63, -(2**63) - 1, 2**64, -(2**2000), 2**3000]))
    _assert_same(decode_metadata(data, "f"), pickle.loads(data))


def test_every_dtype_layout_and_memory_format() -> None:
    entries = {str(d): _tensor((1,), [], dtype=d) for d in DTYPES}
    entries |= {str(layout): _tensor((1,), [], layout=layout) for layout in LAYOUTS}
    entries |= {str(f): _tensor((1,), [], memory_format=f) for f in FORMATS}
    data = pickle.dumps(Metadata(entries))
    _assert_same(decode_metadata(data, "f"), pickle.loads(data))


def test_shared_values_stay_shared() -> None:
    shared = [1]
    got = decode_metadata(pickle.dumps(_example([shared, shared])), "f").planner_data
    assert got == [[1], [1]] and got[0] is got[1]


def test_checkpoint_id_of_any_kind() -> None:
    for checkpoint_id in (None, "s3://bucket/x", Path("a"), Path(), PurePosixPath("/x/y")):
        metadata = Metadata({}, storage_meta=StorageMeta(checkpoint_id=checkpoint_id))
        _assert_same(decode_metadata(pickle.dumps(metadata), "f"), metadata)


def test_stock_checkpoint(tmp_path: Path) -> None:
    state = {
        "a": torch.ones(3, 4).t(),
        "nested": {"list": [torch.zeros(0), "text", 5]},
        "step": torch.tensor(7),
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    want = dcp.FileSystemReader(tmp_path).read_metadata()
    got = read_metadata(tmp_path / ".metadata")
    # Stock's reader fills these two in after loading.
    assert got.storage_meta is not None and want.storage_meta is not None
    got.storage_meta.load_id = want.storage_meta.load_id
    _assert_same(got, want)


def test_written_metadata_is_read_by_pickle(tmp_path: Path) -> None:
    data = encode_metadata(_example({"w": ("w",)}))
    assert pickle.load(io.BytesIO(data)) == _example({"w": ("w",)})
    assert pickle._Unpickler(io.BytesIO(data)).load() == _example({"w": ("w",)})  # type: ignore[attr-defined]
    (tmp_path / ".metadata").write_bytes(data)
    assert dcp.FileSystemReader(tmp_path).read_metadata().storage_data == _example().storage_data
    _assert_same(read_metadata(tmp_path / ".metadata"), pickle.loads(data))


@pytest.mark.parametrize(
    "planner_data", [*PLAIN, [2**64, -(2**63) - 1, 2**3000]], ids=lambda value: type(value).__name__
)
def test_native_pickle_is_equal(planner_data: Any) -> None:
    metadata = _example(planner_data)
    native = _C.encode_metadata(metadata)
    assert native is not None
    for loaded in (pickle.loads(native), decode_metadata(native, "f")):
        _assert_same(loaded, pickle.loads(pickle.dumps(metadata)))
        assert loaded.storage_data == metadata.storage_data


def test_native_pickle_of_every_dtype_layout_and_memory_format() -> None:
    entries = {str(d): _tensor((1,), [], dtype=d) for d in DTYPES}
    entries |= {str(layout): _tensor((1,), [], layout=layout) for layout in LAYOUTS}
    entries |= {str(f): _tensor((1,), [], memory_format=f) for f in FORMATS}
    if "strides" in vars(TensorProperties()):
        entries["strides"] = _tensor((2, 3), [], strides=(3, 1))
    native = _C.encode_metadata(Metadata(entries))
    assert native is not None
    _assert_same(pickle.loads(native), pickle.loads(pickle.dumps(Metadata(entries))))


def test_stock_metadata_is_encoded_natively() -> None:
    for name in ("stock_2.11.metadata", "stock_2.15.metadata"):
        metadata = decode_metadata((DATA / name).read_bytes(), "f")
        native = _C.encode_metadata(metadata)
        assert native is not None
        _assert_same(pickle.loads(native), metadata)
        assert metadata.planner_data["empty"] == ("empty",)


class _Name(str):
    pass


def test_other_types_are_pickled_or_refused() -> None:
    """A tuple for a torch.Size is still data; a class that no reader of ours would take is refused
    before it is written."""
    metadata = _example()
    metadata.state_dict_metadata["w"].size = (5, 3)  # type: ignore[assignment, union-attr]
    assert _C.encode_metadata(metadata) is None
    assert decode_metadata(encode_metadata(metadata), "f") == metadata
    for planner_data in ({"w": _Name("w")}, object(), {"w": Path}):
        assert _C.encode_metadata(_example(planner_data)) is None
        with pytest.raises(CheckpointError, match=r"_Name|got object|pathlib\.Path"):
            encode_metadata(_example(planner_data))
    bad = dataclasses.replace(
        _example(), storage_data={MetadataIndex("w"): _StorageInfo("../w", 0, 1)}
    )
    with pytest.raises(CheckpointError, match=r"\.\./w"):
        encode_metadata(bad)


def test_every_flipped_bit_is_seen() -> None:
    data = encode_metadata(
        Metadata({"w": _tensor((2,), [((0,), (2,))])}, {"w": ("w",)}, {}, None, "1.0.0")
    )
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            with pytest.raises(CheckpointError) as caught:
                decode_metadata(bytes(damaged), "dir/.metadata")
            # A hit in the trailer's mark leaves a pickle with bytes after its end, which is damage
            # as well.
            assert caught.type is CorruptCheckpointError, (position, bit)
            assert "dir/.metadata" in str(caught.value)


def test_truncated_file_is_seen() -> None:
    data = encode_metadata(Metadata({}, {"w": ("w",)}, {}, None, "1.0.0"))
    whole = len(pickle.dumps(Metadata({}, {"w": ("w",)}, {}, None, "1.0.0")))
    for length in set(range(len(data))) - {
        whole
    }:  # stock's own file, which has nothing to check it by
        with pytest.raises(CorruptCheckpointError):
            decode_metadata(data[:length], "f")


class _Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ((os.system, "touch {}"), r"posix\.system"),
        ((eval, "open('{}', 'w')"), r"builtins\.eval"),
        ((getattr, _Runs(__import__, "os"), "system"), r"builtins\.__import__"),
        ((__import__, "os"), r"builtins\.__import__"),
        ((torch.load, "{}"), r"torch\.serialization\.load"),
    ],
)
@pytest.mark.parametrize("where", ["planner_data", "version", "state_dict_metadata"])
def test_nothing_runs(call: tuple[Any, ...], name: str, where: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    call = (call[0], *(a.format(mark) if isinstance(a, str) else a for a in call[1:]))
    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(dataclasses.replace(_example(), **{where: _Runs(*call)})))
    with pytest.raises(CheckpointError, match=name) as caught:
        read_metadata(file)
    assert str(file) in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\x00b", ".."]
)
def test_paths_stay_in_the_directory(path: str) -> None:
    metadata = dataclasses.replace(
        _example(), storage_data={MetadataIndex("w"): _StorageInfo(path, 0, 1)}
    )
    with pytest.raises(CorruptCheckpointError, match=r"storage_data\.w\.relative_path"):
        decode_metadata(pickle.dumps(metadata), "f")


_BAD: list[tuple[dict[str, Any], str]] = [
    ({"state_dict_metadata": []}, "state_dict_metadata: expected a dict, got a list"),
    ({"state_dict_metadata": {1: BytesStorageMetadata()}}, "expected a str, got an int"),
    (
        {"state_dict_metadata": {"w": 5}},
        "state_dict_metadata.w: expected TensorStorageMetadata, got an int",
    ),
    (
        {"state_dict_metadata": {"w": StorageMeta()}},
        "state_dict_metadata.w: expected TensorStorageMetadata",
    ),
    (
        {"state_dict_metadata": {"w": _tensor((2,), [((0,), (3,))])}},
        r"w.chunks\[0\]: expected a chunk inside dimension 0",
    ),
    (
        {"state_dict_metadata": {"w": _tensor((2,), [((2**63 - 1,), (2,))])}},
        r"chunks\[0\]: expected a chunk inside",
    ),
    (
        {"state_dict_metadata": {"w": _tensor((2,), [((0, 0), (2, 1))])}},
        r"chunks\[0\]: expected 1 dimensions",
    ),
    (
        {"state_dict_metadata": {"w": _tensor((-1,), [])}},
        "w.size: expected no negative number, got -1",
    ),
    (
        {"state_dict_metadata": {"w": _tensor((2,), [], dtype=torch.strided)}},
        "properties: expected torch.dtype",
    ),
    (
        {"state_dict_metadata": {"w": _tensor((2,), [], requires_grad=1)}},
        "properties: expected a bool, got an int",
    ),
    ({"storage_data": [1]}, "storage_data: expected a dict"),
    ({"storage_data": {"w": _StorageInfo("a", 0, 1)}}, "storage_data: expected MetadataIndex"),
    (
        {"storage_data": {MetadataIndex("w"): _StorageInfo("a", -1, 1)}},
        "storage_data.w: expected a range of bytes",
    ),
    (
        {"storage_data": {MetadataIndex("w"): _StorageInfo("a", 2**63 - 1, 1)}},
        "storage_data.w: expected a range",
    ),
    (
        {"storage_data": {MetadataIndex("w"): _StorageInfo("a", 2**63, 1)}},
        "offset: expected an int, got an int",
    ),
    ({"storage_meta": "x"}, "storage_meta: expected StorageMeta"),
    ({"version": 1}, "version: expected a str, got an int"),
    ({"planner_data": StorageMeta()}, "planner_data: expected plain data, got an instance"),
]


@pytest.mark.parametrize(("change", "message"), _BAD)
def test_wrong_types_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        decode_metadata(pickle.dumps(dataclasses.replace(_example(), **change)), "f")


def test_value_that_contains_itself() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(CorruptCheckpointError, match="contains itself"):
        decode_metadata(pickle.dumps(_example(cycle)), "f")


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_metadata(tmp_path / "nowhere")


@pytest.mark.parametrize("written_by", ["2.11", "2.15"])
def test_files_of_both_torch_versions(written_by: str) -> None:
    """What either version of torch wrote, this one reads; 2.11's own pickle can't read the strides
    that 2.15 writes."""
    data = (DATA / f"stock_{written_by}.metadata").read_bytes()
    got = decode_metadata(data, "f")
    knows_strides = "strides" in vars(TensorProperties())
    if knows_strides or written_by == "2.11":
        _assert_same(got, pickle.loads(data))
    w = got.state_dict_metadata["model.weight"]
    assert isinstance(w, TensorStorageMetadata)
    assert w.properties.dtype == torch.float32 and w.size == (4, 3) and w.chunks[0].sizes == (4, 3)
    if knows_strides:
        assert vars(w.properties)["strides"] == ((3, 1) if written_by == "2.15" else None)
    assert got.planner_data["optim.state.0.step"] == ("optim", "state", "0", "step")
    assert got.storage_data[MetadataIndex("model.weight", (0, 0))].relative_path == "__0_0.distcp"
