"""Records that stock torch has written, damaged: every byte of one, and every bit of its pickle
under a checksum that fits."""

import io
import random
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.storage.metadata import read_metadata

TENSORS = {
    "float32": torch.arange(35.0).reshape(5, 7),
    "bfloat16, transposed": torch.arange(12.0).bfloat16().reshape(4, 3).t(),
    "int64, no dimensions": torch.tensor(7),
    "float8": torch.arange(6.0).reshape(2, 3).to(torch.float8_e4m3fn),
}


class _Record:
    """The record of a checkpoint of one tensor by stock torch, to be written with other bytes."""

    def __init__(self, path: Path, tensor: torch.Tensor) -> None:
        dcp.save({"w": tensor}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
        self.path, self.tensor = path, tensor
        (self._file,) = path.glob("*.distcp")
        (info,) = read_metadata(path / ".metadata").storage_data.values()
        self._whole = self._file.read_bytes()
        self._place = slice(info.offset, info.offset + info.length)
        self.bytes = self._whole[self._place]

    def load(self, record: bytes) -> torch.Tensor | None:
        """What ``load`` makes of the record; None if it refuses, with one of our errors and with
        nothing else."""
        self._file.write_bytes(
            self._whole[: self._place.start] + record + self._whole[self._place.stop :]
        )
        state = {"w": torch.zeros(self.tensor.shape, dtype=self.tensor.dtype)}
        try:
            h.load(state, checkpoint_id=self.path, no_dist=True)
        except h.CheckpointError as error:
            assert "w" in str(error) and self._file.name in str(error)
            return None
        return state["w"]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.double().nan_to_num(-1), b.double().nan_to_num(-1))


@pytest.mark.parametrize("kind", TENSORS)
def test_a_flipped_bit_in_any_byte_is_noticed_or_harmless(tmp_path: Path, kind: str) -> None:
    record = _Record(tmp_path, TENSORS[kind])
    chosen = random.Random(2)
    refused = 0
    for at in range(len(record.bytes)):
        damaged = bytearray(record.bytes)
        damaged[at] ^= 1 << chosen.randrange(8)
        loaded = record.load(bytes(damaged))
        refused += loaded is None
        assert loaded is None or _same(loaded, record.tensor), at
    # What is harmless is padding, and fields of the zip that nobody needs, such as times.
    assert refused > len(record.bytes) // 4


def _pickles(record: bytes) -> Iterator[bytes]:
    """The record with each bit of its pickle flipped, and the checksum of what that gives in all of
    its places."""
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        (info,) = (entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
        pickle = archive.read(info)
    start = record.index(pickle)
    for bit in range(8 * len(pickle)):
        damaged = bytearray(pickle)
        damaged[bit // 8] ^= 1 << bit % 8
        whole = record[:start] + bytes(damaged) + record[start + len(pickle) :]
        before, after = (zlib.crc32(data).to_bytes(4, "little") for data in (pickle, damaged))
        yield whole.replace(before, after)


@pytest.mark.parametrize("kind", TENSORS)
def test_a_flipped_bit_in_a_pickle_whose_checksum_fits_gives_what_torch_has_of_it(
    tmp_path: Path, kind: str
) -> None:
    """Or an error: in a pickle that means something else the values may be others, but none that
    the record does not say."""
    record = _Record(tmp_path, TENSORS[kind])
    loaded = refused = 0
    for damaged in _pickles(record.bytes):
        mine = record.load(damaged)
        refused += mine is None
        if mine is not None:
            loaded += 1
            try:
                theirs = torch.load(
                    io.BytesIO(damaged), map_location=lambda storage, _: storage, weights_only=True
                )
            except (
                UnicodeDecodeError,
                RuntimeError,
            ):  # the device's name, requires_grad of integers: we do not look
                theirs = record.tensor
            assert _same(mine, theirs.detach().to(mine.dtype))
    assert loaded and refused
