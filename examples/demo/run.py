"""The demo: a reference run, a run killed in the middle of a save, and the same job resumed on
three meshes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from torch_hsdp_ckpt.training import run_directory as checkpoints

from . import crash, data, plot, report
from .journal import Tail
from .launch import Job, JobError
from .progress import Progress

_OURS = ("reference", "job", "one-dimension", "half", "logs", "report.txt", "loss.png", "state.pt")
_MARKER = ".torch_hsdp_ckpt_demo"


class UsageError(Exception):
    """The demo can't run with these arguments; the message is one line for the user."""


@dataclass(frozen=True)
class Options:
    """What to run. ``replicas`` divides ``ranks``; ``model`` holds further arguments for the
    training script."""

    ranks: int = 4
    replicas: int = 2
    steps: int = 30
    directory: Path = Path("demo_run")
    data: tuple[Path, ...] = ()
    model: tuple[str, ...] = ()

    @property
    def save_every(self) -> int:
        """Five saves a run, so that the crash has some before it and one after it."""
        return max(1, self.steps // 5)

    @property
    def crash_step(self) -> int:
        """The save to be killed in: the last but one, or the last one of a run with only two."""
        return max(2, (self.steps - 1) // self.save_every) * self.save_every

    @property
    def half(self) -> tuple[int, int]:
        """Ranks and replicas of a job on half the ranks: it loses replicas first, then shards; 0
        replicas: 1-D."""
        ranks = self.ranks // 2
        if self.replicas % 2 == 0:
            return ranks, self.replicas // 2
        return ranks, self.replicas if ranks and ranks % self.replicas == 0 else 0

    @property
    def batch(self) -> int:
        """Sequences a step: a number that all the meshes divide, 8 if they can."""
        unit = math.lcm(self.ranks, max(1, self.half[0]))
        return unit * math.ceil(8 / unit)


def check(options: Options) -> None:
    """Raises UsageError for what can't work; makes the directory, and clears what an earlier demo
    left in it."""
    if options.ranks < 1 or options.replicas < 1:
        name, value = (
            ("--ranks", options.ranks) if options.ranks < 1 else ("--replicas", options.replicas)
        )
        raise UsageError(f"{name} must be at least 1, got {value}")
    if options.ranks % options.replicas:
        raise UsageError(f"--replicas {options.replicas} does not divide --ranks {options.ranks}")
    if options.steps < 2:
        raise UsageError(
            "--steps must be at least 2 (one save to resume from, one to be killed in), got "
            f"{options.steps}"
        )
    try:
        data.read_text(options.data or None, data.LENGTH)
    except data.DataError as error:
        raise UsageError(str(error)) from None
    directory = options.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not (directory / _MARKER).is_file():
            raise UsageError(
                f"{directory} holds other things than a demo's; name an empty or a new directory "
                "with --dir"
            )
        (directory / _MARKER).write_text(
            "Made by python -m examples.demo, which clears its files here.\n", encoding="utf-8"
        )
        for name in _OURS:
            path = directory / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to the directory {directory}: {error.strerror}") from None


class Demo:
    """One run of the demo in a directory that ``check`` has made ready."""

    def __init__(self, options: Options, stream: TextIO) -> None:
        self.options, self.directory, self.stream = options, options.directory.resolve(), stream
        again = options.steps - options.crash_step + options.save_every
        runs = 3 if options.half[0] else 2
        self.progress = Progress(options.steps + options.crash_step + runs * again, stream)

    def run(self) -> bool:
        """Runs it all, prints the report and returns whether every claim holds. Raises JobError if
        a training run fails."""
        begin = time.monotonic()
        o, root = self.options, self.directory
        mesh = f"{o.replicas} x {o.ranks // o.replicas}"
        reference = self.train("uninterrupted", "reference", o.ranks, o.replicas)
        for _ in range(3):
            crashed, found = self.crash(mesh)
            if found is not None:
                break
            self.progress.note("every save was committed before the kill: once more")
            shutil.rmtree(root / "job")
        else:
            self.finish(
                [report.crash_claim(None, 0, o.ranks)],
                {"time": f"{time.monotonic() - begin:.0f} s"},
            )
            return False
        committed = checkpoints.steps_in(root / "job")[0][-1]
        # Two more jobs take over from the same checkpoint: each gets a copy before the first one
        # goes on and prunes it.
        for name in ("one-dimension", "half") if o.half[0] else ("one-dimension",):
            shutil.copytree(
                checkpoints.path_of(root / "job", committed),
                checkpoints.path_of(root / name, committed),
            )
        same = self.train(
            f"resumed on the same {mesh} mesh",
            "job",
            o.ranks,
            o.replicas,
            "--export",
            str(root / "state.pt"),
        )
        others = [self.train(f"resumed as 1-D FSDP over {o.ranks}", "one-dimension", o.ranks, 0)]
        if o.half[0]:
            others.append(
                self.train(f"resumed on half the ranks ({_shape(*o.half)})", "half", *o.half)
            )
        whole_bytes = sum(
            crash.data_files(checkpoints.path_of(root / "reference", o.steps)).values()
        )
        claims = [
            report.crash_claim(found, whole_bytes, o.ranks),
            report.resume_claim(same, found, committed),
            report.same_bits(reference, same, o.steps),
            *(report.within_rounding(reference, run, o.steps) for run in others),
            *report.stock_claims(self.stock()),
        ]
        start, saves = reference.first("start"), reference.save_seconds()
        figures = {
            "model": f"{start['parameters'] / 1e6:.1f} million parameters on {start['device']}",
            "text": f"{start['bytes'] / 1e6:.1f} MB",
            "checkpoint": f"{report.mebibytes(whole_bytes)} every {o.save_every} steps, {sum(saves) / len(saves):.2f} s a save",
            "lost": f"{found.step - committed} steps (killed at {found.step}, resumed from {committed})",
            "time": f"{time.monotonic() - begin:.0f} s: "
            + " + ".join(f"{run.seconds:.0f}" for run in (reference, crashed, same, *others))
            + f" for the {3 + len(others)} runs, and stock torch's look at the result",
        }
        try:
            plot.save(root / "loss.png", reference, crashed, [same, *others], found)
            figures["picture"] = str(root / "loss.png")
        except plot.NoMatplotlibError as error:
            figures["picture"] = str(error)
        return self.finish(claims, figures)

    def finish(self, claims: list[report.Claim], figures: dict[str, str]) -> bool:
        self.progress.close()
        text = report.text(claims, figures)
        (self.directory / "report.txt").write_text(text + "\n", encoding="utf-8")
        print(text, file=self.stream, flush=True)
        return all(claim.passed for claim in claims)

    def train(self, name: str, directory: str, ranks: int, replicas: int, *more: str) -> report.Run:
        """Runs the training script to its end, resuming where the directory has a checkpoint."""
        run, begin = report.Run(name), time.monotonic()
        tail = Tail(self.directory / directory / "log.jsonl")
        tail.new()  # what a run before left
        with self.job(name, directory, ranks, replicas, *more) as job:
            while job.running():
                self.follow(run, tail)
                time.sleep(0.05)
        self.follow(run, tail)
        run.seconds = time.monotonic() - begin
        return run

    def crash(self, mesh: str) -> tuple[report.Run, crash.Crash | None]:
        """Starts the job that is going to die, and kills it."""
        run, begin = report.Run(f"{mesh}, to be killed"), time.monotonic()
        root, o = self.directory / "job", self.options
        tail = Tail(root / "log.jsonl")
        with self.job(run.name, "job", o.ranks, o.replicas) as job:
            found = crash.kill_in_save(
                job, root, tail, o.crash_step, lambda event: self.seen(run, event)
            )
        run.seconds = time.monotonic() - begin
        if found:
            self.progress.note(f"killed with SIGKILL in the save of step {found.step}")
        return run, found

    def job(self, name: str, directory: str, ranks: int, replicas: int, *more: str) -> Job:
        o = self.options
        arguments = [
            "--dir",
            str(self.directory / directory),
            "--steps",
            str(o.steps),
            "--save-every",
            str(o.save_every),
        ]
        arguments += [
            "--replicas",
            str(replicas),
            "--batch",
            str(o.batch),
            "--resume",
            "latest",
            *o.model,
            *more,
        ]
        if o.data:
            arguments += ["--data", *(str(file.resolve()) for file in o.data)]
        self.progress.advance(name, "starting")
        return Job(name, ranks, arguments, self.directory / "logs" / name.replace(" ", "-"))

    def follow(self, run: report.Run, tail: Tail) -> None:
        for event in tail.new():
            self.seen(run, event)

    def seen(self, run: report.Run, event: dict[str, object]) -> None:
        run.events.append(event)
        if event["event"] == "step":
            self.progress.advance(
                run.name, f"step {event['step']}/{self.options.steps}  loss {event['loss']:.4f}", 1
            )
        elif event["event"] == "save":
            self.progress.advance(run.name, f"step {event['step']}/{self.options.steps}  saving")

    def stock(self) -> dict[str, object]:
        """Has a process that knows stock torch only read the last checkpoint."""
        o, root = self.options, self.directory
        self.progress.advance("stock torch reads the last checkpoint")
        last = [str(checkpoints.path_of(root / name, o.steps)) for name in ("job", "reference")]
        script = Path(__file__).with_name("stock.py").read_text(encoding="utf-8")
        # Through stdin, so that this package's directory is not on its path.
        command: Sequence[str] = [sys.executable, "-", last[0], str(root / "state.pt"), last[1]]
        done = subprocess.run(
            command, input=script, capture_output=True, text=True, cwd=root, check=False
        )
        if done.returncode:
            raise JobError(
                f"stock torch cannot read the checkpoint {last[0]}:\n{done.stderr.strip()}"
            )
        found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return found


def _shape(ranks: int, replicas: int) -> str:
    return f"{replicas} x {ranks // replicas}" if replicas else f"1-D over {ranks}"
