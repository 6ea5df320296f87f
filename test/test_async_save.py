"""``async_save``: the state at the call, failures on the future and at the next call, forks,
exit."""

import copy
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from device import DEVICE, cpu_only
from models import Net, batch, even_net
from ranks import Messages, run_ranks
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from training import loss_of, wrap

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.save import async_job, async_save
from torch_hsdp_ckpt.checkpoint.storage import writer

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "adamw_foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True),
    "lbfgs": lambda groups: torch.optim.LBFGS(
        [p for g in groups for p in g["params"]], lr=0.1, max_iter=2
    ),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
}


def _clone(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, value
    )


def _equal(a: Any, b: Any) -> bool:
    local = lambda t: getattr(t, "_local_tensor", t)  # noqa: E731
    flat_a, flat_b = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    return len(flat_a) == len(flat_b) and all(
        torch.equal(local(x), local(y)) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(flat_a, flat_b, strict=True)
    )


def _training_goes_on(rank: int, path: str) -> None:
    torch.manual_seed(0)
    net = Net(64, 256, 4)  # whose bytes are more than what records and objects take
    for name, make in OPTIMIZERS.items():
        model = wrap(copy.deepcopy(net), (2, 2))
        parameters = list(model.parameters())
        optimizer = make([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.05}])

        def train(step: int, model: Any = model, optimizer: Any = optimizer) -> None:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch(net, step, rank))
                loss.backward()
                return loss

            if isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()

        train(0)
        saves = []
        for step in range(3):
            weights, moments = get_state_dict(model, optimizer)
            extra = {
                "list": [1, 2],
                "tensor": torch.arange(5.0),
                "rng": {f"rank{rank}": torch.full((4,), float(rank))},
            }
            state = {"model": weights, "optim": moments, "extra": extra}
            expected = _clone(state)
            future = h.async_save(state, checkpoint_id=f"{path}/{name}-{step}")
            extra["list"][:] = [7, 7]  # type: ignore[index]
            extra["tensor"].fill_(9)  # type: ignore[attr-defined]
            extra["rng"][f"rank{rank}"].fill_(9)  # type: ignore[call-overload]
            for buffer in model.buffers():
                buffer.add_(1)
            train(step + 1)
            saves.append((future, expected))
        for step, (future, expected) in enumerate(saves):
            assert isinstance(future.result(60), dcp.Metadata)
            assert future.upload_completion is future
            assert future.staging_completion.done()
            target = torch.utils._pytree.tree_map(
                lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None, expected
            )
            dcp.load(target, storage_reader=dcp.FileSystemReader(f"{path}/{name}-{step}"))
            if name == "lbfgs":  # whose step sizes differ by rank, under one name
                target, expected = target["model"], expected["model"]
            assert _equal(target, expected), (name, step)
    # A quarter of the state each: every replica stages and writes 1/R of its shard.
    written = saves[-1][0].result().result.bytes_written
    assert max(written) < 0.5 * sum(written)


def test_the_checkpoint_is_the_state_at_the_call(tmp_path: Path) -> None:
    run_ranks(_training_goes_on, 4, str(tmp_path))


def _open_and_running() -> tuple[int, int]:
    """Descriptors and threads, once the threads of saves that are done have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("torch_hsdp_ckpt"):
            thread.join(10)
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def _fork_with_a_save_in_flight(rank: int, path: str, state: dict[str, Any]) -> None:
    """A forked process has nothing in flight, and saves what it likes; the parent's save goes
    on."""
    future = h.async_save(state, checkpoint_id=path)
    with writer._commit_lock:  # the fork may come in the midst of a commit
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            code = 1
            try:
                if async_save._in_flight.job is None:
                    h.save(state, checkpoint_id=f"{path}-of-child-{rank}", no_dist=True)
                    code = 0
            finally:
                os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert h.verify(f"{path}-of-child-{rank}").ok
    future.result(60)


def _failing(rank: int, path: str) -> None:
    state = {"w": torch.full((300_000,), 1.0), "n": 1}
    h.async_save(state, checkpoint_id=path).result(60)
    write = async_job.write
    if rank == 2:

        def no_space(staged: Any, on_read: Any) -> Any:
            raise OSError(28, "No space left on device", path)

        async_job.write = no_space
    future = h.async_save({"w": torch.full((300_000,), 2.0), "n": 2}, checkpoint_id=path)
    assert isinstance(future.exception(60), OSError)
    async_job.write = write
    with pytest.raises(OSError, match="rank 2") as error:  # and at the next call, on every rank
        h.async_save(state, checkpoint_id=path)
    assert error.value.errno == 28
    target = {"w": torch.zeros(300_000), "n": 0}
    dcp.load(target, storage_reader=h.FileSystemReader(path))
    assert (target["n"], target["w"].unique().tolist()) == (1, [1.0])
    h.async_save({"w": torch.full((300_000,), 3.0), "n": 3}, checkpoint_id=path).result(60)
    dcp.load(target, storage_reader=h.FileSystemReader(path))
    assert target["n"] == 3

    if DEVICE == "cpu":  # CUDA is of no use to a forked process
        _fork_with_a_save_in_flight(rank, path, state)
    # Many saves of changing shapes: no thread and no descriptor is left over.
    before = _open_and_running()
    for i in range(40):
        h.async_save({"w": torch.ones(1000 + i), "n": i}, checkpoint_id=path)
    h.async_save(state, checkpoint_id=path).result(60)
    assert _open_and_running() == before
    dist.barrier()


def test_failures_forks_and_many_saves(tmp_path: Path) -> None:
    run_ranks(_failing, 4, str(tmp_path / "checkpoint"))


def _futures(rank: int, path: str) -> None:
    """Of two process groups at a time; callbacks, a caller that keeps no future, groups that are
    destroyed meanwhile."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    name, value = f"{path}/pair{rank // 2}", float(rank // 2)
    state = {"w": torch.full((300_000,), value), f"rank{rank}": torch.full((7,), float(rank))}
    for _ in range(2):
        future = h.async_save(state, checkpoint_id=name, process_group=pairs[rank // 2])
        of_all = h.async_save({"w": torch.ones(5)}, checkpoint_id=f"{path}/all")
        assert future.done()  # one save in flight, of whatever group
        target = {"w": torch.zeros(300_000), f"rank{rank}": torch.zeros(7)}
        h.load(target, checkpoint_id=name, process_group=pairs[rank // 2])
        assert _equal(target, state)
        of_all.result(60)

    seen: list[Any] = []
    go_on, last = threading.Event(), threading.Event()

    def raises(future: Any) -> None:
        seen.append(threading.current_thread() is threading.main_thread())
        raise ValueError("the callback's own")

    def save_again(future: Any) -> None:
        h.async_save({"w": torch.full((9,), 2.0)}, checkpoint_id=f"{path}/again").add_done_callback(
            lambda _: last.set()
        )

    _C._inject_fault(lambda op, path: 0 * (op == "pwrite" and go_on.wait(60)))
    future = h.async_save({"w": torch.ones(300_000)}, checkpoint_id=f"{path}/all")
    for callback in (raises, seen.append, save_again):
        future.add_done_callback(callback)
    with pytest.raises(TimeoutError):
        future.result(0.05)
    assert not future.cancel()
    assert (
        not future.staging_completion.cancel()
    )  # else what is still to be copied would be written as it is
    assert not future.done()
    go_on.set()
    assert last.wait(60)
    _C._inject_fault(None)
    assert seen == [False, future]
    future.add_done_callback(
        lambda _: seen.append(threading.current_thread() is threading.main_thread())
    )
    assert seen == [False, future, True]

    future = h.async_save({"w": torch.full((300_000,), 3.0)}, checkpoint_id=f"{path}/end")
    dist.destroy_process_group()
    future.result(60)
    for where, expected in (("again", torch.full((9,), 2.0)), ("end", torch.full((300_000,), 3.0))):
        target = {"w": torch.zeros_like(expected)}
        h.load(target, checkpoint_id=f"{path}/{where}")
        assert torch.equal(target["w"], expected)


def test_a_call_within_a_call_is_an_error(tmp_path: Path) -> None:
    class Nested:
        def state_dict(self) -> dict[str, Any]:
            h.async_save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "inner")
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with pytest.raises(RuntimeError, match="called within a call of its own"):
        h.async_save({"nested": Nested()}, checkpoint_id=tmp_path / "outer").result()
    with pytest.raises(RuntimeError):  # once more, at the next call
        h.async_save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "outer")
    h.async_save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "outer").result()


def test_futures_and_groups(tmp_path: Path) -> None:
    run_ranks(_futures, 4, str(tmp_path))


def test_a_save_in_flight_is_finished_at_exit(tmp_path: Path) -> None:
    save = f"h.async_save({{'w': torch.ones(10**7)}}, checkpoint_id={str(tmp_path / 'c')!r})"
    code = f"import torch, torch_hsdp_ckpt as h; {save}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    target = {"w": torch.zeros(10**7)}
    dcp.load(target, storage_reader=h.FileSystemReader(tmp_path / "c"))
    assert bool((target["w"] == 1).all())


def test_torchs_own_stager_is_torchs_own_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    with caplog.at_level(logging.INFO, "torch_hsdp_ckpt"):
        h.async_save(
            {"w": torch.ones(3)},
            checkpoint_id=tmp_path / "c",
            async_stager=BlockingAsyncStager(),
            no_dist=True,
        ).result()
    assert any("an async_stager was passed" in message for message in caplog.messages)
    assert (tmp_path / "c" / ".metadata").is_file()


def _in_process_mode(rank: int, path: str) -> None:
    # Only a process that is no daemon may have children; torch's has to.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    log, logger = Messages(), logging.getLogger("torch_hsdp_ckpt")
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    model = wrap(even_net(), (1, 1))
    state: dict[str, Any] = {"model": dict(model.state_dict()), "n": [1]}
    expected = _clone(state)
    for _ in range(2):
        future = h.async_save(
            state, checkpoint_id=path, async_checkpointer_type=AsyncCheckpointerType.PROCESS
        )
        assert not isinstance(future, h.AsyncSave)
        for value in state["model"].values():
            getattr(value, "_local_tensor", value).add_(1)
        assert isinstance(future.result(60), dcp.Metadata)
        for load in (dcp.load, h.load):
            target = torch.utils._pytree.tree_map(
                lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else 0, expected
            )
            load(target, checkpoint_id=path)
            assert _equal(target, expected), load.__module__
        expected = _clone(state)
        dist.barrier()
    said = [text for text in log.texts if text.startswith("torch makes this asynchronous save")]
    assert len(said) == 1, log.texts
    assert "async_checkpointer_type is" in said[0]
    assert "PROCESS" in said[0]
    # One of ours after it is ours again.
    assert isinstance(h.async_save(state, checkpoint_id=f"{path}-ours"), h.AsyncSave)


@cpu_only("torch gives the other process the device's memory by cudaIpcGetMemHandle")
def test_process_mode_is_torchs_own_save(tmp_path: Path) -> None:
    run_ranks(_in_process_mode, 1, str(tmp_path / "c"))
