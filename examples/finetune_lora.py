"""Fine-tunes a retrofit with PEFT: a LoRA of its linear layers and the depth attention in full, or the latter alone.

    attnres retrofit BASE my-attnres
    python examples/finetune_lora.py my-attnres my-adapter --files my-texts/*.txt
    python examples/finetune_lora.py my-attnres my-adapter --attnres-alone --learning-rate 1e-3

The adapter loads with `PeftModel.from_pretrained(model, "my-adapter")`, and `merge_and_unload()` merges it.
"""

import argparse

import torch
from continue_training import continue_training
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from text import default_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres import ATTN_RES_MODULES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id of the retrofit")
    parser.add_argument("output", help="folder for the adapter")
    parser.add_argument("--files", nargs="+", default=default_files(), help="text files (default: Python's library)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--attnres-alone", action="store_true", help="no LoRA: under 0.1 % of the parameters")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.rank,
        lora_alpha=2 * args.rank,
        # PEFT's name for a LoRA of nothing, which leaves `modules_to_save`
        target_modules=DUMMY_TARGET_MODULES if args.attnres_alone else "all-linear",
        modules_to_save=ATTN_RES_MODULES,
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    before, after = continue_training(
        model, tokenizer, args.output, args.files, steps=args.steps, learning_rate=args.learning_rate
    )
    print(f"Loss on held-out text: {before:.3f} before, {after:.3f} after. Saved to {args.output}.")


if __name__ == "__main__":
    main()
