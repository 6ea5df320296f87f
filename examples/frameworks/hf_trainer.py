"""The Hugging Face Trainer with ``fsdp``, either version: a Llama with tied embeddings."""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=64,
    tie_word_embeddings=True,
)


class Tokens(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 64, (8,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


class PrintLoss(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']:.9g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--version", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(options.directory),
        per_device_train_batch_size=2,
        max_steps=options.steps,
        save_steps=options.save_every,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        fsdp=True,
        fsdp_config={
            "version": options.version,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "activation_checkpointing": True,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    )
    model = LlamaForCausalLM(CONFIG)
    trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=[PrintLoss()])
    options.directory.mkdir(exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(options.directory)))


if __name__ == "__main__":
    main()
