"""What the benchmarks share: medians with their ranges, Markdown tables, the machine's name."""

import datetime
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def milliseconds(seconds: Sequence[float]) -> str:
    """Median and range."""
    scaled = [1e3 * s for s in seconds]
    return f"{statistics.median(scaled):.1f} [{min(scaled):.1f}..{max(scaled):.1f}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def file_system(path: str | os.PathLike[str]) -> str:
    """Type and device of the file system that holds ``path``: the longest mount point that is a
    prefix of it."""
    real = os.path.realpath(path)
    with open("/proc/mounts", encoding="utf-8") as f:
        mounts = [line.split()[:3] for line in f]
    inside = [
        (len(m), kind, device)
        for device, m, kind in mounts
        if (real + "/").startswith(m.rstrip("/") + "/")
    ]
    _, kind, device = max(inside)
    return f"{kind} ({device})"


def machine() -> str:
    """Names the processor, its cores, the memory, the GPU and the kernel."""
    cpu = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        models = [line for line in f if line.startswith("model name")]
    if models:
        cpu = models[0].partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    system = f"Linux {platform.release()}"
    return f"{cpu}, {cores} cores, {memory:.0f} GiB memory{gpu}, {system}"


def publish(name: str, body: str) -> None:
    """Prints the report and writes it to ``results/<name>.md``."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    load = f"load average at the end {os.getloadavg()[0]:.1f}"
    where = f"{machine()}; torch {torch.__version__}; {today}; {load}"
    text = f"# {name}\n{where}\n\n    python {' '.join(sys.argv)}\n\n{body}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text, flush=True)
