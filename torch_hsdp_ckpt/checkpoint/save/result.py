"""What a save returns: DCP's ``Metadata``, and with it what was written and how fast."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from ..storage.metadata import LazyMetadata

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


class SavedMetadata(LazyMetadata):
    """The ``Metadata`` of a checkpoint that was just saved, decoded when it is first looked at, and
    ``result``.

    Compares equal to the same ``Metadata``; a pickle or a copy of it is a plain one. Printed it
    says what was saved and how fast. Where it has to be read from the checkpoint's directory first,
    attributes raise OSError or, when a later save has replaced it, CheckpointError."""

    result: SaveResult | None

    def __init__(self, *fields: Any, **named: Any) -> None:
        super().__init__(*fields, **named)
        self.__dict__["result"] = None

    @classmethod
    def of(cls, load: Callable[[], Metadata], result: SaveResult) -> "SavedMetadata":
        self = cls.lazy(load)
        self.__dict__["result"] = result
        return self

    def __repr__(self) -> str:
        if self.result is None:
            return super().__repr__()
        return f"<checkpoint {self.result.path}: {self.result}>"
