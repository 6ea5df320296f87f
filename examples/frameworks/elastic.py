"""fully_shard and DCP as in torch's tutorials, restarted by torchrun: --max-restarts 1."""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard


class AppState(Stateful):
    """The model and its optimizer, which DCP asks for their states."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model_state, optim_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optim": optim_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optim"]}
        set_state_dict(self.model, self.optimizer, **states)


@record
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--die-at", type=int, help="a rank dies at this step, once")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"app": AppState(model, optimizer)}
    # A directory without .metadata is a save that was cut off.
    saved = sorted(path.parent for path in arguments.directory.glob("step-*/.metadata"))
    first = 0
    if saved:
        dcp.load(state, checkpoint_id=saved[-1])
        first = int(saved[-1].name.removeprefix("step-"))
    for step in range(first, arguments.steps):
        data = torch.Generator().manual_seed(4 * step + dist.get_rank())
        source, target = torch.randn(2, 4, 8, 32, generator=data)
        loss = nn.functional.mse_loss(model(source, target), target)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.9g}", flush=True)
        is_first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if step == arguments.die_at and is_first_life and dist.get_rank() == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % arguments.save_every == 0:
            dcp.save(state, checkpoint_id=arguments.directory / f"step-{step + 1}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
