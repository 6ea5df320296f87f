"""torchtitan's own trainer and checkpoint manager: its debug model, HSDP, random tokens."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import BaseLogger
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel


class Tokens(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, **runtime: Any) -> None:
        self.rank, self.index = runtime["dp_rank"], 0
        self.shape = (runtime["local_batch_size"], runtime["seq_len"] + 1)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(4 * self.index + self.rank)
            tokens = torch.randint(0, 2048, self.shape, generator=generator)
            self.index += 1
            yield {"input": tokens[:, :-1]}, tokens[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


class NoTokenizer(BaseTokenizer.Config):
    def build(self, **runtime: Any) -> None:
        """The data are tokens."""


class PrintLoss(BaseLogger):
    def log(self, metrics: dict[str, Any], step: int) -> None:
        print(f"step {step} loss {metrics['loss_metrics/global_avg_loss']:.9g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--async-mode", default="disabled")
    parser.add_argument("--spmd-backend", default="partial_dtensor")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    arguments = parser.parse_args()
    config = llama3_debugmodel()
    del config.model_spec.model.layers[2:]
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.dump_folder = arguments.directory
    config.tokenizer, config.dataloader = NoTokenizer(), Tokens.Config()
    config.optimizer.implementation, config.debug.seed = "foreach", 0
    config.validator.enable = config.debug.enable_structured_logging = False
    training, parallelism, checkpoint = config.training, config.parallelism, config.checkpoint
    training.local_batch_size, training.seq_len, training.steps = 2, 16, arguments.steps
    training.mixed_precision_param, training.disable_cuda_graphs = "float32", True
    parallelism.data_parallel_replicate_degree = parallelism.data_parallel_shard_degree = 2
    parallelism.spmd_backend = arguments.spmd_backend
    checkpoint.enable, checkpoint.interval = True, arguments.save_every
    checkpoint.async_mode = arguments.async_mode
    trainer = config.build()
    trainer.metrics_processor.logger = PrintLoss()
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
