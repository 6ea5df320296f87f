"""Lightning's Trainer on FSDP1: FSDPStrategy, HSDP, sharded checkpoints."""

import argparse
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 32


class Regression(L.LightningModule):
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

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, target = batch
        loss = nn.functional.mse_loss(self(x), target)
        print(f"step {self.global_step} loss {loss.item():.9g}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=3)
    arguments = parser.parse_args()
    L.seed_everything(0)
    model = Regression()
    data = TensorDataset(torch.randn(48, WIDTH), torch.randn(48, WIDTH))
    trainer = L.Trainer(
        accelerator="gpu",
        devices=4,
        strategy=FSDPStrategy(
            auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
            sharding_strategy="HYBRID_SHARD",
            device_mesh=(2, 2),
            state_dict_type="sharded",
        ),
        max_steps=arguments.steps,
        callbacks=ModelCheckpoint(arguments.directory, every_n_train_steps=arguments.save_every),
        enable_progress_bar=False,
        logger=False,
    )
    saved = sorted(arguments.directory.glob("*.ckpt"))
    trainer.fit(model, DataLoader(data, batch_size=4), ckpt_path=saved[-1] if saved else None)


if __name__ == "__main__":
    main()
