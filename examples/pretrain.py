"""What Attention Residuals do from scratch: each arm from the same first weights, on the same batches.

    python examples/pretrain.py --rates 1e-3 2e-3 4e-3 8e-3 --output pretrain.jsonl               # the sweep
    python examples/pretrain.py --arms base block-mean --rates 4e-3 --seeds 1 2 --output pretrain.jsonl
    python examples/plot_training.py pretrain.jsonl --output pretrain.png

Arms: `base` is a small Llama, the others are that with Attention Residuals, by type and scale (`mean` is the paper's
form). By default 4 million parameters on the sources of Python's standard library, some 150 seconds a run on two cores.
"""

import argparse
import json
from pathlib import Path

from compare_training import settings, train
from text import default_files, sample, token_blocks
from train_base import llama_config, train_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, set_seed

from modeling_attnres import AttnResConfig


ARMS = ("base", "block-mean", "block-sum", "full-mean", "full-sum")


def build(config: LlamaConfig, arm: str, seed: int, **attn_res) -> PreTrainedModel:
    set_seed(seed)
    base = AutoModelForCausalLM.from_config(config)
    if arm == "base":
        return base
    kind, scale = arm.split("-")
    config = AttnResConfig.from_base_config(config, attn_res_type=kind, attn_res_scale=scale, **attn_res)
    model = AutoModelForCausalLM.from_config(config)
    # Queries and key norms come in no base
    model.load_state_dict(base.state_dict(), strict=False)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines that runs are added to")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:-1])
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-3], help="learning rates of all but AttnRes")
    parser.add_argument("--attn-res-rates", nargs="+", type=float, help="of queries and key norms (default: the same)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--files", nargs="+", default=default_files(), help="text files (default: Python's library)")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--eval-steps", type=int, default=25)
    parser.add_argument("--eval-blocks", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation-steps", type=int, default=1, help="batches that a step's gradient is made of")
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    args = parser.parse_args()

    tokenizer = train_tokenizer(args.files, args.vocab_size)
    train_blocks, held_out_blocks = token_blocks(args.files, tokenizer, args.block_length)
    held_out_blocks = sample(held_out_blocks, args.eval_blocks)
    config = llama_config(tokenizer, args.hidden_size, args.layers)
    attn_res = {"attn_res_block_size": args.block_size, "attn_res_temperature": args.temperature}
    for arm in args.arms:
        for rate in args.rates:
            for attn_res_rate in [None] if arm == "base" else args.attn_res_rates or [rate]:
                for seed in args.seeds:
                    model = build(config, arm, seed, **attn_res)
                    row = {"arm": arm, "seed": seed, "parameters": model.num_parameters(), **settings(args)}
                    rates = {"learning_rate": rate}
                    if arm != "base":
                        rates["attn_res_learning_rate"] = attn_res_rate
                        row |= {"block_size": model.config.attn_res_block_size, "temperature": args.temperature}
                    decay = {"weight_decay": args.weight_decay}
                    losses = train(model, rates | decay, train_blocks, held_out_blocks, args, seed)
                    with args.output.open("a") as file:
                        file.write(json.dumps({**row, **rates, "losses": losses}) + "\n")
                    print({**row, **rates, "losses": [round(point["loss"], 4) for point in losses]}, flush=True)


if __name__ == "__main__":
    main()
