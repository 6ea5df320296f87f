"""Runs tests on simulated GPUs, with each of torch's NCCL classes, at each pace of the device
beside the host, with several seeds: those marked ``gpu``, and those of the wrapper, of state dicts
and of checkpoints that name no device (``test/device.py``).

    python test/simgpu/matrix.py --seeds 3 [pytest's arguments]

A run that fails is named by the command that makes it happen again."""

import argparse
import itertools
import os
import shlex
import sys

import pytest
from torch.torch_version import TorchVersion, __version__

import simgpu

# 2.15's default class is another one; both are asked for by one variable.
CLASSES = {"nccl2": "1", "nccl": "0"} if TorchVersion(__version__) >= "2.15" else {"nccl": "0"}
OK, NO_TESTS = int(pytest.ExitCode.OK), int(pytest.ExitCode.NO_TESTS_COLLECTED)
PACES = ("lazy", "mixed", "eager")
# What is run on the device though it isn't about one.
FILES = """
accumulation any_mesh any_mesh_checkpoint any_mesh_state as_torch as_torchs_fsdp2_tests
as_torchs_state_tests async_faults async_gate async_image async_losses async_plan async_save
comm_hooks extensions fresh_optimizer fsdp fsdp_errors full_state fully_shard hsdp_checkpoint
keys_of_ranks load meta model_groups muon muon_state older_graphs optim_state optimizer_before_wrap
optimizer_groups precision resume save save_bytes schedule state_dict state_dict_options
state_dict_threads storage_kinds tensor_kinds torchs_classes tutorials user_comms whole_tensors
wrapper_autograd wrapper_edges wrapper_outputs wrapper_scalars wrapper_uses
""".split()
# Of that a sample runs, once, what finds most in its time.
SAMPLE = """
comm_hooks extensions fully_shard wrapper_edges wrapper_scalars async_gate state_dict
accumulation::test_beside_fully_shard_with_replicas_and_uneven_ranks
accumulation::test_what_torchs_wrappers_keep
""".split()


def run(nccl: str, pace: str, seed: int, unmarked: list[str], arguments: list[str]) -> bool:
    settings = {
        "TORCH_DIST_USE_NCCL2": CLASSES[nccl],
        "SIMGPU_PACE": pace,
        "SIMGPU_SEED": str(seed),
        "HSDP_CKPT_REQUIRE_GPU": "1",
    }
    print(f"== {nccl}, {pace}, seed {seed}", flush=True)
    statuses = {_pytest(settings, ["-m", "gpu and not real_gpu", *arguments])}
    if unmarked:
        on_device = {**settings, "HSDP_TEST_DEVICE": "cuda", "SIMGPU_DEVICES": "8"}
        paths = [_path(name) for name in unmarked]
        statuses.add(_pytest(on_device, ["-m", "not gpu and not soak", *arguments, *paths]))
    # With -k one of them may have nothing to run.
    return OK in statuses and statuses <= {OK, NO_TESTS}


def _pytest(settings: dict[str, str], arguments: list[str]) -> int:
    """pytest's exit status; if it fails, prints how to run it alone."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    before = dict(os.environ)
    os.environ.update(settings)
    status = simgpu.run(command)
    os.environ.clear()
    os.environ.update(before)
    if status in (OK, NO_TESTS):
        return status
    words = [f"{name}={value}" for name, value in settings.items()]
    program = os.path.relpath(simgpu.__file__)
    print("FAILED:", shlex.join([*words, "python", program, *command]), flush=True)
    return status


def _path(name: str) -> str:
    """pytest's, of a file or of one of its tests."""
    file, separator, test = name.partition("::")
    return f"test/test_{file}.py{separator}{test}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--sample", action="store_true", help="each class at another pace, some tests"
    )
    parser.add_argument("--pace", choices=PACES, action="append")
    parser.add_argument("--nccl", choices=list(CLASSES), action="append")
    options, arguments = parser.parse_known_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    cases = list(itertools.product(options.nccl or CLASSES, options.pace or PACES, seeds))
    if options.sample:
        cases = list(zip(CLASSES, PACES, itertools.count(options.first_seed)))
    failed = []
    for case in cases:
        unmarked = FILES if not options.sample else SAMPLE if case == cases[0] else []
        if not run(*case, unmarked, arguments):
            failed.append(case)
    for nccl, pace, seed in failed:
        print(f"FAILED: {nccl}, {pace}, seed {seed}, see above")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
