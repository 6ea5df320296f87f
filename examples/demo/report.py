"""What the demo found: claims, each passed or failed, and the figures around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .crash import Crash

ROUNDING = 1e-4
"""The largest relative difference between losses that another order of summation may explain.

A mesh with other groups adds gradients in another order: the first steps differ by the last bits,
and training lets that grow (5e-8 after 16 steps, measured). A resume that forgets Adam's state, or
is off by one step of data, differs by 1.5e-1 and 2e-1. """


@dataclass(frozen=True)
class Claim:
    """One thing the demo shows; ``detail`` is what was measured."""

    name: str
    passed: bool
    detail: str


@dataclass
class Run:
    """The journal of one training run."""

    name: str
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def losses(self) -> dict[int, float]:
        """Returns the exact loss of every step."""
        return {
            event["step"]: float.fromhex(event["hex"])
            for event in self.events
            if event["event"] == "step"
        }

    def first(self, event: str) -> dict[str, Any]:
        """Returns the first event of this kind. Raises LookupError if the run has none."""
        for candidate in self.events:
            if candidate["event"] == event:
                return candidate
        raise LookupError(f"the log of the run {self.name} has no {event!r}")

    def resumed_from(self) -> int:
        return int(self.first("resume")["step"])

    def save_seconds(self) -> list[float]:
        return [event["seconds"] for event in self.events if event["event"] == "saved"]


@dataclass(frozen=True)
class Runs:
    """The demo's training runs: ``same`` resumed the killed one on its mesh, ``others`` did on
    others."""

    reference: Run
    killed: Run
    same: Run
    others: list[Run]


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def crash_claim(crash: Crash | None, whole_bytes: int, ranks: int) -> Claim:
    name = "killed in the middle of a save"
    if crash is None:
        return Claim(name, False, "every save was committed before the kill")
    files = "1 data file" if crash.files == 1 else f"{crash.files} data files"
    found = (
        f"left {files}, {mebibytes(crash.bytes)} (whole: {mebibytes(whole_bytes)}), no .metadata"
    )
    return Claim(
        name,
        True,
        f"SIGKILL to torchrun and {ranks} ranks in the save of step {crash.step}: {found}",
    )


def resume_claim(resumed: Run, crash: Crash, committed: int) -> Claim:
    came_from, skipped = resumed.resumed_from(), resumed.first("resume")["skipped"]
    passed = came_from == committed and skipped == [crash.step]
    incomplete = ", ".join(map(str, skipped)) or "none"
    return Claim(
        "resumed from the last committed checkpoint",
        passed,
        f"from step {came_from}, the newest committed one; skipped as incomplete: {incomplete}",
    )


def same_bits(reference: Run, resumed: Run, last: int) -> Claim:
    """The resumed run's losses against the reference's, from the first step after the checkpoint to
    the last one."""
    name = f"{resumed.name}: the uninterrupted run"
    steps = range(resumed.resumed_from() + 1, last + 1)
    ours, theirs = resumed.losses(), reference.losses()
    wrong = [step for step in steps if ours.get(step) != theirs.get(step)]
    if wrong or not steps:
        return Claim(name, False, f"the losses of steps {wrong} differ")
    return Claim(name, True, f"{len(steps)} losses equal bit for bit")


def within_rounding(reference: Run, resumed: Run, last: int) -> Claim:
    """The same for a run on another mesh, up to ROUNDING."""
    name = f"{resumed.name}: the uninterrupted run"
    steps = range(resumed.resumed_from() + 1, last + 1)
    ours, theirs = resumed.losses(), reference.losses()
    missing = [step for step in steps if step not in ours]
    if missing:
        return Claim(name, False, f"no losses for the steps {missing}")
    off = [abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in steps]
    largest = f"first loss off by {off[0]:.1e}, largest difference {max(off):.1e}"
    detail = f"{largest} (relative, {len(off)} steps; bound {ROUNDING:.0e})"
    return Claim(f"{name} within rounding", max(off) <= ROUNDING, detail)


def training_claims(runs: Runs, crash: Crash, committed: int, last: int) -> list[Claim]:
    """What the resumed runs show; ``committed`` is the step that all of them go on from, ``last``
    the one that they end with."""
    return [
        resume_claim(runs.same, crash, committed),
        same_bits(runs.reference, runs.same, last),
        *(within_rounding(runs.reference, run, last) for run in runs.others),
    ]


def stock_claims(found: Mapping[str, Any]) -> list[Claim]:
    """What a process without this package said of the last checkpoint."""
    size = f"{found['tensors']} tensors, {mebibytes(found['bytes'])}"

    def claim(name: str, wrong: list[str], right: str) -> Claim:
        if wrong:
            return Claim(name, False, f"{len(wrong)} differ: {', '.join(wrong[:5])}")
        return Claim(name, found["tensors"] > 0, f"{size}, {right}")

    return [
        claim(
            f"stock torch {found['torch']} reads the last checkpoint",
            found["memory"] + found["foreign"],
            "equal to what the job held in memory",
        ),
        claim(
            "the job that died ends where the other one does",
            found["other"],
            "model and Adam state equal bit for bit",
        ),
    ]


def figures(
    runs: Runs, crash: Crash, committed: int, checkpoint_bytes: int, save_every: int
) -> dict[str, str]:
    """Returns the sizes of what was trained and saved, and how much the crash cost."""
    start, saves = runs.reference.first("start"), runs.reference.save_seconds()
    each_save = f"{sum(saves) / len(saves):.2f} s a save"
    from_to = f"killed at {crash.step}, resumed from {committed}"
    return {
        "model": f"{start['parameters'] / 1e6:.1f} million parameters on {start['device']}",
        "text": f"{start['bytes'] / 1e6:.1f} MB",
        "checkpoint": f"{mebibytes(checkpoint_bytes)} every {save_every} steps, {each_save}",
        "lost": f"{crash.step - committed} steps ({from_to})",
    }


def times(runs: Runs, seconds: float) -> str:
    """Says how long the runs took, and the whole demo, in seconds."""
    each = (runs.reference, runs.killed, runs.same, *runs.others)
    summands = " + ".join(f"{run.seconds:.0f}" for run in each)
    what = f"the {len(each)} runs, and stock torch's look at the result"
    return f"{seconds:.0f} s: {summands} for {what}"


def text(claims: list[Claim], figures: Mapping[str, str]) -> str:
    """Returns the report: figures, then one line a claim."""
    wide = max(len(name) for name in figures)
    lines = [f"  {name:<{wide}}  {value}" for name, value in figures.items()]
    lines.append("")
    for claim in claims:
        verdict = "PASS" if claim.passed else "FAIL"
        lines += [f"  {verdict}  {claim.name}", f"        {claim.detail}"]
    passed = sum(claim.passed for claim in claims)
    return "\n".join([*lines, "", f"  {passed} of {len(claims)} claims hold"])
