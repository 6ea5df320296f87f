"""A small checkpoint for the tests of damage: tensors of a few kinds and an object, and a bit of a
file flipped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import torch_hsdp_ckpt as h

LARGE = (520, 512)  # above a megabyte: its payload is page-aligned and has many checksum blocks


def small_state(value: float = 1.5) -> dict[str, Any]:
    g = torch.Generator().manual_seed(int(value * 10))
    return {
        "large": torch.randn(LARGE, generator=g),
        "small": torch.randn(5, 7, generator=g),
        "half": torch.randn(3, generator=g).half(),
        "empty": torch.empty(0, 3),
        "object": {"list": [1, 2, {"x": "text"}], "float": value},
    }


def blank_state() -> dict[str, Any]:
    tensors = {
        "large": torch.zeros(LARGE),
        "small": torch.zeros(5, 7),
        "half": torch.zeros(3).half(),
        "empty": torch.empty(0, 3),
    }
    return tensors | {"object": {"list": [None, None, {"x": None}], "float": None}}


def save_small(
    path: Path, writer: Callable[..., Any] = h.FileSystemWriter, state: dict[str, Any] | None = None
) -> Path:
    dcp.save(state or small_state(), storage_writer=writer(path), no_dist=True)
    return path


def load_small(path: Path) -> dict[str, Any]:
    state = blank_state()
    h.load(state, checkpoint_id=path, no_dist=True)
    return state


@contextmanager
def flipped(file: Path, at: int, bit: int) -> Iterator[None]:
    with open(file, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ (1 << bit)]))
        stream.flush()
        yield
        stream.seek(at)
        stream.write(bytes([byte]))
