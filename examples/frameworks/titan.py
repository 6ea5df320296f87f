"""torchtitan's own trainer and checkpoint manager: its debug model, HSDP, random tokens."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
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


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, tokenizer_path: str) -> None:
        super().__init__()

    encode = decode = get_vocab_size = None


class PrintLoss(MetricsProcessor):
    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(self, step: int, global_avg_loss: float, *args: Any, **kwargs: Any) -> None:
        print(f"step {step} loss {global_avg_loss:.9g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--async-mode", default="disabled")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    arguments = parser.parse_args()
    config = llama3_debugmodel()
    del config.model_spec.model.layers[2:]
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.dump_folder = arguments.directory
    config.tokenizer, config.dataloader = NoTokenizer.Config(), Tokens.Config()
    config.metrics = PrintLoss.Config(log_freq=1)
    config.optimizer.implementation = "foreach"
    config.validator.enable = config.debug.enable_structured_logging = False
    config.debug.seed = 0
    config.training = TrainingConfig(
        local_batch_size=2,
        seq_len=16,
        steps=arguments.steps,
        mixed_precision_param="float32",
        disable_cuda_graphs=True,
    )
    config.parallelism = ParallelismConfig(
        data_parallel_replicate_degree=2,
        data_parallel_shard_degree=2,
        spmd_backend="partial_dtensor",
    )
    config.checkpoint = CheckpointManager.Config(
        enable=True,
        interval=arguments.save_every,
        async_mode=arguments.async_mode,
        last_save_model_only=False,
    )
    trainer = config.build()
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
