"""Lightning's Fabric on FSDP2: ModelParallelStrategy, HSDP, sharded checkpoints."""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 32


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    assert isinstance(model, Residual)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    arguments = parser.parse_args()
    strategy = ModelParallelStrategy(parallelize, data_parallel_size=4, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(0)
    model = fabric.setup(Residual())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))
    data = TensorDataset(torch.randn(256, WIDTH), torch.randn(256, WIDTH))
    batches = fabric.setup_dataloaders(DataLoader(data, batch_size=4))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    # A directory without .metadata is a save that was cut off.
    saved = sorted(path.parent for path in arguments.directory.glob("step-*/.metadata"))
    if saved:
        fabric.load(saved[-1], state)
    for index, (x, target) in enumerate(batches):
        if index < state["step"]:
            continue
        if index == arguments.steps:
            break
        loss = nn.functional.mse_loss(model(x), target)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {index} loss {loss.item():.9g}", flush=True)
        state["step"] = index + 1
        if state["step"] % arguments.save_every == 0:
            fabric.save(arguments.directory / f"step-{state['step']}", state)


if __name__ == "__main__":
    main()
