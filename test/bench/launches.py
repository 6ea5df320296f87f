"""What a wrapper queues on a device in a step: counted on simulated GPUs, that of the model itself
subtracted."""

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
from simulated import MESHES, Trained, outcome_of, words_of  # noqa: E402
from systems import model  # noqa: E402
from training import mesh_of  # noqa: E402

WARMUP, STEPS = 3, 2
KINDS = (
    "kernels",
    "copies",
    "memsets",
    "collectives",
    "event records",
    "event waits",
    "host waits",
)
Counts = dict[str, float]


@dataclass(frozen=True)
class Case:
    kind: str  # of systems.model
    mesh: tuple[int, ...]
    mixed: bool = False
    checkpoints: bool = False

    def words(self, units: int) -> str:
        precision = "bfloat16, reduced in float32" if self.mixed else "float32"
        checkpoints = ", activation checkpointing" if self.checkpoints else ""
        return f"{self.kind}: {units} units, {words_of(self.mesh)}, {precision}{checkpoints}"


def _cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("blocks", MESHES[0]), Case("blocks", MESHES[0], True, True)]
    return [
        *(Case("blocks", mesh, mixed) for mesh in MESHES for mixed in (False, True)),
        *(Case("blocks", MESHES[0], mixed, checkpoints=True) for mixed in (False, True)),
        *(Case("small", MESHES[0], mixed) for mixed in (False, True)),
    ]


def _layers(quick: bool) -> int:
    return 2 if quick else 8


def _counted(system: str, case: Case, layers: int) -> Counts:
    """Operations of a steady forward and backward, by kind."""
    import simgpu_aten

    torch.manual_seed(0)
    net = model(case.kind, 64, layers)
    trained = Trained(system, mesh_of(case.mesh, "cuda"), net, case.mixed, case.checkpoints)

    def step() -> None:
        trained.step()
        trained.zero_grad()

    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    before = simgpu_aten.counts()
    for _ in range(STEPS):
        step()
    after = simgpu_aten.counts()
    torch.cuda.synchronize()
    return {kind: (after[kind] - before[kind]) / STEPS for kind in KINDS}


def _rank(rank: int, systems: list[str], quick: bool) -> list[dict[str, Counts]]:
    import simgpu_aten

    # The device is far behind, so that no wait is left out because its event is over.
    simgpu_aten.restart(0, "lazy")
    outcomes = []
    for case in _cases(quick):
        counts = {}
        for system in ("bare", *systems):
            counts[system] = _counted(system, case, _layers(quick))
            dist.barrier()
        outcomes.append(counts)
    return outcomes


def _section(case: Case, counts: dict[str, Counts], layers: int) -> str:
    units = layers + 1 if case.kind == "blocks" else 2
    own = {
        system: {kind: (of[kind] - counts["bare"][kind]) / units for kind in KINDS}
        for system, of in counts.items()
        if system != "bare"
    }
    totals = {system: sum(of.values()) for system, of in own.items()}
    torchs = totals.get("fsdp2", float("nan"))
    rows = [
        [
            system,
            *(f"{of[kind]:.1f}" for kind in KINDS),
            f"{totals[system]:.1f}",
            f"{totals[system] / torchs:.2f}",
        ]
        for system, of in own.items()
    ]
    header = ["system", *KINDS, "total", "of torch's"]
    return f"## {case.words(units)}\n{table(header, rows)}\n"


INTRODUCTION = """Counted on simulated GPUs (`docs/gpu.md`), 4 ranks, NCCL: what a steady forward
and backward queues a unit and step, less what the model without a wrapper queues. The order and
the number of operations are a GPU's; there are no times here: the host's would be the simulator's.
"""


def measure(quick: bool, systems: tuple[str, ...]) -> str:
    outcomes = outcome_of("launches.py", systems, quick)
    sections = [
        _section(case, counts, _layers(quick))
        for case, counts in zip(_cases(quick), outcomes, strict=True)
    ]
    return "\n".join([INTRODUCTION, *sections])


def main() -> None:
    systems, quick = json.loads(sys.argv[1])
    outcomes = run_ranks(_rank, 4, systems, quick, backend="nccl", timeout=600.0)
    print(json.dumps(outcomes[0]))


if __name__ == "__main__":
    main()
