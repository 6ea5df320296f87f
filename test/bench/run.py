"""Runs the benchmarks: torch's ways and ours in one run; medians and ranges; ``results/<name>.md``
with the machine named.

usage: python test/bench/run.py [--quick] [--gpu] [--systems dcp,ours] [--dir DIR]
[checkpoint|save_scale|step|... ...]

Times move with the machine, ratios within one run count. ``--quick`` is small: it shows that
everything runs."""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

import async_  # noqa: E402
import beside_tp  # noqa: E402
import checkpoint  # noqa: E402
import launches  # noqa: E402
import load_planning  # noqa: E402
import memory  # noqa: E402
import muon  # noqa: E402
import pipelining  # noqa: E402
import reshard  # noqa: E402
import save_scale  # noqa: E402
import shared_store  # noqa: E402
import simulated  # noqa: E402
import state_dict  # noqa: E402
import step  # noqa: E402
import systems  # noqa: E402
import torch  # noqa: E402
from report import publish, table  # noqa: E402


def short(system: str) -> str:
    """A system's name on the command line: "dcp, cached stager" is dcp-cached-stager."""
    return system.replace(", ", "-").replace(" ", "-")


def chosen(args: argparse.Namespace, all_systems: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        system
        for system in all_systems
        if args.systems is None or short(system) in args.systems.split(",")
    )


def run_checkpoint(args: argparse.Namespace) -> str:
    total = (1 << 27) if args.quick else (2 << 30)
    names = chosen(args, checkpoint.SYSTEMS)
    sections = []
    for parent in (args.dir, Path("/dev/shm")):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            sections.append(
                checkpoint.measure(Path(scratch), total, 2 if args.quick else args.rounds, names)
            )
            if parent == args.dir:
                small = checkpoint.measure_small(
                    Path(scratch), 1000 if args.quick else 10000, 2 if args.quick else 3, names
                )
    return "\n".join([*sections, small])


def run_step(args: argparse.Namespace) -> str:
    names = chosen(args, systems.WRAPPERS)
    steps = 3 if args.quick else 6
    sections = [step.own_time(names, 5 if args.quick else 20)]
    sections += [
        step.communication(names, kind, steps, args.quick) for kind in ("blocks", "small", "uneven")
    ]
    sections.append(step.in_place(3 if args.quick else 9))
    sections += [step.memory(names, kind, 3, args.quick) for kind in ("blocks", "small", "uneven")]
    return "\n".join(sections)


def run_state_dict(args: argparse.Namespace) -> str:
    return state_dict.measure(chosen(args, systems.WRAPPERS), args.quick)


def run_kernels(args: argparse.Namespace) -> str:
    binaries = sorted(ROOT.glob("build/*/test/kernels_bench"), key=os.path.getmtime)
    if not binaries:
        raise SystemExit("kernels_bench is not built: build with HSDP_CKPT_TESTS=1 first")
    command = [
        str(binaries[-1]),
        "[cuda]" if args.gpu else "[benchmark]",
        "--reporter",
        "xml",
        "--benchmark-no-analysis",
    ]
    command += [
        "--benchmark-samples",
        "1" if args.quick else "10",
        "--benchmark-warmup-time",
        "1" if args.quick else "10",
    ]
    output = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    times: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for result in ElementTree.fromstring(output.stdout).iter("BenchmarkResults"):
        *case, calls, whose = result.attrib["name"].split("|")
        milliseconds = float(result.find("mean").attrib["value"]) / 1e6 / int(calls)
        times.setdefault(tuple(case), {}).setdefault(whose, []).append(milliseconds)
    rows = []
    for (device, width, what, moved), by_whose in times.items():
        ours, torchs, copy = (
            statistics.median(by_whose[whose]) for whose in ("ours", "torch", "copy")
        )
        figures = [f"{int(moved) / 2**20:.1f}", *(f"{ms:.3f}" for ms in (ours, torchs, copy))]
        rows.append(
            [f"{device} d={width}", what, *figures, f"{torchs / ours:.2f}", f"{copy / ours:.2f}"]
        )
    header = [
        "device",
        "what",
        "MiB moved",
        "ours ms",
        "torch ms",
        "copy ms",
        "speed / torch",
        "speed / copy",
    ]
    return (
        "Catch2 benchmarks, one CPU thread: medians of seven rounds. MiB moved: read and written "
        "together (a cast from fp32 to "
        "bf16 reads twice of what it writes); the copy is a memcpy, on a GPU a device-to-device "
        "copy, that moves as many, "
        "half of them in and half of them out.\n\n" + table(header, rows)
    )


def run_load_planning(args: argparse.Namespace) -> str:
    return load_planning.measure(args.quick)


def run_save_scale(args: argparse.Namespace) -> str:
    return save_scale.measure(args.quick)


def run_reshard(args: argparse.Namespace) -> str:
    args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        total, rounds = ((1 << 26), 2) if args.quick else ((1 << 29), args.rounds)
        return reshard.measure(Path(scratch), total, rounds, chosen(args, reshard.SYSTEMS))


def run_shared_store(args: argparse.Namespace) -> str:
    return shared_store.measure(args.quick, chosen(args, shared_store.SYSTEMS))


def run_launches(args: argparse.Namespace) -> str:
    return launches.measure(args.quick, chosen(args, simulated.SYSTEMS))


def run_memory(args: argparse.Namespace) -> str:
    return memory.measure(args.quick, chosen(args, memory.SYSTEMS))


def run_pipelining(args: argparse.Namespace) -> str:
    return pipelining.measure(chosen(args, pipelining.SYSTEMS), args.quick)


def run_beside_tp(args: argparse.Namespace) -> str:
    return beside_tp.measure(chosen(args, beside_tp.SYSTEMS), args.quick)


def run_muon(args: argparse.Namespace) -> str:
    return muon.measure(chosen(args, muon.SYSTEMS), args.quick)


def run_async(args: argparse.Namespace) -> str:
    args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir) as scratch:
        return async_.measure(scratch, chosen(args, async_.SYSTEMS), args.quick)


# What --systems chooses from; the other benchmarks compare nothing.
SYSTEMS: dict[str, tuple[str, ...]] = {
    "async": async_.SYSTEMS,
    "beside_tp": beside_tp.SYSTEMS,
    "checkpoint": checkpoint.SYSTEMS,
    "launches": simulated.SYSTEMS,
    "memory": memory.SYSTEMS,
    "muon": muon.SYSTEMS,
    "pipelining": pipelining.SYSTEMS,
    "reshard": reshard.SYSTEMS,
    "shared_store": shared_store.SYSTEMS,
    "step": systems.WRAPPERS,
    "state_dict": systems.WRAPPERS,
}
BENCHMARKS: dict[str, Callable[[argparse.Namespace], str]] = {
    "async": run_async,
    "checkpoint": run_checkpoint,
    "load_planning": run_load_planning,
    "save_scale": run_save_scale,
    "reshard": run_reshard,
    "shared_store": run_shared_store,
    "step": run_step,
    "pipelining": run_pipelining,
    "beside_tp": run_beside_tp,
    "muon": run_muon,
    "state_dict": run_state_dict,
    "kernels": run_kernels,
    "launches": run_launches,
    "memory": run_memory,
}


def _default_names() -> list[str]:
    """All that can run here."""
    simulated_ones = set() if simulated.is_built() else {"launches", "memory"}
    if simulated_ones:
        print("no simulated GPU (docs/gpu.md): without launches and memory", file=sys.stderr)
    return [name for name in BENCHMARKS if name not in simulated_ones]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument(
        "--gpu", action="store_true", help="only what runs on the GPU; an error without one"
    )
    choices = list(dict.fromkeys(short(system) for each in SYSTEMS.values() for system in each))
    parser.add_argument("--systems", metavar="A,B", help=f"some of: {', '.join(choices)}")
    parser.add_argument(
        "--dir",
        type=Path,
        default=ROOT / "build" / "bench",
        help="a directory on the disk to measure",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of saves and loads")
    args = parser.parse_args()
    names = args.names or (["kernels"] if args.gpu else _default_names())
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        parser.error(
            f"unknown benchmark {', '.join(sorted(unknown))}: one of {', '.join(BENCHMARKS)}"
        )
    for name in names:
        if args.systems is not None and name in SYSTEMS and not chosen(args, SYSTEMS[name]):
            parser.error(
                f"--systems {args.systems}: {name} has {', '.join(map(short, SYSTEMS[name]))}"
            )
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA device")
    for name in names:
        publish(
            name + ("-gpu" if args.gpu else "") + ("-quick" if args.quick else ""),
            BENCHMARKS[name](args),
        )


if __name__ == "__main__":
    main()
