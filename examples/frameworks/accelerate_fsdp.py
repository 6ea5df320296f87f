"""Accelerate on FSDP, either version: a Llama with tied embeddings and gradient checkpointing."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.parallelism_config import ParallelismConfig
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--version", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-every", type=int, default=2)
    arguments = parser.parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=2,
        parallelism_config=ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
        if arguments.version == 2
        else None,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=arguments.version,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
            activation_checkpointing=True,
        ),
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    data = DataLoader(TensorDataset(torch.randint(0, 64, (256, 8))), batch_size=2)
    if arguments.version == 1:  # its parameters are others once it is wrapped
        model = accelerator.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    step = 0
    saved = sorted(arguments.directory.glob("step-*"))
    if saved:
        accelerator.load_state(str(saved[-1]))
        step = int(saved[-1].name.removeprefix("step-"))
        data = accelerator.skip_first_batches(data, step)
    for (tokens,) in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.9g}", flush=True)
        step += 1
        if step % arguments.save_every == 0:
            accelerator.save_state(str(arguments.directory / f"step-{step}"))
        if step == arguments.steps:
            break
    accelerator.end_training()


if __name__ == "__main__":
    main()
