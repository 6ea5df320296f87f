"""Runs tests on simulated GPUs, with each of torch's NCCL classes, at each pace of the device
beside the host, with several seeds: those marked ``gpu``, and those of the wrapper, of state dicts
and of checkpoints that name no device (``test/device.py``).

    python test/simgpu/matrix.py --seeds 3 [pytest's arguments]

A run that fails is named by what makes it happen again."""

import argparse
import itertools
import os
import sys

from torch.torch_version import TorchVersion, __version__

import simgpu

# 2.15's default class is another one; both are asked for by one variable.
CLASSES = {"nccl2": "1", "nccl": "0"} if TorchVersion(__version__) >= "2.15" else {"nccl": "0"}
PACES = ("lazy", "mixed", "eager")
# What is run on the device though it isn't about one. Of these a sample takes the first ones, once.
FILES = """
fully_shard wrapper_edges meta wrapper_scalars resume
as_torchs_fsdp2_tests async_faults fsdp_errors older_graphs save wrapper_outputs wrapper_uses
""".split()
SAMPLE = 5


def run(nccl: str, pace: str, seed: int, files: int, arguments: list[str]) -> bool:
    settings = {
        "TORCH_DIST_USE_NCCL2": CLASSES[nccl],
        "SIMGPU_PACE": pace,
        "SIMGPU_SEED": str(seed),
        "HSDP_CKPT_REQUIRE_GPU": "1",
    }
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    print(f"== {nccl}, {pace}, seed {seed}: {words}", flush=True)
    os.environ.update(settings)
    pytest = [sys.executable, "-m", "pytest", "-q"]
    marked = simgpu.run([*pytest, "-m", "gpu and not real_gpu", *arguments])
    if files == 0:
        return marked == 0
    os.environ.update(HSDP_TEST_DEVICE="cuda", SIMGPU_DEVICES="8")
    paths = [f"test/test_{name}.py" for name in FILES[:files]]
    unmarked = simgpu.run([*pytest, "-m", "not gpu and not soak", *arguments, *paths])
    for name in ("HSDP_TEST_DEVICE", "SIMGPU_DEVICES"):
        del os.environ[name]
    return marked == 0 and unmarked == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--sample", action="store_true", help="each class at another pace, some files"
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
        files = len(FILES) if not options.sample else SAMPLE if case == cases[0] else 0
        if not run(*case, files, arguments):
            failed.append(case)
    for nccl, pace, seed in failed:
        print(f"FAILED: {nccl}, {pace}, seed {seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
