"""Real text as bytes, and which bytes of it a step sees."""

from __future__ import annotations

import hashlib
import struct
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BOS = 256
"""The token in front of every sequence; 0 to 255 are the bytes themselves."""

VOCABULARY = 257

LENGTH = 128
"""Bytes in a training sequence, unless the training script is told otherwise."""

# Left out of the default text: other people's packages, and sources written by generators or for
# the tests of Python itself.
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
)


class DataError(ValueError):
    """The text can't be read or is too short; the message is one line for the user."""


def standard_library() -> list[Path]:
    """Returns the ``.py`` files of the Python that runs this, sorted by their path."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        f for f in root.rglob("*.py") if not _LEFT_OUT.intersection(f.relative_to(root).parts)
    )


def read_text(files: Iterable[str | Path] | None, length: int) -> bytes:
    """Returns the bytes of ``files`` one after the other (None: Python's standard library).

    Raises DataError if a file can't be read, or if all of them together hold less than one sequence
    of ``length`` bytes."""
    texts = []
    for file in standard_library() if files is None else files:
        try:
            texts.append(Path(file).read_bytes())
        except OSError as error:
            raise DataError(
                f"cannot read the data file {file}: {error.strerror or error}"
            ) from None
    text = b"\n".join(texts)
    if len(text) <= length:
        raise DataError(
            f"the data holds {len(text)} bytes; one training sequence needs more than {length}"
        )
    return text


def fingerprint(text: bytes) -> str:
    """Returns a digest of the text, so that a resumed job notices other data."""
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def positions(step: int, sequences: Sequence[int], size: int, length: int, seed: int) -> list[int]:
    """Returns where each of the step's ``sequences`` (their numbers in the global batch) starts in
    a text of ``size`` bytes.

    A function of its arguments alone: which rank asks, and how many ranks there are, changes
    nothing. So a job that resumes on another mesh sees the same data, and the position in the data
    is saved by saving the step."""
    starts = []
    for sequence in sequences:
        key = struct.pack("<QQQ", seed, step, sequence)
        digest = hashlib.blake2b(key, digest_size=8).digest()
        starts.append(int.from_bytes(digest, "little") % (size - length))
    return starts


def share(rank: int, ranks: int, batch: int) -> range:
    """Returns the numbers of the sequences that ``rank`` of ``ranks`` computes of a global batch:
    neighbours, in order."""
    each = batch // ranks
    return range(rank * each, (rank + 1) * each)


def sample(
    text: torch.Tensor, step: int, sequences: Sequence[int], length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``(tokens, targets)``, both int64 of shape ``(len(sequences), length)``.

    ``text`` is uint8, 1-d. A sequence's tokens are BOS and its targets but the last one.
    """
    import torch

    starts = positions(step, sequences, text.numel(), length, seed)
    targets = torch.stack([text[start : start + length] for start in starts]).long()
    first = torch.full((len(starts), 1), BOS)
    return torch.cat([first, targets[:, :-1]], dim=1), targets
