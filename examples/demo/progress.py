"""A progress bar on one line of a terminal; plain lines where the output is no terminal."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

_WIDTH = 24


class Progress:
    """Counts ``total`` units of work. ``every``: without a terminal, one line for so many units and
    one for each new label."""

    def __init__(self, total: int, stream: TextIO, every: int = 10) -> None:
        self._total, self._stream, self._every = total, stream, every
        self._done, self._begin, self._label, self._printed = 0, time.monotonic(), "", 0
        self._terminal = stream.isatty()

    def advance(self, label: str, detail: str = "", units: int = 0) -> None:
        """Shows that ``units`` more are done of what ``label`` names."""
        self._done = min(self._total, self._done + units)
        if self._terminal:
            self._draw(label, detail)
        elif label != self._label or self._done - self._printed >= self._every:
            line = f"[{self._clock()}] {label}  {detail}".rstrip()
            self._stream.write(f"{line}\n")
            self._stream.flush()
            self._printed = self._done
        self._label = label

    def _draw(self, label: str, detail: str) -> None:
        filled = _WIDTH * self._done // self._total
        bar = "█" * filled + "░" * (_WIDTH - filled)
        percent = 100 * self._done // self._total
        line = f"{bar} {percent:3d} %  {self._clock()}  {label}  {detail}"
        fits = shutil.get_terminal_size().columns - 1
        # \x1b[K clears what a longer line before left over.
        self._stream.write(f"\r{line[:fits]}\x1b[K")
        self._stream.flush()

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"[{self._clock()}] {text}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._begin)
        return f"{seconds // 60}:{seconds % 60:02d}"
