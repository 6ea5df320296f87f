"""Writes C++ for every function of a library that the simulator does not know: each of them reports
its name and fails. The functions that it does know are linked beside these and win (weak symbols).

    python unknown_calls.py LIBRARY PREFIX ERROR OUTPUT

``PREFIX``: of the functions meant ("cuda", "nccl"). ``ERROR``: the number that they return."""

import re
import subprocess
import sys
from pathlib import Path

HEAD = """// Made by unknown_calls.py.
namespace simgpu {
int UnknownCall(const char* name);
}
#define UNKNOWN(name)                                                       \\
  extern "C" __attribute__((weak, visibility("default"))) int name() {      \\
    simgpu::UnknownCall(#name);                                             \\
    return %s;                                                              \\
  }
"""


def functions_of(library: str, prefix: str) -> list[str]:
    """The exported functions whose names begin with ``prefix`` or ``__prefix``."""
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    pattern = re.compile(rf"\b[TWi] ((?:__)?{prefix}\w+)")
    return sorted(set(pattern.findall(listing)))


def main(library: str, prefix: str, error: str, output: str) -> None:
    lines = [f"UNKNOWN({name})\n" for name in functions_of(library, prefix)]
    if not lines:
        raise SystemExit(f"{library} exports no {prefix} functions")
    Path(output).write_text(HEAD % error + "".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
