"""Which queries a trained retrofit owes its gain to: the loss on held-out text while only some of them are kept.

    python examples/experiments/which_queries.py my-attnres-trained

The others are put back to zero, where they started. Key norms stay: without a query they do nothing.
"""

import argparse

import torch
from text import recent_files, sample, token_blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_attnres import DepthAttention


@torch.no_grad()
def loss_with(kept: set[str], model: PreTrainedModel, rows: torch.Tensor) -> float:
    """The mean loss while the depth attentions that are not in `kept`, by their names in the model, have no query."""
    others = [
        module.query
        for name, module in model.named_modules()
        if isinstance(module, DepthAttention) and name not in kept
    ]
    queries = [query.clone() for query in others]
    for query in others:
        query.zero_()
    loss = sum(model(row[None], labels=row[None]).loss.item() for row in rows) / len(rows)
    for query, value in zip(others, queries):
        query.copy_(value)
    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--files", nargs="+", help="text files (default: the newest sources of transformers)")
    parser.add_argument("--eval-blocks", type=int, default=32)
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--parts", type=int, default=3, help="in how many parts to cut the depth")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    _, held_out = token_blocks(args.files or recent_files(), tokenizer, args.block_length)
    # Those that compare_training.py takes
    rows = sample(held_out, args.eval_blocks)["input_ids"]

    names = [name for name, module in model.named_modules() if isinstance(module, DepthAttention)]
    groups = {
        "none": set(),
        "all": set(names),
        "the attention's": {name for name in names if name.endswith("self_attention_res")},
        "the MLPs'": {name for name in names if name.endswith("mlp_res")},
    }
    layers = model.config.num_hidden_layers
    for part in range(args.parts):
        first, end = part * layers // args.parts, (part + 1) * layers // args.parts
        groups[f"layers {first} to {end - 1}"] = {n for n in names for i in range(first, end) if f".layers.{i}." in n}
    print("| queries kept | loss |\n|---|---|")
    for group, kept in groups.items():
        print(f"| {group} | {loss_with(kept, model, rows):.4f} |", flush=True)


if __name__ == "__main__":
    main()
