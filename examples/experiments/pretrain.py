"""Attention Residuals from scratch. All arms start with the same weights and see the same batches.

    python examples/experiments/pretrain.py --rates 1e-3 2e-3 4e-3 8e-3 --output pretrain.jsonl    # the sweep
    python examples/experiments/pretrain.py --arms base block-mean --rates 4e-3 --seeds 1 2 --output pretrain.jsonl
    python examples/experiments/plot_training.py pretrain.jsonl --output pretrain.png

Arms: `base` is a small Llama. The others are the same Llama with Attention Residuals, named by type and scaling (`mean`
is the form of the paper). The default is 4 million parameters, trained on the sources of Python's standard library. A
run takes some 150 seconds on two cores.
"""

import argparse

from text import default_files, sample, token_blocks
from train_base import llama_config, train_tokenizer
from training import add_sweep_options, record, settings, sweep, train
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
    # The base has no queries and no key norms
    model.load_state_dict(base.state_dict(), strict=False)
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sweep_options(parser)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:-1])
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--files", nargs="+", default=default_files(), help="text files (default: Python's library)")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.set_defaults(rates=[2e-3], temperature=1.0, steps=250, eval_steps=25, eval_blocks=64, batch_size=8)
    args = parser.parse_args()

    tokenizer = train_tokenizer(args.files, args.vocab_size)
    train_blocks, held_out_blocks = token_blocks(args.files, tokenizer, args.block_length)
    held_out_blocks = sample(held_out_blocks, args.eval_blocks)
    config = llama_config(tokenizer, args.hidden_size, args.layers)
    attn_res = {"attn_res_block_size": args.block_size, "attn_res_temperature": args.temperature}
    for arm, seed, rates in sweep(args):
        model = build(config, arm, seed, **attn_res)
        row = {"arm": arm, "seed": seed, "parameters": model.num_parameters(), **settings(args), **rates}
        if arm != "base":
            row |= {"block_size": model.config.attn_res_block_size, "temperature": args.temperature}
        rates |= {"weight_decay": args.weight_decay}
        record({**row, "losses": train(model, rates, train_blocks, held_out_blocks, args, seed)}, args.output)


if __name__ == "__main__":
    main()
