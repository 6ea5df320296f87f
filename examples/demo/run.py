"""The demo: a reference run, a run killed in the middle of a save, and the same job resumed on
three meshes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from . import checkpoints, crash, data, plot, report
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
        saves_before_the_last_step = (self.steps - 1) // self.save_every
        return max(2, saves_before_the_last_step) * self.save_every

    @property
    def half(self) -> tuple[int, int]:
        """Ranks and replicas of a job on half the ranks: it loses replicas first, then shards; 0
        replicas: 1-D."""
        ranks = self.ranks // 2
        if self.replicas % 2 == 0:
            return ranks, self.replicas // 2
        keeps_replicas = ranks > 0 and ranks % self.replicas == 0
        return ranks, self.replicas if keeps_replicas else 0

    @property
    def batch(self) -> int:
        """Sequences a step: a number that all the meshes divide, 8 if they can."""
        unit = math.lcm(self.ranks, max(1, self.half[0]))
        return unit * math.ceil(8 / unit)


@dataclass(frozen=True)
class Training:
    """One training run to be started; it resumes where ``directory`` (a name under the demo's) has
    a checkpoint. ``replicas`` 0: 1-D FSDP. ``more``: further arguments for the script."""

    name: str
    directory: str
    ranks: int
    replicas: int
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Killed:
    """The run that was killed, what its last save left, and the newest committed step."""

    run: report.Run
    crash: crash.Crash
    committed: int


def check(options: Options) -> None:
    """Raises UsageError for what can't work; makes the directory, and clears what an earlier demo
    left in it."""
    for name, value in (("--ranks", options.ranks), ("--replicas", options.replicas)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if options.ranks % options.replicas:
        raise UsageError(f"--replicas {options.replicas} does not divide --ranks {options.ranks}")
    if options.steps < 2:
        why = "one save to resume from, one to be killed in"
        raise UsageError(f"--steps must be at least 2 ({why}), got {options.steps}")
    try:
        data.read_text(options.data or None, data.LENGTH)
    except data.DataError as error:
        raise UsageError(str(error)) from None
    try:
        _make_empty(options.directory)
    except OSError as error:
        problem = f"cannot write to the directory {options.directory}: {error.strerror}"
        raise UsageError(problem) from None


def _make_empty(directory: Path) -> None:
    """Makes the demo's directory, and deletes what an earlier demo left in it, nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / _MARKER
    if any(directory.iterdir()) and not marker.is_file():
        raise UsageError(
            f"{directory} holds other things than a demo's; name an empty or a new directory "
            "with --dir"
        )
    says = "Made by python -m examples.demo, which clears its files here.\n"
    marker.write_text(says, encoding="utf-8")
    for name in _OURS:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Demo:
    """One run of the demo in a directory that ``check`` has made ready."""

    def __init__(self, options: Options, stream: TextIO) -> None:
        self.options, self.stream = options, stream
        self.directory = options.directory.resolve()
        steps_after_resume = options.steps - options.crash_step + options.save_every
        resumed_runs = 3 if options.half[0] else 2
        steps = options.steps + options.crash_step + resumed_runs * steps_after_resume
        self.progress = Progress(steps, stream)

    def run(self) -> bool:
        """Runs it all, prints the report and returns whether every claim holds. Raises JobError if
        a training run fails."""
        begin, o = time.monotonic(), self.options
        reference = self.train(Training("uninterrupted", "reference", o.ranks, o.replicas))
        killed = self.kill_in_save()
        if killed is None:
            figures = {"time": f"{time.monotonic() - begin:.0f} s"}
            return self.finish([report.crash_claim(None, 0, o.ranks)], figures)
        # Other jobs take over from the same checkpoint: each gets a copy before the first one goes
        # on and prunes it.
        others = self.other_meshes()
        for other in others:
            self.copy_checkpoint(killed.committed, other.directory)
        same = self.train(self.same_mesh())
        runs = report.Runs(reference, killed.run, same, [self.train(other) for other in others])
        whole_bytes = self.checkpoint_bytes()
        claims = [
            report.crash_claim(killed.crash, whole_bytes, o.ranks),
            *report.training_claims(runs, killed.crash, killed.committed, o.steps),
            *report.stock_claims(self.read_with_stock_torch()),
        ]
        figures = report.figures(runs, killed.crash, killed.committed, whole_bytes, o.save_every)
        figures["time"] = report.times(runs, time.monotonic() - begin)
        figures["picture"] = self.draw(runs, killed.crash)
        return self.finish(claims, figures)

    def same_mesh(self) -> Training:
        """The job that was killed, started again as it was; at its end it exports its state."""
        o = self.options
        export = ("--export", str(self.directory / "state.pt"))
        name = f"resumed on the same {_shape(o.ranks, o.replicas)} mesh"
        return Training(name, "job", o.ranks, o.replicas, export)

    def other_meshes(self) -> list[Training]:
        """The jobs that resume on meshes that the checkpoint was not saved on."""
        o, (ranks, replicas) = self.options, self.options.half
        one = Training(f"resumed as 1-D FSDP over {o.ranks}", "one-dimension", o.ranks, 0)
        if ranks == 0:
            return [one]
        name = f"resumed on half the ranks ({_shape(ranks, replicas)})"
        return [one, Training(name, "half", ranks, replicas)]

    def copy_checkpoint(self, step: int, directory: str) -> None:
        source = checkpoints.path_of(self.directory / "job", step)
        shutil.copytree(source, checkpoints.path_of(self.directory / directory, step))

    def checkpoint_bytes(self) -> int:
        """Returns the size of the data files of a whole checkpoint."""
        last = checkpoints.path_of(self.directory / "reference", self.options.steps)
        return sum(checkpoints.data_files(last).values())

    def draw(self, runs: report.Runs, found: crash.Crash) -> str:
        """Draws the picture, and returns its path, or why there is none."""
        path = self.directory / "loss.png"
        try:
            plot.save(path, runs.reference, runs.killed, [runs.same, *runs.others], found)
        except plot.NoMatplotlibError as error:
            return str(error)
        return str(path)

    def finish(self, claims: list[report.Claim], figures: dict[str, str]) -> bool:
        self.progress.close()
        text = report.text(claims, figures)
        (self.directory / "report.txt").write_text(text + "\n", encoding="utf-8")
        print(text, file=self.stream, flush=True)
        return all(claim.passed for claim in claims)

    def train(self, training: Training) -> report.Run:
        """Runs the training script to its end."""
        run, begin = report.Run(training.name), time.monotonic()
        tail = Tail(self.directory / training.directory / "log.jsonl")
        tail.new()  # what a run before left
        with self.job(training) as job:
            while job.running():
                self.follow(run, tail)
                time.sleep(0.05)
        self.follow(run, tail)
        run.seconds = time.monotonic() - begin
        return run

    def kill_in_save(self) -> Killed | None:
        """Starts the job that is going to die, and kills it in a save. None if every save of three
        tries was committed before the kill."""
        root = self.directory / "job"
        for _ in range(3):
            run, found = self.try_to_kill()
            if found is not None:
                self.progress.note(f"killed with SIGKILL in the save of step {found.step}")
                return Killed(run, found, checkpoints.steps_in(root).committed[-1])
            self.progress.note("every save was committed before the kill: once more")
            shutil.rmtree(root)
        return None

    def try_to_kill(self) -> tuple[report.Run, crash.Crash | None]:
        o, root = self.options, self.directory / "job"
        begin = time.monotonic()
        run = report.Run(f"{_shape(o.ranks, o.replicas)}, to be killed")
        tail = Tail(root / "log.jsonl")

        def seen(event: dict[str, object]) -> None:
            self.seen(run, event)

        with self.job(Training(run.name, "job", o.ranks, o.replicas)) as job:
            found = crash.kill_in_save(job, root, tail, o.crash_step, seen)
        run.seconds = time.monotonic() - begin
        return run, found

    def job(self, training: Training) -> Job:
        """Starts the training script."""
        o = self.options
        options: dict[str, object] = {
            "--dir": self.directory / training.directory,
            "--steps": o.steps,
            "--save-every": o.save_every,
            "--replicas": training.replicas,
            "--batch": o.batch,
            "--resume": "latest",
        }
        arguments = [str(word) for option in options.items() for word in option]
        arguments += [*o.model, *training.more]
        if o.data:
            arguments += ["--data", *(str(file.resolve()) for file in o.data)]
        self.progress.advance(training.name, "starting")
        logs = self.directory / "logs" / training.name.replace(" ", "-")
        return Job(training.name, training.ranks, arguments, logs)

    def follow(self, run: report.Run, tail: Tail) -> None:
        for event in tail.new():
            self.seen(run, event)

    def seen(self, run: report.Run, event: dict[str, object]) -> None:
        run.events.append(event)
        step = f"step {event.get('step')}/{self.options.steps}"
        if event["event"] == "step":
            self.progress.advance(run.name, f"{step}  loss {event['loss']:.4f}", 1)
        elif event["event"] == "save":
            self.progress.advance(run.name, f"{step}  saving")

    def read_with_stock_torch(self) -> dict[str, object]:
        """Has a process that knows stock torch only read the last checkpoint."""
        root, steps = self.directory, self.options.steps
        self.progress.advance("stock torch reads the last checkpoint")
        resumed, reference = (
            str(checkpoints.path_of(root / name, steps)) for name in ("job", "reference")
        )
        # Through stdin, so that this package's directory is not on its path.
        script = Path(__file__).with_name("stock.py").read_text(encoding="utf-8")
        command = [sys.executable, "-", resumed, str(root / "state.pt"), reference]
        done = subprocess.run(
            command, input=script, capture_output=True, text=True, cwd=root, check=False
        )
        if done.returncode:
            problem = f"stock torch cannot read the checkpoint {resumed}:"
            raise JobError(f"{problem}\n{done.stderr.strip()}")
        found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return found


def _shape(ranks: int, replicas: int) -> str:
    if replicas == 0:
        return f"1-D over {ranks}"
    return f"{replicas} x {ranks // replicas}"
