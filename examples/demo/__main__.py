"""The command line: ``python -m examples.demo``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import launch, run


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Returns the demo's parser."""
    demo = _Parser(
        prog="examples.demo",
        description="Trains a byte-level GPT under HSDP, kills the job in the middle of a save, "
        "resumes it on the same mesh, as 1-D FSDP and on half the ranks, and checks that nothing "
        "was lost but the steps since the last save.",
    )
    demo.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="text (default: Python's own sources)",
    )
    demo.add_argument("--ranks", type=int, default=4, help="processes (default 4)")
    demo.add_argument(
        "--replicas", type=int, default=2, help="the mesh is REPLICAS x RANKS/REPLICAS (default 2)"
    )
    demo.add_argument("--steps", type=int, default=30, help="training steps (default 30)")
    demo.add_argument(
        "--dir",
        type=Path,
        default=Path("demo_run"),
        help="logs, checkpoints, picture (default demo_run)",
    )
    return demo


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo with ``argv`` (default: the process's own arguments) and returns the exit
    code."""
    args = parser().parse_args(argv)
    prog = "examples.demo"
    options = run.Options(args.ranks, args.replicas, args.steps, args.dir, tuple(args.data))
    try:
        run.check(options)
    except run.UsageError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    # As Ctrl-C: the training processes are ended before us.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return 0 if run.Demo(options, sys.stdout).run() else 1
    except launch.JobError as error:
        print(f"\n{prog}: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; the training processes have been ended", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
