"""Which queries matter in a trained retrofit: the loss on held-out text with only some of the queries.

    python examples/experiments/which_queries.py my-attnres-trained

All other queries are set back to zero, their first value. Key norms stay, since they do nothing without a query.
"""

import argparse

import torch
from text import parse_and_load, sample
from transformers import PreTrainedModel

from modeling_attnres import DepthAttention


@torch.no_grad()
def loss_with(kept: set[str], model: PreTrainedModel, rows: torch.Tensor) -> float:
    """Mean loss with the queries of the modules in `kept` (names in the model). All other queries are zero."""
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
    parser.add_argument("--eval-blocks", type=int, default=32)
    parser.add_argument("--parts", type=int, default=3, help="number of parts of the depth")
    args, model, _, held_out = parse_and_load(parser)
    model.eval()
    # The same blocks as in compare_training.py
    rows = sample(held_out, args.eval_blocks)["input_ids"]

    names = [name for name, module in model.named_modules() if isinstance(module, DepthAttention)]
    groups = {
        "none": set(),
        "all": set(names),
        "the attention's": {name for name in names if name.endswith(("self_attention_res", "value_res"))},
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
