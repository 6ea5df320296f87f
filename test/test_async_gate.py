"""What holds training back while a state is being copied, what notices a write past that, and what
a further call does."""

import copy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device import DEVICE
from models import batch, even_net
from ranks import findings_of_simulated_gpu, run_ranks
from states import with_own_version
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor
from training import loss_of, mesh_of, wrap

import torch_hsdp_ckpt as h
from torch_hsdp_ckpt import _C
from torch_hsdp_ckpt.checkpoint.save import async_job
from torch_hsdp_ckpt.checkpoint.save.async_job import Job
from torch_hsdp_ckpt.common.gate import Gate

# seconds before anything is copied behind the gate: whoever does not wait changes what is not
# copied yet
_LATE = 0.3


class _Late:
    """Copying begins late, in this process."""

    def __enter__(self) -> None:
        self._begin = async_job.begin_copy

        def late(*arguments: Any) -> None:
            time.sleep(_LATE)
            self._begin(*arguments)

        async_job.begin_copy = late

    def __exit__(self, *_: object) -> None:
        async_job.begin_copy = self._begin


def _plain(state: Any) -> list[Any]:
    return copy.deepcopy(
        [v for v in torch.utils._pytree.tree_leaves(state) if not isinstance(v, torch.Tensor)]
    )


def _local(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


class _Run:
    """A wrapped model in training, and its state."""

    def __init__(self, rank: int, device: str = DEVICE) -> None:
        self.rank, self.device, self.net = rank, device, even_net()
        self.ema: list[torch.Tensor] = []
        self.model = wrap(even_net(), (2, 2) if dist.get_world_size() == 4 else (1, 1), device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.gradients(0)
        self.optimizer.step()

    def gradients(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, batch(self.net, step, self.rank).to(self.device)).backward()

    def state(self) -> dict[str, Any]:
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optim": moments}

    def leaves(self, state: dict[str, Any]) -> list[torch.Tensor]:
        return [
            _local(v).clone()
            for v in torch.utils._pytree.tree_leaves(state)
            if isinstance(v, torch.Tensor)
        ]

    def saved_is(self, path: str, expected: list[torch.Tensor]) -> None:
        target = torch.utils._pytree.tree_map(
            lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v, self.state()
        )
        h.load(target, checkpoint_id=path)
        for a, b in zip(self.leaves(target), expected, strict=True):
            assert torch.equal(a, b), path


_check_given_up = Job.check_given_up


def _until_given_up(job: Job) -> None:
    """No rank has voted for the save before it is given up."""
    while job.path.name == "replaced" and job._given_up is None:
        time.sleep(0.01)
    _check_given_up(job)


def _gates(rank: int, path: str) -> None:
    run = _Run(rank)
    elsewhere = run.state()
    elsewhere = torch.utils._pytree.tree_map(
        lambda v: v.clone() + 1 if isinstance(v, torch.Tensor) else v, elsewhere
    )
    h.save(elsewhere, checkpoint_id=f"{path}/elsewhere")

    def summon() -> None:
        with h.FullyShardedDataParallel.summon_full_params(run.model), torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(1)

    changes: dict[str, Callable[[], Any]] = {
        "step": run.optimizer.step,
        "load_state_dict": lambda: run.model.load_state_dict(elsewhere["model"]),
        "summon_full_params": summon,
        "load": lambda: h.load(run.state(), checkpoint_id=f"{path}/elsewhere"),
    }
    staged = 0
    for name, change in changes.items():
        run.gradients(1)
        state = run.state()
        expected = run.leaves(state)
        with _Late():
            future = h.async_save(state, checkpoint_id=f"{path}/{name}")
            assert not future.staging_completion.done()
            change()
        future.result(60)
        assert future.step_wait_seconds > _LATE / 2, name
        run.saved_is(f"{path}/{name}", expected)
        assert not all(
            torch.equal(a, b) for a, b in zip(run.leaves(run.state()), expected, strict=True)
        ), name
        staged = future.staged_bytes
    # Each replica copies 1/R of its shard: together the ranks copy every byte of the state once.
    leaves = [
        v for v in torch.utils._pytree.tree_leaves(run.state()) if isinstance(v, torch.Tensor)
    ]
    whole = sum(v.numel() * v.element_size() for v in leaves)
    total = torch.tensor(staged)
    dist.all_reduce(total)
    assert int(total) == whole

    # What nothing holds back is copied before the call returns, however much it is: 1/R of it, once
    # the ranks have agreed.
    placements = next(run.model.parameters()).placements
    ema = DTensor.from_local(torch.full((500_000,), float(rank % 2)), mesh_of((2, 2)), placements)
    plain, expected = torch.arange(400_000.0), run.leaves(run.state())
    with _Late():
        future = h.async_save(
            {**run.state(), "ema": ema, "plain": plain}, checkpoint_id=f"{path}/large"
        )
        ema._local_tensor.fill_(7)
        plain.fill_(7)
        assert not future.staging_completion.done()
    future.result(60)
    # Plain tensors are written whole, by one rank.
    assert future.staged_bytes < 0.6 * ema._local_tensor.nbytes + plain.nbytes
    run.saved_is(f"{path}/large", expected)
    target = {"ema": torch.zeros_like(ema), "plain": torch.zeros_like(plain)}
    h.load(target, checkpoint_id=f"{path}/large")
    assert torch.equal(_local(target["ema"]), torch.full((500_000,), float(rank % 2)))
    assert torch.equal(target["plain"], torch.arange(400_000.0))

    # A call that fails while it plans with the peers leaves no gate shut behind it.
    if rank == 0:
        _C._inject_fault(lambda op, path: -28)
    with pytest.raises(OSError, match="rank 0"):
        h.async_save({**run.state(), "ema": ema}, checkpoint_id=f"{path}/refused")
    _C._inject_fault(None)
    run.optimizer.step()

    # Writes past the gate: seen by version counters, or by reading again; the save fails on all
    # ranks and the older one stays.
    weight = next(p for n, p in run.model.named_parameters() if n.endswith("up.weight"))
    for mode, change in (
        ("lazy", lambda: _local(weight).add_(1)),
        ("lazy", lambda: weight.mul_(2)),
    ):
        with _Late(), torch.no_grad():
            future = h.async_save(run.state(), checkpoint_id=f"{path}/step", snapshot=mode)
            if rank == 1:
                change()
            with pytest.raises(
                h.CheckpointError,
                match=r"rank 1: .*up.weight: it was changed while it was being saved",
            ):
                future.result(60)
        with pytest.raises(h.CheckpointError, match="it was changed"):
            h.async_save(run.state(), checkpoint_id=f"{path}/step")
    check = Gate._check

    def write_unseen(gate: Gate, verify: bool) -> None:
        if rank == 1:  # of the first replica, whose half of the state has all parameters
            for parameter in run.model.parameters():
                with_own_version(_local(parameter.detach())).fill_(3)
        check(gate, verify)

    Gate._check = write_unseen  # type: ignore[method-assign]
    future = h.async_save(run.state(), checkpoint_id=f"{path}/step", snapshot="verify")
    with pytest.raises(h.CheckpointError, match=r"rank 1: .*it was changed"):
        future.result(60)
    Gate._check = check  # type: ignore[method-assign]
    with pytest.raises(h.CheckpointError, match="it was changed"):
        h.async_save(run.state(), checkpoint_id=f"{path}/step")
    findings_of_simulated_gpu()  # the races that were asked for
    run.model.load_state_dict(elsewhere["model"])  # replicas are equal again
    future = h.async_save(run.state(), checkpoint_id=f"{path}/verified", snapshot="verify")
    expected = run.leaves(run.state())
    run.optimizer.step()
    future.result(60)
    run.saved_is(f"{path}/verified", expected)

    # in_flight: the same outcome on all ranks, though the save is in flight on some longer than on
    # others.
    state = run.state()
    expected = run.leaves(state)
    with _Late() if rank == 3 else torch.no_grad():
        first = h.async_save(state, checkpoint_id=f"{path}/first")
        with pytest.raises(h.CheckpointError, match="still in flight"):
            h.async_save(state, checkpoint_id=f"{path}/second", in_flight="raise")
        first.result(60)
        dist.barrier()
        h.async_save(state, checkpoint_id=f"{path}/second", in_flight="raise").result(60)
        Job.check_given_up = _until_given_up  # type: ignore[method-assign]
        first = h.async_save(state, checkpoint_id=f"{path}/replaced")
        run.optimizer.step()
        second = h.async_save(run.state(), checkpoint_id=f"{path}/second", in_flight="replace")
        Job.check_given_up = _check_given_up  # type: ignore[method-assign]
    with pytest.raises(h.CheckpointError, match="given up for a later one"):
        first.result(60)
    second.result(60)
    run.saved_is(f"{path}/second", run.leaves(run.state()))
    for arguments in ({"snapshot": "eager"}, {"in_flight": "queue"}):
        with pytest.raises(ValueError, match=next(iter(arguments.values()))):
            h.async_save(state, checkpoint_id=path, **arguments)


def test_the_gate_and_what_passes_it(tmp_path: Path) -> None:
    run_ranks(_gates, 4, str(tmp_path))


def _changed_by_any_means(rank: int, path: str) -> None:
    """With everything copied in the call nothing waits for anything: what comes after it can't be
    in the checkpoint."""
    run = _Run(rank)
    placements = next(run.model.parameters()).placements
    ema = DTensor.from_local(torch.full((300_000,), float(rank % 2)), mesh_of((2, 2)), placements)
    means: dict[str, Callable[[torch.Tensor], Any]] = {
        "another tensor": lambda t: with_own_version(t).fill_(3),
        ".data": lambda t: t.data.add_(3),
        "a collective": lambda t: dist.all_reduce(t) if t.is_contiguous() else t.add_(3),
        "an operator": lambda t: t.add_(3),
        "its storage": lambda t: t.untyped_storage().fill_(3),
    }
    for name, change in means.items():
        go_on = threading.Event()
        _C._inject_fault(
            lambda op, path, go_on=go_on: go_on.wait(60) and 0 if op == "pwrite" else 0
        )  # nothing is written yet
        extra = {
            "ema": ema,
            "plain": torch.arange(300_000.0),
            "strided": torch.ones(40, 30).t(),
            "objects": [1, {"two": [2]}],
        }
        state = {**run.state(), **extra}
        expected, objects = run.leaves(state), _plain(state)
        future = h.async_save(state, checkpoint_id=f"{path}/{name}", snapshot="copy")
        assert future.staging_completion.done()
        run.optimizer.step()
        for leaf in torch.utils._pytree.tree_leaves({**run.state(), **extra}):
            if isinstance(leaf, torch.Tensor):
                with torch.no_grad():
                    change(_local(leaf.detach()))
        extra["objects"][1]["two"].append(name)  # type: ignore[index]
        state["model"].clear()
        assert future.step_wait_seconds == 0.0
        assert not future.done()
        go_on.set()
        future.result(60)
        _C._inject_fault(None)
        target = torch.utils._pytree.tree_map(
            lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None,
            {**run.state(), **extra},
        )
        h.load(target, checkpoint_id=f"{path}/{name}")
        assert all(torch.equal(a, b) for a, b in zip(run.leaves(target), expected, strict=True)), (
            name
        )
        assert _plain(target) == objects, name
        run.gradients(1)


def test_snapshot_copy_is_the_state_at_the_call_whatever_comes_after(tmp_path: Path) -> None:
    run_ranks(_changed_by_any_means, 4, str(tmp_path))


def _another_thread(rank: int, path: str) -> None:
    run = _Run(rank)
    between = (
        threading.Lock()
    )  # async_save is called between two steps, as its caller has to see to
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            with between:
                run.gradients(step)
                run.optimizer.step()

    trainer = threading.Thread(target=train)
    trainer.start()
    for i in range(5):
        with between:
            state = run.state()
            expected = run.leaves(state)
            future = h.async_save(state, checkpoint_id=f"{path}/{i}")
        future.result(60)
        target = torch.utils._pytree.tree_map(
            lambda v: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v, state
        )
        h.load(target, checkpoint_id=f"{path}/{i}")
        assert all(torch.equal(a, b) for a, b in zip(run.leaves(target), expected, strict=True)), i
    stop.set()
    trainer.join()


def test_another_thread_trains(tmp_path: Path) -> None:
    run_ranks(_another_thread, 1, str(tmp_path))


class _Around:
    """Somebody's own optimizer, which is none of torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def _ways_to_change(rank: int, path: str) -> None:
    """Steps of any kind wait; averages that are saved along, and states that get other memory, do
    not have to."""

    def scaled(run: _Run) -> None:
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1.0)
        scaler.scale(torch.ones(()))
        scaler.step(run.optimizer)

    def in_a_thread(run: _Run) -> None:
        thread = threading.Thread(target=run.optimizer.step)
        thread.start()
        thread.join()

    def other_states(run: _Run) -> None:
        state = copy.deepcopy(run.optimizer.state_dict())
        for moments in state["state"].values():
            moments["exp_avg"].add_(1)
        run.optimizer.load_state_dict(state)

    def averaged(run: _Run) -> None:
        torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)(run.ema, list(run.model.parameters()), 1)

    def changed(run: _Run, name: str, change: Callable[[_Run], Any]) -> float:
        run.gradients(1)
        run.ema = [p.detach() + 1 for p in run.model.parameters()]
        state = run.state() | {"ema": {str(i): p for i, p in enumerate(run.ema)}}
        expected, ema = run.leaves(run.state()), run.leaves(state["ema"])
        with _Late():
            future = h.async_save(state, checkpoint_id=f"{path}/{name}")
            assert not future.staging_completion.done()
            change(run)
        future.result(60)
        run.saved_is(f"{path}/{name}", expected)
        target = {"ema": {name: torch.zeros_like(value) for name, value in state["ema"].items()}}
        h.load(target, checkpoint_id=f"{path}/{name}")
        assert all(torch.equal(a, b) for a, b in zip(run.leaves(target), ema, strict=True)), name
        after = run.leaves(run.state()) + run.leaves({"ema": run.ema})
        assert not all(torch.equal(a, b) for a, b in zip(after, expected + ema, strict=True)), name
        return future.step_wait_seconds

    run = _Run(rank)
    for change in (
        scaled,
        in_a_thread,
        lambda run: _Around(run.optimizer).step(),
        lambda run: torch.no_grad()(run.optimizer.step)(),
    ):
        assert changed(run, f"waits-{change.__name__}", change) > _LATE / 2, change.__name__
    for options in ({"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}):
        run = _Run(rank)
        run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.1, **options)
        run.optimizer.step()
        assert changed(run, "-".join(options), lambda run: run.optimizer.step()) > _LATE / 2, (
            options
        )
    run = _Run(rank)
    for change in (averaged, other_states):
        assert changed(run, change.__name__, change) == 0.0, change.__name__


def test_ways_to_change_what_is_being_saved(tmp_path: Path) -> None:
    run_ranks(_ways_to_change, 4, str(tmp_path))


def _compiled(rank: int, path: str) -> None:
    run = _Run(rank)
    step = torch.compile(lambda: run.optimizer.step(), backend="eager")
    for i in range(3):  # the first one is traced without a save in flight
        run.gradients(i)
        state = run.state()
        expected = run.leaves(state)
        if i == 0:
            step()
            continue
        with _Late():
            future = h.async_save(state, checkpoint_id=f"{path}/{i}")
            assert not future.staging_completion.done()
            step()
        future.result(60)
        assert future.step_wait_seconds > _LATE / 2
        run.saved_is(f"{path}/{i}", expected)


def test_a_compiled_step_waits_too(tmp_path: Path) -> None:
    run_ranks(_compiled, 1, str(tmp_path))


def _with_copies_only(rank: int, path: str) -> None:
    """A step waits for the ranks' agreement and for copies: not for the save's own thread, which
    may be behind."""
    run = _Run(rank)
    stage, stepped = async_job.stage_late, threading.Event()

    def behind(*arguments: Any) -> Any:
        assert stepped.wait(60), "the step waits for more than copies"
        return stage(*arguments)

    async_job.stage_late = behind
    for i in range(3):
        stepped.clear()
        run.gradients(i)
        state = run.state()
        expected = run.leaves(state)
        future = h.async_save(state, checkpoint_id=f"{path}/{i}")
        run.optimizer.step()
        stepped.set()
        future.result(60)
        run.saved_is(f"{path}/{i}", expected)
    # A change that the step itself finds at the gate fails the save on all ranks, and not the step.
    stepped.clear()
    future = h.async_save(run.state(), checkpoint_id=f"{path}/changed")
    if rank == 2:
        with torch.no_grad():
            next(run.model.parameters()).mul_(2)
    run.optimizer.step()
    stepped.set()
    with pytest.raises(
        h.CheckpointError, match=r"rank 2: .* it was changed while it was being saved"
    ):
        future.result(60)
    with pytest.raises(h.CheckpointError, match="it was changed"):
        h.async_save(run.state(), checkpoint_id=f"{path}/changed")


def test_a_step_waits_for_copies_alone(tmp_path: Path) -> None:
    run_ranks(_with_copies_only, 4, str(tmp_path))


def _on_gpu(rank: int, path: str) -> None:
    run = _Run(rank, "cuda")
    for step in range(4):
        run.gradients(step)
        state = run.state()
        expected = run.leaves(state)
        future = h.async_save(
            state, checkpoint_id=f"{path}/{step}", snapshot="verify" if step == 3 else "lazy"
        )
        run.optimizer.step()  # its kernels are queued behind the copies
        future.result(60)
        run.saved_is(f"{path}/{step}", expected)


@pytest.mark.gpu
def test_the_gate_on_a_gpu(tmp_path: Path) -> None:
    run_ranks(_on_gpu, 1, str(tmp_path), backend="cpu:gloo,cuda:nccl")
