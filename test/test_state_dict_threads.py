"""State dicts while the module runs: in another thread, in its own hooks, and what two threads have
to wait for."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from models import NETS, batch
from ranks import run_ranks
from states import assert_same, bits, fully_sharded, mesh_of, wrapped
from torch import nn
from torch.distributed.tensor import DTensor

from torch_hsdp_ckpt import FSDPModule, StateDictType
from torch_hsdp_ckpt import FullyShardedDataParallel as FSDP


def _wrapped_as(face: str, kind: str) -> nn.Module:
    return (wrapped if face == "class" else fully_sharded)(NETS[kind](), mesh_of(2, 2))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, rank: int) -> None:
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(
            False
        )  # its last gradients are on their way when the next forward begins,
        model(batch(NETS["even"](), number + 1000, rank)).square().mean().backward()
        model.set_is_last_backward(True)
        model.head.bias.requires_grad_(number % 2 == 1)  # which binds the unit's parameters anew
    model(batch(NETS["even"](), number, rank)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _read_beside(rank: int, face: str) -> None:
    """Every rank's reader goes at a pace of its own, and one starts before the first forward has
    made the root."""
    model = _wrapped_as(face, "even")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {name: p._local_tensor.data_ptr() for name, p in model.named_parameters()}
    begun, enough = threading.Event(), threading.Event()

    def read() -> None:
        for count in range(30):
            named = (
                FSDP.optim_state_dict(model, optimizer)["param_groups"][0]["params"]
                if count % 10 == 0
                else expected
            )
            state = model.state_dict()
            assert list(named) == list(expected)
            assert {name: state[name]._local_tensor.data_ptr() for name in expected} == expected
            begun.set()
            time.sleep(0.0005 * rank)

    with ThreadPoolExecutor() as threads:
        reader = threads.submit(read)
        reader.add_done_callback(lambda _: enough.set())
        if rank == 0:
            begun.wait()
        steps, done = 0, torch.zeros(1)
        while not done:
            _train(model, optimizer, steps, rank)
            steps += 1
            done.fill_(enough.is_set())
            dist.all_reduce(done, dist.ReduceOp.MIN)
        reader.result()
    alone = _wrapped_as(face, "even")
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for number in range(steps):
        _train(alone, optimizer, number, rank)
    assert_same(model.state_dict(), alone.state_dict())


def _read_inside(rank: int, face: str) -> None:
    """Hooks of a forward and of a backward read; what would free or gather is refused there, and in
    another thread."""
    x = batch(NETS["uneven"](), 0, rank)
    reference = _wrapped_as(face, "uneven")
    reference(x).square().mean().backward()
    model = _wrapped_as(face, "uneven")
    bits_before = bits(model.state_dict())
    seen: list[str] = []

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other_threads = ThreadPoolExecutor()
    waiting: list[Future] = []
    after: list[list[str]] = []

    def read_in_another_graph() -> None:
        """Its hook is no part of this module's backward, and waits for that to end."""
        x = torch.ones(1, requires_grad=True)
        y = 2 * x
        y.register_hook(
            lambda _: after.append(list(model.state_dict())) or after.append(list(seen))
        )
        y.backward()

    def look(where: str) -> None:
        for name, value in model.state_dict().items():
            assert (
                torch.equal(value._local_tensor, bits_before[name])
                if isinstance(value, DTensor)
                else name == "calls"
            )
        with pytest.raises(
            RuntimeError, match=rf"^rank {rank}: .*forward or backward of this thread"
        ):
            model.zero_grad()
        with ThreadPoolExecutor() as threads:
            if face == "class":
                with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
                    with pytest.raises(RuntimeError, match="between the same steps"):
                        threads.submit(model.state_dict).result()
                    with pytest.raises(
                        RuntimeError,
                        match=f"rank {rank}: the whole optimizer state .* between the same steps",
                    ):
                        threads.submit(FSDP.optim_state_dict, model, optimizer).result()
            if where == "forward":
                with pytest.raises(
                    RuntimeError, match=rf"rank {rank}: module \(outermost\).*another thread"
                ):
                    threads.submit(model, x).result()
        if where == "backward":
            waiting.append(other_threads.submit(read_in_another_graph))
            with pytest.raises(TimeoutError):
                waiting[0].result(timeout=0.2)
        seen.append(where)

    inner = model.blocks[1].up
    inner.register_forward_hook(lambda *_: look("forward"))
    inner.register_full_backward_hook(lambda *_: look("backward"))
    model(x).square().mean().backward()
    assert seen == ["forward", "backward"]
    waiting[0].result()
    assert after == [list(bits_before), seen]
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad._local_tensor, q.grad._local_tensor)


def _settings_wait(rank: int) -> None:
    """Another thread's unshard() and reshard() wait for the backward that is under way here, which
    computes what it would."""
    x = batch(NETS["uneven"](), 0, rank)
    model, reference = (_wrapped_as("function", "uneven") for _ in range(2))
    reference(x).square().mean().backward()
    for ask in (model.blocks[0].reshard, model.blocks[0].unshard):
        with ThreadPoolExecutor() as threads:
            waiting: list[Future] = []

            def look(*_: object, ask=ask, waiting=waiting, threads=threads) -> None:
                waiting.append(threads.submit(ask))
                with pytest.raises(TimeoutError):
                    waiting[0].result(timeout=0.2)

            handle = model.blocks[1].up.register_full_backward_hook(look)
            model.zero_grad()
            model(x).square().mean().backward()
            handle.remove()
            waiting[0].result()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            if isinstance(p, DTensor):  # the first block's are whole now
                assert torch.equal(p.grad._local_tensor, q.grad._local_tensor)
    assert not isinstance(model.blocks[0].up.weight, DTensor)
    model.blocks[0].reshard()
    assert isinstance(model.blocks[0].up.weight, DTensor)


class _Asks:
    """A key of an optimizer's state: what is done when its name is asked for, which is on the way
    to the gathers."""

    def __init__(self, ask: Callable[[], None]) -> None:
        self.ask = ask

    def __str__(self) -> str:
        self.ask()
        return "asks"


def _gathers_in_its_turn(rank: int) -> None:
    """A forward that another thread begins while whole states are gathered waits for them."""
    model = _wrapped_as("class", "even")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _train(model, optimizer, 0, rank)
    x = batch(NETS["even"](), 0, rank)
    expected = model(x).detach()
    forwards: list[Future] = []

    def begin_forward() -> None:
        if not forwards:
            forwards.append(threads.submit(model, x))
            with pytest.raises(TimeoutError):
                forwards[0].result(timeout=0.1)

    for whole in (
        lambda: FSDP.full_optim_state_dict(model, optimizer, rank0_only=False),
        lambda: FSDP.optim_state_dict(model, optimizer),
    ):
        with (
            ThreadPoolExecutor() as threads,
            FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT),
        ):
            optimizer.state[next(model.parameters())] |= {_Asks(begin_forward): 1}
            state = whole()["state"]
            assert {type(value["momentum_buffer"]) for value in state.values()} == {torch.Tensor}
            assert torch.equal(forwards.pop().result(), expected)
            optimizer.state[next(model.parameters())].popitem()


def _roots_of_two_models(rank: int) -> None:
    """One model's first forward waits for a peer that comes when another model's state has been
    read here."""
    one, two = _wrapped_as("class", "even"), _wrapped_as("function", "even")
    begun = threading.Event()
    one.register_forward_pre_hook(lambda *_: begun.set())
    turn = torch.zeros(1)
    with ThreadPoolExecutor() as threads:
        if rank == 3:
            dist.recv(turn, src=0)
        out = threads.submit(one, batch(NETS["even"](), 0, rank))
        begun.wait()
        if rank == 0:
            time.sleep(
                0.1
            )  # it is on its way to its peers, or its peers have to wait a little longer
            assert not out.done() and list(two.state_dict()) == list(NETS["even"]().state_dict())
            dist.send(turn, dst=3)
        assert out.result().isfinite().all()


def _read_while_it_runs(rank: int) -> None:
    torch.set_num_threads(1)
    for face in ("class", "function"):
        _read_beside(rank, face)
        _read_inside(rank, face)
    _settings_wait(rank)
    _gathers_in_its_turn(rank)
    _roots_of_two_models(rank)


def test_state_dict_while_the_module_runs() -> None:
    run_ranks(_read_while_it_runs, 4)
