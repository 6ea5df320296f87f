"""Objects of everyday kinds load without trust, from this package's files and stock's; what a save
takes and a load would refuse is said at the save."""

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import logging
import pathlib
import pickle
import uuid
import zoneinfo
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import Partial, Replicate, Shard

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.save.async_save import await_save
from torch_hsdp_ckpt.checkpoint.storage.objects import Trust, load_object

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Phase(enum.Enum):
    WARMUP = (1, "warmup")
    MAIN = 2


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Outer:
    class Inner(enum.Enum):
        ONLY = "only"


@dataclasses.dataclass
class TrainState:
    step: int = 0
    history: list[float] = dataclasses.field(default_factory=list)
    phase: Phase = Phase.MAIN


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: int
    b: tuple[int, ...] = ()


class Pair(NamedTuple):
    first: Any
    second: Any


class NamedTensor(torch.Tensor):
    pass


class Words(dict[str, int]):
    pass


def _random_state() -> np.random.RandomState:
    state = np.random.RandomState(5)
    state.randn(3)  # keeps one for the next call
    return state


def _with_attribute() -> Words:
    words = Words(a=1)
    words.language = "en"  # type: ignore[attr-defined]
    return words


STRUCTURED = np.dtype([("a", "f4"), ("b", "i8", (2, 2)), ("t", "M8[10us]")], align=True)
EVERYDAY: dict[str, Any] = {
    "array": np.arange(6.0).reshape(2, 3),
    "fortran": np.arange(6, dtype="i2").reshape(2, 3).T,
    "empty": np.zeros((0, 3)),
    "strings": np.array(["ab", "c"]),
    "times": np.array(["2020-01-01", "NaT"], dtype="M8[D]"),
    "structured": np.zeros(2, STRUCTURED),
    "record": np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "masked": np.ma.array([1, 2], mask=[False, True]),
    "dtype": STRUCTURED,
    "scalars": [
        np.float32(1.5),
        np.bool_(True),
        np.str_("x"),
        np.void(b"abc"),
        np.datetime64(0, "s"),
    ],
    "legacy state": np.random.RandomState(3).get_state(),
    "bit generator's state": np.random.Philox(3).state,
    "seeds": np.random.SeedSequence([1, 2]).spawn(3)[1],
    "enum": [Phase.WARMUP, Flags.A | Flags.B, Outer.Inner.ONLY],
    "dataclass": TrainState(3, [0.5], Phase.WARMUP),
    "slots": Slotted(1, (2, 3)),
    "named tuple": Pair(Pair(1, 2), {"x": Phase.MAIN}),
    "subclass": _with_attribute(),
    "time": [
        datetime.datetime(2024, 1, 2, 3, 4, 5, 6, datetime.timezone.utc),
        datetime.datetime(2024, 1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        datetime.date(2024, 1, 2),
        datetime.time(3, 4),
        datetime.timedelta(1, 2, 3),
    ],
    "paths": [pathlib.Path("/a/b"), pathlib.PureWindowsPath("c:\\a")],
    "collections": [
        collections.deque([1, 2], maxlen=3),
        collections.defaultdict(list, a=[1]),
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
    ],
    "sets": [{1, (2, 3)}, frozenset([frozenset([1])]), set()],
    "keys": {1: "a", None: "b", (1, (2,)): "c", 1.5: "d", 10**40: "e"},
    "ranges": [range(3, 9, 2), slice(1, None, 2)],
    "numbers": [decimal.Decimal("1.50"), fractions.Fraction(1, 3), 1 + 2j, 2**100],
    "uuid": uuid.UUID(int=5),
    "bytes": [b"", b"\xff\0", bytearray(b"ab")],
    "namespace": argparse.Namespace(lr=0.1),
    "types": [int, type(None), torch.float16, torch.Size([2, 3]), torch.device("cpu")],
    "named tensor": torch.arange(3.0).as_subclass(NamedTensor),
    "module": torch.nn.Linear(2, 1),
    "return types": torch.max(torch.arange(4.0).reshape(2, 2), 0),
    "ellipsis": ...,
    "numbers' array": array.array("d", [1.5, 2.5]),
    "placements": [Shard(1), Replicate(), Partial("avg")],
}
# In tuples, which DCP does not look into: each is one object.
SAVED = {name: (value,) for name, value in EVERYDAY.items()}


def _bytes(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize("saver", ["ours", "stock"])
def test_everyday_kinds_load_without_trust(tmp_path: Path, saver: str) -> None:
    if saver == "ours":
        h.save(dict(SAVED), checkpoint_id=tmp_path, no_dist=True)
    else:
        dcp.save(dict(SAVED), checkpoint_id=tmp_path, no_dist=True)
    state: dict[str, Any] = dict.fromkeys(SAVED)
    classes = (
        Phase,
        Flags,
        Outer.Inner,
        TrainState,
        Slotted,
        Pair,
        Words,
        NamedTensor,
        torch.nn.Linear,
    )
    h.load(state, checkpoint_id=tmp_path, no_dist=True, allow=classes)
    like = dict(SAVED)  # whose values' own classes are allowed
    h.load(like, checkpoint_id=tmp_path, no_dist=True)
    stock: dict[str, Any] = dict.fromkeys(SAVED)
    dcp.load(stock, storage_reader=h.FileSystemReader(tmp_path, allow=classes), no_dist=True)
    for loaded in (state, like, stock):
        for name, (value,) in SAVED.items():
            (found,) = loaded[name]
            assert loaded[name] is not SAVED[name], name
            assert type(found) is type(value), name
            assert repr(found) == repr(value), name
    assert state["subclass"][0].language == "en"


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_random_generators_go_on(protocol: int) -> None:
    for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"):
        generator = np.random.Generator(getattr(np.random, name)(7))
        generator.integers(10, size=3, dtype=np.uint8)
        data = _bytes({"g": generator, "b": generator.bit_generator}, pickle_protocol=protocol)
        loaded = load_object(data, "here", Trust.of(False, ()))
        expected = pickle.loads(pickle.dumps(generator))
        assert np.array_equal(loaded["g"].random(5), expected.random(5)), name
        assert loaded["g"].bit_generator is loaded["b"]
        assert repr(loaded["b"].seed_seq) == repr(expected.bit_generator.seed_seq)
    state = _random_state()
    loaded = load_object(_bytes(state, pickle_protocol=protocol), "here", Trust.of(False, ()))
    assert np.array_equal(loaded.randn(5), state.randn(5))
    torchs = torch.Generator().manual_seed(3)
    torch.rand(2, generator=torchs)
    again = load_object(_bytes(torchs, pickle_protocol=protocol), "here", Trust.of(False, ()))
    assert torch.equal(torch.rand(3, generator=again), torch.rand(3, generator=torchs))


def test_numpy_1s_names(tmp_path: Path) -> None:
    value = {"a": np.arange(3), "s": np.float64(2.0), "state": np.random.get_state()}
    data = pickle.dumps(value, 2)
    assert b"numpy._core" in data
    h.save({"o": value}, checkpoint_id=tmp_path, no_dist=True)
    stored = _bytes(value)
    assert stored.count(b"numpy._core.multiarray\n") == 2
    # One letter more in each name keeps the zip as long as it is.
    old = stored.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
    assert len(old) < len(stored)
    old = _bytes_of_pickle(old)
    loaded = load_object(old, "here", Trust.of(False, ()))
    assert repr(loaded) == repr(value)


def _bytes_of_pickle(archive: bytes) -> bytes:
    """The archive's pickle in an archive of its own, whose sizes fit."""
    begin = archive.index(b"\x80\x02")
    end = archive.index(b"PK\x07\x08", begin)
    return _archive_of_pickle(archive[begin:end])


def _archive_of_pickle(pickled: bytes) -> bytes:
    import zipfile

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as fresh:
        fresh.writestr("archive/data.pkl", pickled)
        fresh.writestr("archive/byteorder", "little")
        fresh.writestr("archive/version", "3\n")
    return stream.getvalue()


class Runs:
    """Leaves a trace of whatever of its code runs."""

    ran: ClassVar[list[str]] = []

    def __new__(cls, *arguments: Any) -> "Runs":
        cls.ran.append("new")
        return super().__new__(cls)

    def __init__(self, value: int = 0) -> None:
        self.ran.append("init")
        self.value = value

    @property
    def guarded(self) -> int:
        return 1

    @guarded.setter
    def guarded(self, value: int) -> None:
        self.ran.append("setter")


class SetsItsState(Runs):
    def __setstate__(self, state: Any) -> None:
        self.ran.append("setstate")


class Reduces(Runs):
    def __reduce__(self) -> Any:
        return Reduces, (3,)


def test_no_code_of_a_users_class_runs() -> None:
    value = Runs(3)
    value.__dict__["guarded"] = 4
    data = _bytes([value])
    others = [_bytes(SetsItsState(1)), _bytes(Reduces(1))]
    Runs.ran.clear()
    for trust in (Trust.of(False, [Runs]), Trust.of(False, ()).for_target({"x": [value]})):
        (loaded,) = load_object(data, "here", trust)
        assert type(loaded) is Runs
        assert vars(loaded) == {"value": 3, "guarded": 4}
    for other, word in zip(others, ("__setstate__", "made by a call"), strict=True):
        with pytest.raises(
            h.CheckpointError, match=f"here:.*Reduces.*{word}|here:.*SetsItsState.*{word}"
        ):
            load_object(other, "here", Trust.of(False, [SetsItsState, Reduces]))
    with pytest.raises(h.CheckpointError, match=r"needs more than.*it needs .*\.Runs"):
        load_object(data, "here", Trust.of(False, ()))
    assert not Runs.ran


class Finalized(Runs):
    def __del__(self) -> None:
        self.ran.append("del")


class Hashed(Runs):
    def __hash__(self) -> int:
        self.ran.append("hash")
        return 1


class Equal(Runs):
    __hash__ = Runs.__hash__

    def __eq__(self, other: object) -> bool:
        self.ran.append("eq")
        return True


class HashedTuple(tuple[int, ...]):
    def __hash__(self) -> int:
        Runs.ran.append("hash")
        return 1


class Iterated(tuple[int, ...]):
    def __iter__(self) -> Any:
        Runs.ran.append("iter")
        return super().__iter__()

    def __len__(self) -> int:
        Runs.ran.append("len")
        return super().__len__()


class Pretends(Runs):
    """To be of another class, and to have other attributes."""

    @property
    def __class__(self) -> Any:
        self.ran.append("class")
        return dict

    @property
    def __dict__(self) -> Any:
        self.ran.append("dict")
        return {}


def test_no_code_of_a_class_runs_in_a_hash_or_at_its_end() -> None:
    kept: list[Any] = [Finalized(), {Hashed(): 1}, {Equal(): 1}, {HashedTuple([1]): 1}]
    data = [_bytes(value) for value in kept]
    Runs.ran.clear()
    for each, name in zip(data, ("__del__", "__hash__", "__eq__", "__hash__"), strict=True):
        with pytest.raises(h.CheckpointError, match=name):
            load_object(each, "here", Trust.of(False, [Finalized, Hashed, Equal, HashedTuple]))
    assert not Runs.ran
    # Its pickle, that pickle would not write of an object that pretends.
    pretends = b"".join((b"\x80\2}(c", __name__.encode(), b"\nPretends\n)\x81}X\1\0\0\0aK\1sbK\1"))
    pretends += b"".join((b"c", __name__.encode(), b"\nIterated\n(K\1t\x85\x81K\2u."))
    archive = _archive_of_pickle(pretends)
    loaded = load_object(archive, "here", Trust.of(False, [Pretends, Iterated]))
    assert not Runs.ran
    assert sorted(loaded.values()) == [1, 2]
    assert {type(key) for key in loaded} == {Pretends, Iterated}
    frozen = {Slotted(1): 2, Phase.MAIN: 3}
    assert load_object(_bytes(frozen), "here", Trust.of(False, [Slotted, Phase])) == frozen


def test_what_no_load_would_take_is_refused_at_the_save(tmp_path: Path) -> None:
    refused: dict[str, Any] = {
        "a call": Reduces(1),
        "a state of its own": [SetsItsState(1)],
        "objects in an array": np.array([{}, None], dtype=object),
        "a function": (torch.nn.functional.relu,),
    }
    for i, (kind, value) in enumerate(refused.items()):
        path = tmp_path / str(i)
        with pytest.raises(h.CheckpointError, match=f"{kind}.*no load would take this object"):
            h.save({kind: value, "w": torch.ones(2)}, checkpoint_id=path, no_dist=True)
        future = h.async_save({kind: value}, checkpoint_id=path, no_dist=True)
        with pytest.raises(h.CheckpointError, match=f"{kind}.*no load would take this object"):
            await_save(future)
        assert not list(path.glob("*.distcp")) and not (path / ".metadata").exists()
        h.save({kind: value}, checkpoint_id=path, no_dist=True, trust_objects=True)
        state: dict[str, Any] = {kind: None}
        with pytest.raises(h.CheckpointError, match="the object is not loaded"):
            h.load(state, checkpoint_id=path, no_dist=True)
        h.load(state, checkpoint_id=path, no_dist=True, trust_objects=True)
        assert type(state[kind]) is type(value)


def test_classes_that_a_load_has_to_be_told_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_name = f"{__name__}.TrainState"
    with caplog.at_level(logging.WARNING, "torch_hsdp_ckpt"):
        for i in range(2):
            h.save({"said": TrainState(i)}, checkpoint_id=tmp_path, no_dist=True)
    said = [record.message for record in caplog.records if "said" in record.message]
    assert len(said) == 1 and class_name in said[0] and "allow=" in said[0]


def test_the_manager_restores_objects(tmp_path: Path) -> None:
    state = {"train": TrainState(3), "numpy": np.random.get_state(), "w": torch.ones(2)}
    with h.CheckpointManager(tmp_path / "a") as manager:
        manager.save(1, state)
    like: dict[str, Any] = {"train": None, "numpy": None, "w": torch.zeros(2)}
    with h.CheckpointManager(tmp_path / "a") as manager:
        with pytest.raises(h.CheckpointError, match=r"it needs .*TrainState(.|\n)*allow="):
            manager.restore_latest(like)
        assert manager.restore_latest({**like, "train": TrainState()}) == 1
    with h.CheckpointManager(tmp_path / "a", allow=[TrainState, Phase]) as manager:
        assert manager.restore_latest(like) == 1
    assert like["train"] == state["train"]
    with h.CheckpointManager(tmp_path / "b", trust_objects=True) as manager:
        manager.save(1, {"r": Reduces(1)})
        like = {"r": None}
        assert manager.restore_latest(like) == 1
    assert type(like["r"]) is Reduces


def test_allow_takes_classes_and_no_others(tmp_path: Path) -> None:
    h.save({"o": Phase.MAIN}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(TypeError, match="allow='Phase'"):
        h.load({"o": None}, checkpoint_id=tmp_path, no_dist=True, allow=["Phase"])  # type: ignore[list-item]
    state: dict[str, Any] = {"o": None}
    h.load(state, checkpoint_id=tmp_path, no_dist=True, allow=(each for each in [Phase]))
    assert state["o"] is Phase.MAIN
    reader = h.FileSystemReader(tmp_path, allow=[Phase])
    state = {"o": None}
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert state["o"] is Phase.MAIN
    with pytest.raises(CheckpointException, match=r"it needs .*Phase"):
        dcp.load({"o": None}, storage_reader=h.FileSystemReader(tmp_path), no_dist=True)


class Level(enum.Enum):
    LOW = 1
    HIGH = 2


@pytest.mark.parametrize("saver", ["ours", "stock"])
@pytest.mark.parametrize("loader", ["ours", "reader"])
def test_keys_come_back_as_they_were(tmp_path: Path, saver: str, loader: str) -> None:
    """DCP flattens with strs, and its own way back leaves these beside the keys that there were."""
    saved: dict[str, Any] = {
        "ints": {0: {"step": 5}, -1: {"step": 6}, 2: [{"x": {7: "y"}}]},
        "enums": {Level.LOW: 5, Level.HIGH: {Level.LOW: 6}},
        "others": {None: 1, True: 2, (1, 2): 3, 1.5: 4, "text": 5},
        "tensors": {0: {"a": torch.ones(2), 1: "b"}},
        "ordered": collections.OrderedDict([(3, "x"), ("y", "z")]),
    }
    like: dict[str, Any] = {
        "ints": {0: {"step": 0}, -1: {"step": 0}, 2: [{"x": {7: None}}]},
        "enums": {Level.LOW: 0, Level.HIGH: {Level.LOW: 0}},
        "others": dict.fromkeys([None, True, (1, 2), 1.5, "text"]),
        "tensors": {0: {"a": torch.zeros(2), 1: ""}},
        "ordered": collections.OrderedDict([(3, ""), ("y", "")]),
    }
    save = h.save if saver == "ours" else dcp.save
    save(dict(saved), checkpoint_id=tmp_path, no_dist=True)
    if loader == "ours":
        h.load(like, checkpoint_id=tmp_path, no_dist=True)
    else:
        dcp.load(like, storage_reader=h.FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(like["tensors"][0].pop("a"), saved["tensors"][0].pop("a"))
    assert like == saved
    save(like, checkpoint_id=tmp_path / "again", no_dist=True)


def test_a_schedule_with_int_keys_resumes_and_is_saved_again(tmp_path: Path) -> None:
    def make() -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])

    optimizer, schedule = make()
    for _ in range(4):
        optimizer.step()
        schedule.step()
    h.save({"schedule": schedule.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    _, resumed = make()
    state = {"schedule": resumed.state_dict()}
    h.load(state, checkpoint_id=tmp_path, no_dist=True)
    resumed.load_state_dict(state["schedule"])
    assert resumed.state_dict() == schedule.state_dict()
    assert resumed.milestones == collections.Counter([3, 6])
    h.save({"schedule": resumed.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    h.async_save({"schedule": resumed.state_dict()}, checkpoint_id=tmp_path, no_dist=True).result()
