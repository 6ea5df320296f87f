"""torch's pipelining over fully_shard: 2 pipeline ranks x 2 shards, with one or two stages each."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

WIDTH, BLOCKS, MICROBATCHES = 32, 8, 4
# Without this, the groups of the ranks' optimizers would have the same keys.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--schedule", default="1F1B")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    pp_rank, dp_rank = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    schedule_class = get_schedule_class(arguments.schedule)
    is_single = issubclass(schedule_class, PipelineScheduleSingle)
    count = 2 if is_single else 4
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(BLOCKS)]
    model, stages = nn.ModuleDict(), []
    for number in range(pp_rank, count, 2):
        mine = slice(number * BLOCKS // count, (number + 1) * BLOCKS // count)
        part = nn.Sequential(*blocks[mine])
        for block in part:
            fully_shard(block, mesh=mesh["dp"], reshard_after_forward=False)
        fully_shard(part, mesh=mesh["dp"], reshard_after_forward=False)
        model[f"stage{number}"] = part
        group = mesh["pp"].get_group()
        stages.append(PipelineStage(part, number, count, torch.device("cpu"), group=group))
    loss_fn = nn.functional.mse_loss
    schedule = schedule_class(stages[0] if is_single else stages, MICROBATCHES, loss_fn=loss_fn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    # A directory without .metadata is a save that was cut off.
    saved = sorted(path.parent for path in arguments.directory.glob("step-*/.metadata"))
    if saved:
        model_state, optim_state = get_state_dict(model, optimizer, options=FLAT)
        dcp.load({"model": model_state, "optimizer": optim_state}, checkpoint_id=saved[-1])
        set_state_dict(
            model,
            optimizer,
            model_state_dict=model_state,
            optim_state_dict=optim_state,
            options=FLAT,
        )
        first = int(saved[-1].name.removeprefix("step-"))
    for step in range(first, arguments.steps):
        data = torch.Generator().manual_seed(2 * step + dp_rank)
        x, target = torch.randn(2, 4 * MICROBATCHES, WIDTH, generator=data)
        losses: list[Tensor] = []
        schedule.step(*([x] if pp_rank == 0 else []), target=target, losses=losses)
        if losses:
            print(f"step {step} loss {torch.stack(losses).mean().item():.9g}", flush=True)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % arguments.save_every == 0:
            model_state, optim_state = get_state_dict(model, optimizer, options=FLAT)
            path = arguments.directory / f"step-{step + 1}"
            dcp.save({"model": model_state, "optimizer": optim_state}, checkpoint_id=path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
