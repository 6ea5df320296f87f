"""Peaks of torch's caching allocator in a step, on simulated GPUs."""

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "test")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from ranks import run_ranks  # noqa: E402
from report import table  # noqa: E402
from simulated import Trained, outcome_of, words_of  # noqa: E402
from systems import Net, mebibytes, model  # noqa: E402
from training import mesh_of  # noqa: E402

SYSTEMS = ("fsdp2", "ours")  # our fully_shard has the same core
WARMUP, LAYERS = 2, 6
PACES = {"lazy": "the host is a step ahead of the device", "eager": "the device keeps up"}
PEAKS = {
    "allocated": "allocated_bytes.all.peak",
    # Given back by the wrapper too, while a stream may still use it.
    "in use": "active_bytes.all.peak",
    "reserved": "reserved_bytes.all.peak",
}


@dataclass(frozen=True)
class Case:
    width: int
    mesh: tuple[int, ...] = (2, 2)
    mixed: bool = False
    pace: str = "lazy"

    def words(self) -> str:
        precision = "bfloat16, reduced in float32" if self.mixed else "float32"
        mib = mebibytes(self.model()) / LAYERS
        where = f"{words_of(self.mesh)}, {precision}, {PACES[self.pace]}"
        return f"{LAYERS} blocks of {mib:.0f} MiB, {where}"

    def model(self) -> Net:
        return model("blocks", self.width, LAYERS)


def _cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(128, pace=pace) for pace in PACES]
    # Weights of up to 16 MiB, most of which are gathered and reduced where they are, and of up to
    # 4 MiB, which are packed.
    large = [Case(1024), Case(1024, mixed=True)]
    small = [*(Case(512, pace=pace) for pace in PACES), Case(512, mixed=True), Case(512, (4,))]
    return large + small


def _peaks(system: str, case: Case) -> dict[str, float]:
    """In MiB, of a steady step; "rest": of the shards and their gradients."""
    torch.manual_seed(0)
    trained = Trained(system, mesh_of(case.mesh, "cuda"), case.model(), case.mixed)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what wrapping took
    for _ in range(WARMUP + 1):
        trained.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        trained.step()
        torch.cuda.synchronize()
        dist.barrier()
    stats = torch.cuda.memory_stats()
    parameters = list(trained.module.parameters())
    at_rest = [t.to_local() for p in parameters for t in (p, p.grad)]
    return {
        **{name: stats[key] / 2**20 for name, key in PEAKS.items()},
        "rest": sum(t.nbytes for t in at_rest) / 2**20,
    }


def _rank(rank: int, system: str, quick: bool) -> list[dict[str, float]]:
    import simgpu_aten

    outcomes = []
    for case in _cases(quick):
        simgpu_aten.restart(0, case.pace)
        outcomes.append(_peaks(system, case))
        gc.collect()
        torch.cuda.empty_cache()
    return outcomes


def _section(case: Case, peaks: dict[str, dict[str, float]]) -> str:
    torchs = peaks.get("fsdp2")
    rows = []
    for system, of in peaks.items():
        above = {name: of[name] - of["rest"] for name in PEAKS}
        figures = [f"{of[name]:.0f}" for name in PEAKS] + [f"{above[name]:.0f}" for name in PEAKS]
        ratios = [
            f"{of[name] / torchs[name]:.2f}" if torchs else "" for name in ("allocated", "reserved")
        ]
        rows.append([system, *figures, *ratios])
    header = [
        "system",
        *PEAKS,
        *(f"{name}, above rest" for name in PEAKS),
        "allocated, of torch's",
        "reserved, of torch's",
    ]
    rest = next(iter(peaks.values()))["rest"]
    return f"## {case.words()}; at rest {rest:.0f} MiB\n{table(header, rows)}\n"


INTRODUCTION = """Torch's own caching allocator on simulated GPUs (`docs/gpu.md`), 4 ranks, NCCL:
peaks of a steady forward and backward of one token, in MiB, of rank 0. At rest: shards and their
gradients, without an optimizer's state. In use: allocated, and given back while a stream may still
use it.
"""


def measure(quick: bool, systems: tuple[str, ...]) -> str:
    outcomes = outcome_of("memory.py", systems, quick)
    sections = [
        _section(case, {system: outcomes[system][i] for system in systems})
        for i, case in enumerate(_cases(quick))
    ]
    return "\n".join([INTRODUCTION, *sections])


def main() -> None:
    systems, quick = json.loads(sys.argv[1])
    outcomes = {}
    for system in systems:  # each in processes of its own, with an allocator of its own
        ranks = run_ranks(_rank, 4, system, quick, backend="nccl", timeout=600.0)
        outcomes[system] = ranks[0]
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
