"""The command line: ``python -m torch_hsdp_ckpt demo``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all subcommands; each sets ``main``: parsed arguments in, exit code out."""
    top = _Parser(
        prog="torch_hsdp_ckpt", description="Hybrid-sharded data parallelism and durable sharded checkpoints for PyTorch"
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small GPT, kill the job in the middle of a save, resume it on three meshes",
        description="Trains a byte-level GPT under HSDP, kills the job in the middle of a save, resumes it on the same mesh, "
        "as 1-D FSDP and on half the ranks, and checks that nothing was lost but the steps since the last save.",
    )
    demo.add_argument("--data", nargs="+", type=Path, default=[], metavar="FILE", help="text (default: Python's own sources)")
    demo.add_argument("--ranks", type=int, default=4, help="processes (default 4)")
    demo.add_argument("--replicas", type=int, default=2, help="the mesh is REPLICAS x RANKS/REPLICAS (default 2)")
    demo.add_argument("--steps", type=int, default=30, help="training steps (default 30)")
    demo.add_argument("--dir", type=Path, default=Path("demo_run"), help="logs, checkpoints, picture (default demo_run)")
    demo.set_defaults(main=_demo)
    return top


def _demo(args: argparse.Namespace) -> int:
    from .demo import launch, run

    prog = "torch_hsdp_ckpt demo"
    options = run.Options(args.ranks, args.replicas, args.steps, args.dir, tuple(args.data))
    try:
        run.check(options)
    except run.UsageError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the training processes are ended before us
        signal.signal(number, signal.default_int_handler)
    try:
        return 0 if run.Demo(options, sys.stdout).run() else 1
    except launch.JobError as error:
        print(f"\n{prog}: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; the training processes have been ended", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that ``argv`` (default: the process's own arguments) names and returns the exit code."""
    args = parser().parse_args(argv)
    code: int = args.main(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
