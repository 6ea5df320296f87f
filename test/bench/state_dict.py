"""What SHARDED_STATE_DICT itself costs under hybrid sharding: state_dict(), the optimizer's,
load_state_dict(); 4 Gloo ranks."""

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from ranks import run_ranks
from report import milliseconds, table
from systems import Meter, Net, mebibytes, wrap
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

# times as many rounds where a call takes milliseconds, which the ranks' turns on the cores are a
# good part of
MORE = 5
CALLS = ("state_dict", "optimizer state", "load_state_dict")


def optimizer_state(
    system: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[], Any]:
    """The system's own way to a sharded optimizer state; sets the model to SHARDED_STATE_DICT where
    that is asked for."""
    if system == "fsdp2":
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return lambda: get_optimizer_state_dict(model, optimizer)
    if system == "fsdp1":
        import torch.distributed.fsdp as api
    else:
        import torch_hsdp_ckpt as api
    api.FullyShardedDataParallel.set_state_dict_type(model, api.StateDictType.SHARDED_STATE_DICT)
    return lambda: api.FullyShardedDataParallel.optim_state_dict(model, optimizer)


def _measure(
    rank: int, systems: tuple[str, ...], width: int, layers: int, rounds: int
) -> tuple[float, dict[Any, Any]]:
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # torch deprecates set_state_dict_type; it is what is measured
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    mib = mebibytes(Net(width, layers))
    readings: dict[Any, Any] = {}
    for system in systems:
        model = wrap(system, Net(width, layers), mesh)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        model(torch.randn(1, 1, width)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        states = optimizer_state(system, model, optimizer)
        for _ in range(rounds if system == "fsdp1" else MORE * rounds):
            with Meter() as meter:
                state = model.state_dict()
            readings.setdefault((system, CALLS[0]), []).append(meter.reading())
            with Meter() as meter:
                optimizer_dict = states()
            readings.setdefault((system, CALLS[1]), []).append(meter.reading())
            del optimizer_dict
            with Meter() as meter:
                model.load_state_dict(state)
            readings.setdefault((system, CALLS[2]), []).append(meter.reading())
            del state
        del model, optimizer, states
    return mib, readings


def measure(systems: tuple[str, ...], quick: bool) -> str:
    width, layers, rounds = (128, 4, 3) if quick else (1024, 8, 5)
    outcomes = run_ranks(_measure, 4, systems, width, layers, rounds, timeout=1200.0)
    mib = outcomes[0][0]
    ranks = [readings for _, readings in outcomes]
    rows = []
    for call in CALLS:
        for system in systems:
            times = [r["seconds"] for r in ranks[0][system, call]]
            extra = max(r["mib"] for readings in ranks for r in readings[system, call])
            rows.append(
                [
                    call,
                    system,
                    milliseconds(times),
                    f"{statistics.median(times) * 1e3 / mib:.3f}",
                    f"{extra:.0f}",
                ]
            )
    header = [
        "call",
        "system",
        "ms, median [range]",
        "ms per MiB of parameters",
        "extra MiB, worst rank",
    ]
    counted = f"{rounds} rounds of fsdp1, {MORE * rounds} of the others"
    title = f"## {mib:.0f} MiB of parameters, 4 Gloo ranks, 2 replicas x 2 shards, Adam, {counted}"
    return f"{title}\n{table(header, rows)}\n"
