"""Tensors that are more than dense memory: each comes back as it was, or the save names key and
kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from device import cpu_only
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt.checkpoint.save.async_save import await_save
from torch_hsdp_ckpt.checkpoint.storage import writer

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*(beta|prototype) s"),
]

_NO_SPARSE = "the simulated device has no sparse tensors"


class Named(torch.Tensor):
    """A subclass that only has a name, and attributes."""


class Wrapper(torch.Tensor):
    """One without memory of its own."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Wrapper":
        made: Wrapper = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=inner.dtype
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(str(function))


def _refused() -> dict[str, tuple[torch.Tensor, str]]:
    eye = torch.eye(4)
    components = [torch.ones(2, 3), torch.ones(4, 3)]
    return {
        "coo": (eye.to_sparse(), r"layout torch\.sparse_coo"),
        "csr": (eye.to_sparse_csr(), r"layout torch\.sparse_csr"),
        "csc": (eye.to_sparse_csc(), r"layout torch\.sparse_csc"),
        "bsr": (eye.to_sparse_bsr((2, 2)), r"layout torch\.sparse_bsr"),
        "mkldnn": (eye.to_mkldnn(), r"layout torch\._mkldnn"),
        "nested": (torch.nested.nested_tensor(components), "a nested tensor"),
        "jagged": (torch.nested.nested_tensor(components, layout=torch.jagged), "a nested tensor"),
        "wrapper": (Wrapper(torch.ones(2)), r"class .*Wrapper is not saved"),
        "lazy": (nn.UninitializedParameter(), "an uninitialized parameter"),
        "sparse parameter": (nn.Parameter(eye.to_sparse()), r"layout torch\.sparse_coo"),
    }


@cpu_only(_NO_SPARSE)
@pytest.mark.parametrize("kind", _refused())
def test_what_no_record_brings_back_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    value, words = _refused()[kind]
    state = {"model": {kind: value}, "w": torch.ones(2)}
    match = rf"model\.{kind}: .*{words}"
    with pytest.raises(h.CheckpointError, match=match):
        h.save(state, checkpoint_id=tmp_path, no_dist=True)
    future = h.async_save(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(h.CheckpointError, match=match):
        await_save(future)
    assert not (tmp_path / ".metadata").exists()
    if kind in ("coo", "sparse parameter"):  # the others torch's own planning does not survive
        with pytest.raises(CheckpointException, match=match):
            dcp.save(state, storage_writer=h.FileSystemWriter(tmp_path), no_dist=True)


@cpu_only(_NO_SPARSE)
def test_sparse_tensors_of_older_checkpoints_are_not_taken_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = torch.eye(4).to_sparse() * 5
    with monkeypatch.context() as patch:  # as this package once saved them
        patch.setattr(writer, "why_not_saved", lambda tensor: "")
        storage = h.FileSystemWriter(tmp_path)
        dcp.save({"t": saved, "w": torch.ones(2)}, storage_writer=storage, no_dist=True)
    for target in (torch.zeros(4, 4).to_sparse(), saved * 0, torch.zeros(4, 4)):
        like = {"t": target, "w": torch.zeros(2)}
        with pytest.raises(h.CheckpointError, match=r"t: .*layout torch\.sparse_coo"):
            h.load(like, checkpoint_id=tmp_path, no_dist=True)
    other = {"w": torch.zeros(2)}
    h.load(other, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(other["w"], torch.ones(2))


def _named() -> dict[str, torch.Tensor]:
    values = torch.arange(6.0)
    return {
        "plain": values.clone().as_subclass(Named),
        "strided": values.clone().reshape(2, 3).t().as_subclass(Named),
        "half": values.half().as_subclass(Named),
        "buffer": nn.Buffer(values.clone()),
        "parameter": nn.Parameter(values.clone().as_subclass(Named)),
    }


@pytest.mark.parametrize("way", ["save", "async_save", "dcp"])
@pytest.mark.parametrize("dense_target", [False, True])
def test_plain_subclasses_are_saved_as_the_tensors_that_they_are(
    tmp_path: Path, way: str, dense_target: bool
) -> None:
    state = _named()
    if way == "save":
        h.save(dict(state), checkpoint_id=tmp_path, no_dist=True)
    elif way == "async_save":
        h.async_save(dict(state), checkpoint_id=tmp_path, no_dist=True).result()
    else:
        dcp.save(dict(state), storage_writer=h.FileSystemWriter(tmp_path), no_dist=True)
    assert h.verify(tmp_path).ok
    with torch.no_grad():
        targets = {key: value.detach().clone().zero_() for key, value in state.items()}
    if dense_target:
        targets = {key: value.as_subclass(torch.Tensor) for key, value in targets.items()}
    like: dict[str, Any] = dict(targets)
    h.load(like, checkpoint_id=tmp_path, no_dist=True)
    for key, value in state.items():
        assert like[key] is targets[key]
        assert torch.equal(like[key], value), key
    stock: dict[str, Any] = {key: torch.zeros_like(value) for key, value in targets.items()}
    dcp.load(stock, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(stock[key], value) for key, value in state.items())


def test_a_subclass_that_stock_has_saved_is_loaded_into_one(tmp_path: Path) -> None:
    saved = torch.arange(4.0).as_subclass(Named)
    dcp.save({"x": saved}, checkpoint_id=tmp_path, no_dist=True)
    like = {"x": torch.zeros(4).as_subclass(Named)}
    h.load(like, checkpoint_id=tmp_path, no_dist=True)
    assert type(like["x"]) is Named and torch.equal(like["x"], saved)
    dense = {"x": torch.zeros(4)}
    h.load(dense, checkpoint_id=tmp_path, no_dist=True)
    assert type(dense["x"]) is torch.Tensor and torch.equal(dense["x"], torch.arange(4.0))
