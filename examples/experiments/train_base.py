"""Trains a small Llama and its tokenizer from scratch: a base for experiments.

python examples/experiments/train_base.py my-base
attnres retrofit my-base my-attnres

`--attnres block` trains the same model with Attention Residuals from scratch, in the paper's form (`mean` scaling).
"""

import argparse
from pathlib import Path

from text import default_files, token_blocks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training import adamw
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_attnres import AttnResConfig


END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(files: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train(files, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def llama_config(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(2, hidden_size // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the trained model")
    parser.add_argument("--files", nargs="+", default=default_files(), help="text files (default: Python's library)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attnres", choices=["block", "full"], help="with Attention Residuals")
    parser.add_argument("--save-steps", type=int, help="steps between two checkpoints (default: none is saved)")
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = train_tokenizer(args.files, args.vocab_size)
    config = llama_config(tokenizer, args.hidden_size, args.layers)
    if args.attnres:
        config = AttnResConfig.from_base_config(config, attn_res_type=args.attnres, attn_res_scale="mean")
    model = AutoModelForCausalLM.from_config(config)
    print(f"{model.num_parameters() / 1e6:.1f} million parameters")
    train_blocks, held_out_blocks = token_blocks(args.files, tokenizer, 256)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 10),
            logging_steps=max(1, args.steps // 5),
            eval_on_start=True,
            eval_strategy="steps",
            eval_steps=args.steps,
            save_strategy="steps" if args.save_steps else "no",
            save_steps=args.save_steps or 500,
            report_to="none",
        ),
        train_dataset=train_blocks,
        eval_dataset=held_out_blocks.select(range(min(16, len(held_out_blocks)))),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(lambda: adamw, {"learning_rate": args.learning_rate}),
    )
    trainer.train()
    trainer.save_model()
    before, after = (row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    print(f"Loss on held-out text: {before:.3f} before, {after:.3f} after. Saved to {args.output}.")


if __name__ == "__main__":
    main()
