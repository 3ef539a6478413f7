# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""
Draws the depth attention of checkpoints of one run: weights, entropies, lengths of the queries and, with --ablate, the
effect of each source of the last one. With --base also the dilution: the size of the residual stream and of the
gradient at each layer, with and without Attention Residuals.

python plot_inspection.py CHECKPOINT... --base BASE --ablate --output pictures
"""

import argparse
from itertools import cycle
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import CenteredNorm, SymLogNorm
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres.conversion.inspection import TEXT, inspect_checkpoint
from modeling_attnres.probing import depth_attentions


matplotlib.use("agg")
STYLE = {"font.size": 8, "axes.titlesize": 9, "figure.constrained_layout.use": True, "hatch.linewidth": 0.5}
# Distinct for color-blind readers. The line styles are distinct in gray prints
LINES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D")]
FACTOR = "mean weight × sources (1: as in the base)"


def heat_maps(inspection, panels):
    """A panel for each title with values (sublayer by source), norm and label of its color bar."""
    width = 1.6 + len(panels) * (0.9 + 0.22 * max(len(inspection.sources), 6))
    size = (width, 1.4 + 0.13 * max(len(inspection.sublayers), 16))
    figure, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False, figsize=size)
    for panel, (title, values, norm, label) in zip(axes[0], panels):
        # A diverging color map, light in the middle
        image = panel.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="PuOr_r", norm=norm)
        # Hatched where a sublayer does not have the source, to distinguish it from a weight of zero
        panel.patch.set(facecolor="white", edgecolor="0.6", hatch="/////", linewidth=0)
        panel.set_xticks(range(len(inspection.sources)), inspection.sources, rotation=90, fontsize=7)
        panel.set_yticks(range(len(inspection.sublayers)), inspection.sublayers, fontsize=6)
        panel.set(xlabel="source", title=title)
        if label:
            figure.colorbar(image, ax=panel, shrink=0.6, label=label)
    return figure


def factor_norm(inspections):
    farthest = max((i.mean_factors.nan_to_num(1) - 1).abs().max().item() for i in inspections)
    return CenteredNorm(vcenter=1, halfrange=max(farthest, 1e-3))


def draw_weights(inspections):
    norm = factor_norm(inspections)
    labels = [None] * (len(inspections) - 1) + [FACTOR]
    return heat_maps(inspections[-1], [(i.name, i.mean_factors, norm, label) for i, label in zip(inspections, labels)])


def draw_ablation(inspection):
    changes = inspection.loss_changes
    greatest = max(changes.nan_to_num(0).abs().max().item(), 2e-3)
    # A few sources matter much and most matter little. A logarithmic scale shows both
    norm = SymLogNorm(linthresh=1e-3, vmin=-greatest, vmax=greatest)
    weights = (inspection.name, inspection.mean_factors, factor_norm([inspection]), FACTOR)
    return heat_maps(inspection, [weights, ("without the source", changes, norm, "change in loss")])


def draw_lines(inspections, quantity, label):
    """A line for each inspection over the sublayers, with the range of nine tokens in ten if there is one by token."""
    sublayers = inspections[0].sublayers
    figure, axes = plt.subplots(figsize=(max(7, 2 + 0.14 * len(sublayers)), 3.6))
    for inspection, (color, line, marker) in zip(inspections, cycle(LINES)):
        values = quantity(inspection)
        if values.ndim == 2:
            axes.fill_between(
                range(len(sublayers)), *(values.quantile(q, 1) for q in (0.05, 0.95)), color=color, alpha=0.15
            )
            values = values.mean(1)
        axes.plot(values.tolist(), line, color=color, marker=marker, markersize=3, label=inspection.name)
    axes.set_xticks(range(len(sublayers)), sublayers, rotation=90, fontsize=6)
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def dilution(checkpoint, text, max_tokens):
    """
    Two lists over the layers: the root mean square of a layer's output (the residual stream; with AttnRes the sum of
    the running block or the output of the MLP), median over the tokens; the norm of the gradient of the base's
    parameters.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    input_ids = tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens]
    outputs = []

    def keep(values):
        outputs.append(values.detach().square().mean(-1).sqrt().median().item())

    own = set()
    if is_attnres := model.config.model_type == "attnres":
        own = {id(p) for module in depth_attentions(model).values() for p in module.parameters()}
    for layer in model.model.layers:
        if is_attnres and layer.output_res is not None:
            layer.output_res.register_forward_pre_hook(lambda module, sources: keep(sources[-1]))
        elif is_attnres:
            # The running block is the last source
            layer.register_forward_hook(lambda layer, arguments, output: keep(output[-1]))
        else:
            layer.register_forward_hook(
                lambda layer, _, output: keep(output[0] if isinstance(output, tuple) else output)
            )
    model(input_ids, labels=input_ids).loss.backward()
    gradients = []
    for layer in model.model.layers:
        kept = [p.grad for p in layer.parameters() if p.grad is not None and id(p) not in own]
        gradients.append(sum(gradient.square().sum() for gradient in kept).sqrt().item())
    return outputs, gradients


def draw_dilution(base, attnres, name):
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
    titles = ("output magnitude (root mean square)", "norm of the gradient")
    for axes, title, *values in zip(panels, titles, base, attnres):
        for label, numbers, (color, line, marker) in zip(("base", name), values, LINES):
            axes.plot(numbers, line, color=color, marker=marker, markersize=3, label=label)
        axes.set(yscale="log", xlabel="layer", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="AttnRes checkpoints of one run")
    parser.add_argument("--base", help="the base, for the dilution")
    parser.add_argument("--ablate", action="store_true", help="leave out one source of the last checkpoint at a time")
    parser.add_argument("--text", type=Path, help="text file to run (default: a paragraph of English)")
    parser.add_argument("--max-tokens", type=int, default=512, help="length at which the text is cut")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder for the pictures")
    arguments = parser.parse_args()
    text = arguments.text.read_text() if arguments.text else TEXT
    *earlier, last = arguments.checkpoints
    inspections = [inspect_checkpoint(checkpoint, text, False, arguments.max_tokens) for checkpoint in earlier]
    inspections.append(inspect_checkpoint(last, text, arguments.ablate, arguments.max_tokens))
    arguments.output.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {
            "weights": draw_weights(inspections),
            "entropy": draw_lines(inspections, lambda i: i.entropies, "entropy / that of equal weights"),
            "queries": draw_lines(inspections, lambda i: i.query_norms, "norm of the query"),
        }
        if arguments.ablate:
            figures["ablation"] = draw_ablation(inspections[-1])
        if arguments.base:
            pair = [dilution(checkpoint, text, arguments.max_tokens) for checkpoint in (arguments.base, last)]
            figures["dilution"] = draw_dilution(*pair, inspections[-1].name)
        for name, figure in figures.items():
            figure.savefig(arguments.output / f"{name}.png", dpi=110)
            print(f"Wrote {arguments.output / name}.png")


if __name__ == "__main__":
    main()
