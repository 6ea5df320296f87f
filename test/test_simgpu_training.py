"""The same program on the CPU with Gloo, on devices with NCCL, and there with torch's fully_shard:
the same bits in losses, gradients and parameters, whatever the device is at when the host goes on.

Two terms have one sum: replicas and shards of two are compared to the bit. Of four shards Gloo's
reduction sums in the order of the ranks (``csrc/hsdp/host_reduction.h``), NCCL's ring from the
rank behind the owner on, up to the owner: those differ by rounding, and agree with torch's."""

import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device import OnDevice
from models import Net, batch
from ranks import SIMULATED, Messages, run_ranks
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp import fully_shard as torchs_fully_shard
from torch.utils.checkpoint import checkpoint
from training import full, loss_of, mesh_of

import torch_hsdp_ckpt as h

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 4, reason="NCCL takes a device for each rank"),
]
BF16, FP32 = torch.bfloat16, torch.float32
BACKEND = "cpu:gloo,cuda:nccl"
STEPS, MICROBATCHES = 3, 2
Results = dict[str, torch.Tensor]


class Recomputed(Net):
    """Its blocks are activation checkpoints."""

    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class RecomputedReentrant(Recomputed):
    reentrant = True


def _one_unit_ahead(model: Any) -> None:
    blocks = list(model.blocks)
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def _waits_for_the_last(model: Any, micro: int) -> None:
    model.set_requires_gradient_sync(micro == MICROBATCHES - 1)


def _all_reduces_the_last(model: Any, micro: int) -> None:
    model.set_requires_all_reduce(micro == MICROBATCHES - 1)


def _nothing(*_: Any) -> None: ...


class Program:
    """What is trained, and how: ``before`` once, ``each`` before every microbatch."""

    def __init__(
        self,
        net: type[Net] = Net,
        shape: tuple[int, ...] = (2, 2),
        param: torch.dtype | None = None,
        before: Callable[[Any], None] = _nothing,
        each: Callable[[Any, int], None] = _nothing,
        offload: OffloadPolicy | None = None,
    ) -> None:
        self.offload = offload or OffloadPolicy()
        self.net, self.shape, self.before, self.each = net, shape, before, each
        self.policy = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=param and FP32)

    def model(self, face: Callable[..., Any], device: str) -> Any:
        torch.manual_seed(0)
        with torch.device("cpu"):  # the CPU's random numbers on every device
            net = self.net(40, 72, 3, 3)
        net.to(device)
        for module in (*net.blocks, net):
            face(
                module,
                mesh=mesh_of(self.shape, device),
                mp_policy=self.policy,
                offload_policy=self.offload,
            )
        self.before(net)
        return net

    def train(self, model: Any, rank: int, device: str) -> Iterator[Results]:
        """After each step: its losses, the gradients and the parameters, as they are queued."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        for step in range(STEPS):
            results: Results = {}
            for micro in range(MICROBATCHES):
                self.each(model, micro)
                x = batch(model, MICROBATCHES * step + micro, rank).to(device)
                x = x.to(self.policy.param_dtype or FP32).requires_grad_()  # for checkpoints
                loss = model(x).float().square().mean()
                loss.backward()
                results[f"loss {micro}"] = loss.detach().clone()
            optimizer.step()
            for name, p in model.named_parameters():
                results[name] = p.detach().to_local().clone()
                results[f"{name}.grad"] = p.grad.to_local().clone()
            optimizer.zero_grad()
            yield results


PROGRAMS = {
    "HSDP": Program(),
    "FSDP": Program(shape=(4,)),
    "mixed precision": Program(param=BF16),
    "checkpoints": Program(Recomputed),
    "reentrant checkpoints": Program(RecomputedReentrant),
    "no synchronisation": Program(each=_waits_for_the_last),
    "no synchronisation in bfloat16": Program(param=BF16, each=_waits_for_the_last),
    "partial all-reduce": Program(each=_all_reduces_the_last),
    "prefetching": Program(before=_one_unit_ahead),
    "offloaded": Program(offload=CPUOffloadPolicy()),
    "offloaded, pageable": Program(shape=(4,), offload=CPUOffloadPolicy(pin_memory=False)),
    "offloaded in bfloat16": Program(
        param=BF16, each=_waits_for_the_last, offload=CPUOffloadPolicy()
    ),
}


def _on_host(steps: Iterator[Results]) -> list[Results]:
    """Nothing is waited for before all steps are queued."""
    return [{name: value.cpu() for name, value in step.items()} for step in list(steps)]


def _same(ours: list[Results], others: list[Results], where: str, rounds: bool = False) -> None:
    for step, (a, b) in enumerate(zip(ours, others, strict=True)):
        assert a.keys() == b.keys()
        for name, value in a.items():
            tolerance = 1e-5 if rounds else 0.0
            torch.testing.assert_close(
                value, b[name], rtol=tolerance, atol=tolerance, msg=f"{where}: {name}, {step}"
            )


def _trained(name: str, face: Callable[..., Any], rank: int, device: str) -> list[Results]:
    program = PROGRAMS[name]
    return _on_host(program.train(program.model(face, device), rank, device))


def _same_bits(rank: int) -> None:
    # Torch's own wrapper comes last: it is no good for what the simulator finds from there on.
    on_device = {name: _trained(name, h.fully_shard, rank, "cuda") for name in PROGRAMS}
    for name, ours in on_device.items():
        rounds = PROGRAMS[name].shape == (4,)
        with OnDevice("cpu"):
            _same(ours, _trained(name, h.fully_shard, rank, "cpu"), f"{name}: the CPU", rounds)
    for name, ours in on_device.items():
        _same(ours, _trained(name, torchs_fully_shard, rank, "cuda"), f"{name}: torch's")


def _summoned(rank: int) -> None:
    """Full parameters that are changed between two steps."""
    trained = []
    for device in ("cuda", "cpu"):
        program = PROGRAMS["HSDP"]
        model = program.model(h.fully_shard, device)
        steps: list[Results] = []
        for results in program.train(model, rank, device):
            steps.append(results)
            with h.FullyShardedDataParallel.summon_full_params(model), torch.no_grad():
                model.head.weight.mul_(0.5)
        trained.append(_on_host(iter(steps)))
    _same(*trained, "summon_full_params")


def _state_of_queued_steps(rank: int) -> None:
    """A state dict that is taken while its step is queued has that step's values."""
    taken = []
    for device in ("cuda", "cpu"):
        program = PROGRAMS["HSDP"]
        model = program.model(h.fully_shard, device)
        states = [
            {name: full(value).clone() for name, value in model.state_dict().items()}
            for _ in program.train(model, rank, device)
        ]
        taken.append(_on_host(iter(states)))
    _same(*taken, "state_dict")


def test_the_bits_are_the_cpus_and_torchs() -> None:
    run_ranks(_in_turn, 4, backend=BACKEND, timeout=300.0)


def _in_turn(rank: int) -> None:
    for check in (_summoned, _state_of_queued_steps, _same_bits):
        check(rank)


def _device_is(pace: str, seed: int = 7) -> None:
    if SIMULATED:
        torch.cuda.synchronize()
        sys.modules["simgpu_aten"].restart(seed, pace)


def _on_one_queue(rank: int) -> None:
    for name in ("HSDP", "no synchronisation in bfloat16", "prefetching"):
        trained = []
        for seed, pace in enumerate(("eager", "mixed", "lazy")):
            _device_is(pace, seed)
            trained.append(_trained(name, h.fully_shard, rank, "cuda"))
        for results in trained[1:]:
            _same(results, trained[0], name)


def test_gathers_and_reductions_in_one_hardware_queue() -> None:
    """Their communicators are separate: where a device has one queue for all streams, a gather that
    waits for its peers holds up the reduction that is behind it, and the other way round."""
    settings = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    run_ranks(_on_one_queue, 4, backend=BACKEND, timeout=300.0, settings=settings)


def _saves(rank: int, path: str) -> None:
    """What is saved is the state at the call, though the device may not be there yet."""
    program = PROGRAMS["HSDP"]
    options: list[dict[str, Any]] = [
        {"snapshot": "lazy"},
        {"snapshot": "copy"},
        {"snapshot": "verify"},
        {"snapshot": "lazy", "max_staging_bytes": 8 << 10},
        {"snapshot": "verify", "max_staging_bytes": 0},
    ]
    for number, how in enumerate(options):
        _device_is(("lazy", "eager")[number % 2])
        model = program.model(h.fully_shard, "cuda")
        expected: list[Results] = []
        saves = []
        for step, results in enumerate(program.train(model, rank, "cuda")):
            expected.append(results)
            to = f"{path}/{number}-{step}"
            saves.append(h.async_save({"model": model.state_dict()}, checkpoint_id=to, **how))
        for step, save in enumerate(saves):
            save.result(60)
            state = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
            h.load({"model": state}, checkpoint_id=f"{path}/{number}-{step}")
            for name, _ in model.named_parameters():
                assert torch.equal(state[name].to_local(), expected[step][name]), (how, name)


def test_asynchronous_saves_of_queued_steps(tmp_path: Path) -> None:
    run_ranks(_saves, 4, str(tmp_path), backend=BACKEND, timeout=300.0)


simulated = pytest.mark.skipif(not SIMULATED, reason="the memory of a real device is large")


def _nothing_to_pin(rank: int, path: str) -> None:
    told = Messages()
    logging.getLogger("torch_hsdp_ckpt").addHandler(told)
    state = {
        "w": torch.arange(3_000_000.0, device="cuda") + rank,
        "strided": torch.ones(500, 300, device="cuda").t(),
    }
    blank = {name: torch.zeros_like(value) for name, value in state.items()}
    for number, save in enumerate((h.async_save, h.async_save, h.save)):
        future = save(state, checkpoint_id=f"{path}/{rank}-{number}", no_dist=True)
        state["w"].mul_(1.0)  # a kernel behind the refusal, which it has nothing to do with
        if isinstance(future, h.AsyncSave):
            future.result(60)
        h.load(blank, checkpoint_id=f"{path}/{rank}-{number}", no_dist=True)
        assert all(torch.equal(blank[name], value) for name, value in state.items())
    assert len([text for text in told.texts if "can't be pinned" in text]) == 1, told.texts


@simulated
def test_without_memory_that_can_be_pinned(tmp_path: Path) -> None:
    run_ranks(
        _nothing_to_pin, 1, str(tmp_path), backend=BACKEND, settings={"SIMGPU_PINNED_MB": "1"}
    )


def _too_large(rank: int) -> None:
    """Every rank runs out of memory in the same place, and trains on as if nothing had been."""
    program = PROGRAMS["HSDP"]
    after, undisturbed = (program.model(h.fully_shard, "cuda") for _ in range(2))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            loss_of(after, torch.ones(100_000, 40, device="cuda")).backward()
        after.zero_grad()
        _same(
            _on_host(program.train(after, rank, "cuda")),
            _on_host(program.train(undisturbed, rank, "cuda")),
            "after running out of memory",
        )


@simulated
def test_out_of_device_memory() -> None:
    run_ranks(_too_large, 4, backend=BACKEND, settings={"SIMGPU_DEVICE_MB": "96"})
