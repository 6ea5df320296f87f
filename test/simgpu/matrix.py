"""Runs the tests marked ``gpu`` on simulated GPUs: with each of torch's NCCL classes, at each pace
of the device beside the host, with several seeds.

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


def run(nccl: str, pace: str, seed: int, arguments: list[str]) -> bool:
    settings = {
        "TORCH_DIST_USE_NCCL2": CLASSES[nccl],
        "SIMGPU_PACE": pace,
        "SIMGPU_SEED": str(seed),
        "HSDP_CKPT_REQUIRE_GPU": "1",
    }
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    print(f"== {nccl}, {pace}, seed {seed}: {words}", flush=True)
    os.environ.update(settings)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not real_gpu", *arguments]
    return simgpu.run(command) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--sample", action="store_true", help="each class at another pace")
    parser.add_argument("--pace", choices=PACES, action="append")
    parser.add_argument("--nccl", choices=list(CLASSES), action="append")
    options, arguments = parser.parse_known_args()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    cases = list(itertools.product(options.nccl or CLASSES, options.pace or PACES, seeds))
    if options.sample:
        cases = list(zip(CLASSES, PACES, itertools.count(options.first_seed)))
    failed = [case for case in cases if not run(*case, arguments)]
    for nccl, pace, seed in failed:
        print(f"FAILED: {nccl}, {pace}, seed {seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
