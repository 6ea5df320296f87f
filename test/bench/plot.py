"""Draws docs/figures.svg, the picture at the top of the README, from results/*.md.

usage: python test/bench/plot.py [FILE]

The picture is plain SVG, the same bytes whenever the tables are the same; test_docs.py compares
them, so that the picture shows no other figures than the tables do."""

import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

BENCH = Path(__file__).resolve().parent
PICTURE = BENCH.parents[1] / "docs" / "figures.svg"

WIDTH, LABELS, BARS = 720, 170, 440  # pixels: the picture, names on the left, the longest bar
ROW, GAP, TOP = 22, 34, 14
OURS, OTHERS = "#00796b", "#b0bec5"


class Panel(NamedTuple):
    """One group of bars: a column of one table."""

    title: str
    result: str  # the file in results/, without .md
    section: str  # how the table's heading begins, or what it contains
    rows: dict[str, str]  # how a table's row begins: the bar's name
    column: str


PANELS = (
    Panel(
        "Durable save of 2 GiB, disk",
        "checkpoint",
        "ext4 (/dev/vda), 3 rounds, all caches dropped",
        {
            "save | limit": "the same bytes, plain",
            "save | dcp": "DCP",
            "save | dcp, 2 threads": "DCP, 2 threads",
            "save | ours": "ours",
        },
        "ms, median [range]",
    ),
    Panel(
        "Load of 2 GiB, cold disk (ours checks every byte)",
        "checkpoint",
        "ext4 (/dev/vda), 3 rounds, all caches dropped",
        {
            "load | limit": "the same bytes, plain",
            "load | dcp": "DCP",
            "load | dcp, 2 threads": "DCP, 2 threads",
            "load | ours": "ours",
        },
        "ms, median [range]",
    ),
    Panel(
        "What asynchronous saves add to a training loop",
        "async",
        "0.48 GiB of state",
        {
            "dcp": "DCP",
            "dcp, cached stager": "DCP, cached stager",
            "ours": "ours",
        },
        "saves add, ms",
    ),
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_of(panel: Panel) -> list[list[str]]:
    """Returns header and rows of the first table below the panel's heading."""
    text = (BENCH / "results" / f"{panel.result}.md").read_text(encoding="utf-8")
    sections = [part for part in text.split("\n## ") if panel.section in part.splitlines()[0]]
    lines = [line for line in sections[0].splitlines() if line.startswith("|")]
    return [cells(line) for line in lines if not re.match(r"\| *-", line)]


def medians(panel: Panel) -> dict[str, float]:
    """Returns milliseconds by the bar's name, in the panel's order."""
    header, *rows = table_of(panel)
    column = header.index(panel.column)
    found = {}
    for start, name in panel.rows.items():
        wanted = cells(start)
        row = next(row for row in rows if row[: len(wanted)] == wanted)
        found[name] = float(row[column].split()[0])
    return found


def text(x: float, y: float, words: str, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{extra}>{escape(words)}</text>'


def bar(y: float, name: str, value: float, longest: float) -> list[str]:
    width = round(BARS * value / longest, 1)
    colour = OURS if name == "ours" else OTHERS
    return [
        text(LABELS - 8, y + 13, name, ' text-anchor="end"'),
        f'<rect x="{LABELS}" y="{y:g}" width="{width:g}" height="16" fill="{colour}"/>',
        text(LABELS + width + 6, y + 13, f"{value:.0f} ms"),
    ]


def draw() -> str:
    lines: list[str] = []
    y = TOP
    for panel in PANELS:
        values = medians(panel)
        y += 14
        lines.append(text(LABELS, y, panel.title, ' font-weight="bold"'))
        y += 10
        for name, value in values.items():
            lines += bar(y, name, value, max(values.values()))
            y += ROW
        y += GAP - ROW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        f'height="{y}" font-family="sans-serif" font-size="13" role="img">'
    )
    title = "<title>Saves, loads and asynchronous saves beside DCP's, shorter is better</title>"
    paper = f'<rect width="{WIDTH}" height="{y}" fill="white"/>'
    return "\n".join([head, title, paper, *lines, "</svg>", ""])


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    target.write_text(draw(), encoding="utf-8")
    print(target)
