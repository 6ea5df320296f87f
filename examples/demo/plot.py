"""The picture of the demo: the loss curve over crash and resume, and what resuming changed in
it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .crash import Crash
from .report import Run

_INK, _FAINT = "#24292f", "#d0d7de"
_COLOURS = ("#0969da", "#bf8700", "#8250df")
_STYLES = (
    {"marker": "o", "markersize": 7},
    {"marker": "s", "markersize": 4.5},
    {"marker": "D", "markersize": 3},
)


class NoMatplotlibError(Exception):
    """There is no matplotlib; the message says how to get it."""


def save(path: Path, reference: Run, crashed: Run, resumed: Sequence[Run], crash: Crash) -> None:
    """Draws the runs into a PNG at ``path``. Raises NoMatplotlibError without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise NoMatplotlibError("no picture of the loss curve: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 11,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with pyplot.rc_context(style):
        figure, (upper, lower) = pyplot.subplots(
            2, 1, figsize=(10, 7), sharex=True, height_ratios=[3, 1.4], constrained_layout=True
        )
        _losses(upper, reference, crashed, resumed, crash)
        _differences(lower, reference, resumed)
        for axes in (upper, lower):
            axes.grid(color=_FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _losses(axes: Any, reference: Run, crashed: Run, resumed: Sequence[Run], crash: Crash) -> None:
    whole, died = reference.losses(), crashed.losses()
    saved = resumed[0].resumed_from()
    band: Any = {"color": _FAINT, "linewidth": 7, "solid_capstyle": "round"}
    axes.plot(list(whole), list(whole.values()), label="never interrupted", **band)
    line: Any = {"color": _INK, "linewidth": 1.6}
    axes.plot(list(died), list(died.values()), label="the job that gets killed", **line)
    for run, colour, look in zip(resumed, _COLOURS, _STYLES, strict=False):
        losses = run.losses()
        axes.plot(
            list(losses), list(losses.values()), color=colour, linewidth=1.2, label=run.name, **look
        )
    _mark_crash(axes, crash, died[crash.step], saved)
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title(
        "Killed in the middle of a save, resumed on three meshes", loc="left", fontweight="bold"
    )
    axes.legend(frameon=False, loc="upper right")


def _mark_crash(axes: Any, crash: Crash, loss: float, saved: int) -> None:
    """Marks the crash, at ``loss``, and the step ``saved`` that the job resumes from."""
    red, green = "#cf222e", "#1a7f37"
    axes.axvspan(saved, crash.step, color=red, alpha=0.08, linewidth=0)
    cross: Any = {"marker": "X", "markersize": 14, "markeredgecolor": "white", "linestyle": "none"}
    axes.plot([crash.step], [loss], color=red, **cross)
    top = axes.get_ylim()[1]
    axes.annotate(
        f"SIGKILL in the save\nof step {crash.step}: {crash.step - saved} steps lost",
        xy=(crash.step, loss),
        xytext=(crash.step, loss + 0.38 * (top - loss)),
        color=red,
        ha="center",
        arrowprops={"arrowstyle": "-", "color": red, "shrinkB": 8},
    )
    axes.axvline(saved, color=green, linewidth=1.2, linestyle=(0, (4, 3)))
    beside: Any = {"xytext": (-6, -4), "textcoords": "offset points", "ha": "right", "va": "top"}
    says = f"last committed\ncheckpoint: step {saved}"
    axes.annotate(says, xy=(saved, top), color=green, **beside)


def _differences(axes: Any, reference: Run, resumed: Sequence[Run]) -> None:
    whole = reference.losses()
    for run, colour, look in zip(resumed, _COLOURS, _STYLES, strict=False):
        losses = {step: loss for step, loss in run.losses().items() if step in whole}
        off = [abs(loss - whole[step]) for step, loss in losses.items()]
        axes.plot(list(losses), off, color=colour, linewidth=1.2, **look)
    same = resumed[0].losses()
    if same and all(whole[step] == loss for step, loss in same.items()):
        says = f"{resumed[0].name}:\nno difference in any bit"
        axes.text(0.01, 0.8, says, transform=axes.transAxes, color=_COLOURS[0], va="top")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    axes.margins(y=0.15)
    axes.set_ylabel("difference from the\nuninterrupted run")
    axes.set_xlabel("step")
