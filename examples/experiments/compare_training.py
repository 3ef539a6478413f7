"""Continued training of a base and of its retrofit. All arms start at the same loss and see the same batches.

    python examples/experiments/compare_training.py BASE --arms base attnres --seeds 0 1 2 --output losses.jsonl
    python examples/experiments/compare_training.py BASE --arms attnres --attn-res-rates 5e-5 2e-4 --output losses.jsonl

Arms: `base` and `attnres` train all parameters, `attnres-only` the queries and key norms, `lora` a LoRA of all linear
layers, `lora-attnres` the same LoRA and the queries and key norms in full. The default text is newer than most models.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from text import recent_files, sample, token_blocks
from training import WITHOUT_ATTN_RES, add_sweep_options, record, settings, sweep, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

from modeling_attnres.conversion import retrofit
from modeling_attnres.training import ATTN_RES_MODULES


ARMS = ("base", "attnres", "attnres-only", "lora", "lora-attnres")


def adapted(model: PreTrainedModel, arm: str, rank: int) -> torch.nn.Module:
    if arm in ("base", "attnres"):
        return model
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=DUMMY_TARGET_MODULES if arm == "attnres-only" else "all-linear",
        modules_to_save=None if arm == "lora" else ATTN_RES_MODULES,
    )
    return get_peft_model(model, config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub id of the base")
    add_sweep_options(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--optim", help="an optimizer of Trainer, with one rate for all (default: AdamW, our groups)")
    parser.add_argument("--type", choices=["block", "full"], default="block")
    parser.add_argument("--files", nargs="+", help="text files (default: the newest sources of transformers)")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--save", type=Path, help="folder for the trained models with AttnRes, for `attnres inspect`")
    parser.set_defaults(rates=[5e-5], steps=60, eval_steps=20, eval_blocks=32, batch_size=4)
    args = parser.parse_args()
    if args.optim and args.attn_res_rates:
        parser.error(f"--attn-res-rates with --optim {args.optim}: an optimizer of Trainer has one rate for all.")

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    train_blocks, held_out_blocks = token_blocks(args.files or recent_files(), tokenizer, args.block_length)
    held_out_blocks = sample(held_out_blocks, args.eval_blocks)
    with tempfile.TemporaryDirectory() as folder:
        attnres = retrofit(
            args.base,
            Path(folder) / "attnres",
            attn_res_type=args.type,
            attn_res_block_size=args.block_size,
            attn_res_temperature=args.temperature,
            link=True,
        )
        for arm, seed, rates in sweep(args):
            set_seed(seed)
            checkpoint = args.base if arm in WITHOUT_ATTN_RES else attnres
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
            row = {"base": Path(args.base).name, "arm": arm, "seed": seed, **settings(args), **rates}
            row["block_size"] = getattr(model.config, "attn_res_block_size", None)
            row["temperature"] = getattr(model.config, "attn_res_temperature", None)
            model = adapted(model, arm, args.lora_rank)
            start = time.perf_counter()
            row["losses"] = train(model, rates, train_blocks, held_out_blocks, args, seed, args.optim)
            record({**row, "seconds": round(time.perf_counter() - start)}, args.output)
            if args.save and arm not in WITHOUT_ATTN_RES:
                trained = args.save / "-".join([arm, *(f"{rate:g}" for rate in rates.values()), f"seed{seed}"])
                merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
                merged.save_pretrained(trained)
                tokenizer.save_pretrained(trained)


if __name__ == "__main__":
    main()
