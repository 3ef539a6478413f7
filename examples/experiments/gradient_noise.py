"""The number of tokens in a step at which a gradient has as much signal as noise, for queries and other parameters.

    python examples/experiments/gradient_noise.py my-attnres

This is the simple noise scale of McCandlish et al. (arXiv 1812.06162, appendix A.1), tr(Σ) / |G|², in tokens. In a
batch of that size the noise is as long as the mean gradient. Adam sees only their sum, and its steps have the same
length for both.
"""

import argparse
from collections import defaultdict

from text import parse_and_load
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from modeling_attnres.training import ATTN_RES_MODULES


def group_of(name: str) -> str:
    part = next((part for part in name.split(".") if part in ATTN_RES_MODULES), None)
    return "all other parameters" if part is None else f"{part}, {'keys' if 'norm' in name else 'query'}"


def noise_scales(model: PreTrainedModel, batches: list[dict], tokens: int) -> dict[str, tuple[float, float]]:
    """
    Signal |G| and noise scale in tokens of each group of parameters, from the gradients of at least two batches of
    `tokens` tokens each. The scale is infinite if the noise hides the signal.
    """
    sums, each, together = {}, defaultdict(float), defaultdict(float)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.double() if parameter.numel() < 1e5 else parameter.grad
            each[group_of(name)] += gradient.square().sum().item() / len(batches)
            sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()
    for name, total in sums.items():
        together[group_of(name)] += (total / len(batches)).square().sum().item()
    n = len(batches)
    scales = {}
    for group in sorted(each):
        # |G_batch|² = |G|² + tr(Σ) / tokens. The same holds for all batches taken as one.
        signal = (n * together[group] - each[group]) / (n - 1)
        noise = (each[group] - together[group]) * n / (n - 1) * tokens
        scales[group] = (max(signal, 0.0) ** 0.5, noise / signal if signal > 0 else float("inf"))
    return scales


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    args, model, blocks, _ = parse_and_load(parser)
    loader = DataLoader(blocks.shuffle(seed=0), args.batch_size, drop_last=True)
    batches = [batch for batch, _ in zip(loader, range(args.batches))]
    tokens = args.batch_size * args.block_length
    print("| parameters | signal | tokens per step for as much signal as noise |\n|---|---|---|")
    for group, (signal, scale) in noise_scales(model, batches, tokens).items():
        print(f"| {group} | {signal:.2e} | {scale:,.0f} |")


if __name__ == "__main__":
    main()
