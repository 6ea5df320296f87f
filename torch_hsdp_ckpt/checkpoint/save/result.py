"""What a save returns: DCP's ``Metadata``, and with it what was written and how fast."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class SaveResult:
    """Bytes and times of one save.

    Attributes:
        path: the checkpoint's directory.
        rank: this rank in the saving process group.
        bytes_written: of every rank's data files, by rank.
        write_seconds: what staging, checksums, writing and syncing took, by rank.
        seconds: this rank's time per phase: ``plan`` (all before the first byte), ``write``,
            ``commit`` (from this rank's vote to the verdict, so waiting for slower ranks is in it)
            and ``total``.
    """

    path: str
    rank: int
    bytes_written: tuple[int, ...]
    write_seconds: tuple[float, ...]
    seconds: dict[str, float]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_written)

    @property
    def gib_per_second(self) -> float:
        """All ranks' bytes over this rank's whole time."""
        return self.total_bytes / GIB / max(self.seconds["total"], 1e-9)

    @property
    def rank_gib_per_second(self) -> tuple[float, ...]:
        """Each rank's bytes over its own time of writing."""
        ranks = zip(self.bytes_written, self.write_seconds, strict=True)
        return tuple(size / GIB / max(seconds, 1e-9) for size, seconds in ranks)

    def __str__(self) -> str:
        total = self.seconds["total"]
        phases = {name: seconds for name, seconds in self.seconds.items() if name != "total"}
        times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in phases.items())
        least, most = min(self.bytes_written), max(self.bytes_written)
        slowest, fastest = min(self.rank_gib_per_second), max(self.rank_gib_per_second)
        return (
            f"{_size(self.total_bytes)} in {total:.3f} s, {_size(self.gib_per_second * GIB)}/s "
            f"({times}; {len(self.bytes_written)} ranks with {_size(least)} to {_size(most)} "
            f"at {_size(slowest * GIB)}/s to {_size(fastest * GIB)}/s)"
        )


def _size(count: float) -> str:
    """``count`` bytes in the largest binary unit of which there is one at least: "1.25 MiB"."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 2**power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{count:.0f} bytes"


class SavedMetadata(Metadata):
    """The ``Metadata`` of a checkpoint that was just saved, decoded when it is first looked at, and
    ``result``.

    At 1,024 ranks it has 128,000 chunks, which hardly any caller wants as Python objects on every
    rank. Compares equal to the same ``Metadata``; a pickle or a copy of it is a plain one. Where it
    has to be read from the checkpoint's directory first, attributes raise OSError or, when a later
    save has replaced it, CheckpointError."""

    result: SaveResult | None

    def __init__(self, *fields: Any, **named: Any) -> None:
        self.__dict__.update(result=None, _load=None, _loaded=Metadata(*fields, **named))

    @classmethod
    def lazy(cls, load: Callable[[], Metadata], result: SaveResult) -> "SavedMetadata":
        self = cls.__new__(cls)
        self.__dict__.update(result=result, _load=load, _loaded=None)
        return self

    def plain(self) -> Metadata:
        """DCP's own object."""
        if self.__dict__["_loaded"] is None:
            self.__dict__.update(_loaded=self.__dict__["_load"](), _load=None)
        loaded: Metadata = self.__dict__["_loaded"]
        return loaded

    def __eq__(self, other: object) -> bool:
        return self.plain() == (other.plain() if isinstance(other, SavedMetadata) else other)

    __hash__ = None  # type: ignore[assignment]  # as Metadata's

    def __repr__(self) -> str:
        return repr(self.plain())

    def __reduce__(self) -> tuple[Any, ...]:
        plain = self.plain()
        return Metadata, tuple(getattr(plain, field.name) for field in dataclasses.fields(Metadata))


def _field(name: str) -> property:
    return property(
        lambda self: getattr(self.plain(), name),
        lambda self, value: setattr(self.plain(), name, value),
    )


for _name in (field.name for field in dataclasses.fields(Metadata)):
    setattr(SavedMetadata, _name, _field(_name))
