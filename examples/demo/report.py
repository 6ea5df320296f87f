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
    detail = f"from step {came_from}, the newest committed one; skipped as incomplete: {', '.join(map(str, skipped)) or 'none'}"
    return Claim(
        "resumed from the last committed checkpoint",
        came_from == committed and skipped == [crash.step],
        detail,
    )


def same_bits(reference: Run, resumed: Run, last: int) -> Claim:
    """The resumed run's losses against the reference's, from the first step after the checkpoint to
    the last one."""
    steps = range(resumed.resumed_from() + 1, last + 1)
    ours, theirs = resumed.losses(), reference.losses()
    wrong = [step for step in steps if ours.get(step) != theirs.get(step)]
    passed = not wrong and len(steps) > 0
    detail = (
        f"{len(steps)} losses equal bit for bit"
        if passed
        else f"the losses of steps {wrong} differ"
    )
    return Claim(f"{resumed.name}: the uninterrupted run", passed, detail)


def within_rounding(reference: Run, resumed: Run, last: int) -> Claim:
    """The same for a run on another mesh, up to ROUNDING."""
    steps = range(resumed.resumed_from() + 1, last + 1)
    ours, theirs = resumed.losses(), reference.losses()
    missing = [step for step in steps if step not in ours]
    if missing:
        return Claim(
            f"{resumed.name}: the uninterrupted run", False, f"no losses for the steps {missing}"
        )
    off = [abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in steps]
    detail = f"first loss off by {off[0]:.1e}, largest difference {max(off):.1e} (relative, {len(off)} steps; bound {ROUNDING:.0e})"
    return Claim(
        f"{resumed.name}: the uninterrupted run within rounding", max(off) <= ROUNDING, detail
    )


def stock_claims(found: Mapping[str, Any]) -> list[Claim]:
    """What a process without this package said of the last checkpoint."""
    size = f"{found['tensors']} tensors, {mebibytes(found['bytes'])}"

    def claim(name: str, wrong: list[str], right: str) -> Claim:
        return Claim(
            name,
            not wrong and found["tensors"] > 0,
            f"{len(wrong)} differ: {', '.join(wrong[:5])}" if wrong else right,
        )

    alone = f"stock torch {found['torch']} reads the last checkpoint"
    return [
        claim(
            alone,
            found["memory"] + found["foreign"],
            f"{size}, equal to what the job held in memory",
        ),
        claim(
            "the job that died ends where the other one does",
            found["other"],
            f"{size}, model and Adam state equal bit for bit",
        ),
    ]


def text(claims: list[Claim], figures: Mapping[str, str]) -> str:
    """Returns the report: figures, then one line a claim."""
    wide = max(len(name) for name in figures)
    lines = [f"  {name:<{wide}}  {value}" for name, value in figures.items()] + [""]
    for claim in claims:
        lines += [
            f"  {'PASS' if claim.passed else 'FAIL'}  {claim.name}",
            f"        {claim.detail}",
        ]
    passed = sum(claim.passed for claim in claims)
    return "\n".join([*lines, "", f"  {passed} of {len(claims)} claims hold"])
