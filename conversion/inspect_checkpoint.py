# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Inspect: which sources do the sublayers of a checkpoint attend over, and how much does each matter?"""

import os
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from modeling_attnres.probing import depth_attentions, depth_sources, masked_sources, recorded_weights

from .reading import Checkpoint, find_checkpoint, read_checkpoint
from .retrofit import require_attnres


TEXT = """The river comes down from the hills in spring, when the snow melts, and for some weeks the lower fields stand
under water. Farmers here have known it for as long as anyone can remember, and they build their houses on the high
ground. In 1911 an engineer proposed a dam. He drew it with care, counted the cost, and was sent home: the flood, he was
told, brings the soil in which everything grows. "What would you have us plant," an old woman asked him, "in your dry
fields?" He had no answer, and the river still comes down every spring.
"""


@dataclass
class Dilution:
    """
    Magnitudes per layer.

    Attributes:
        outputs (`list[float]`):
            root mean square of what the layer leaves (the residual stream; with AttnRes the running block's sum or the
            MLP's output), median over the tokens.
        gradients (`list[float]`): norm of the loss's gradient with respect to the parameters that the base has too.
    """

    outputs: list[float]
    gradients: list[float]


@dataclass
class Inspection:
    """
    What depth attention does in one checkpoint, on one text.

    Args:
        name (`str`): the checkpoint's.
        sublayers (`list[str]`): what each depth attention feeds, in order; the rows of what follows.
        sources (`list[str]`): what it attends over; the columns.
        tokens (`list[str]`): the text.
        loss (`float`): mean loss on the text.
        weights (`torch.Tensor` of shape `(sublayers, tokens, sources)`): NaN at sources that a sublayer does not have.
        query_norms (`torch.Tensor` of shape `(sublayers,)`): how far each query is from zero, where it started.
        loss_changes (`torch.Tensor` of shape `(sublayers, sources)`, *optional*):
            by how much the loss grows without one source in one sublayer, with the other weights renormalized.
        dilution, base_dilution ([`Dilution`], *optional*): the checkpoint's and its base's.
    """

    name: str
    sublayers: list[str]
    sources: list[str]
    tokens: list[str]
    loss: float
    weights: torch.Tensor
    query_norms: torch.Tensor
    loss_changes: torch.Tensor | None = None
    dilution: Dilution | None = None
    base_dilution: Dilution | None = None

    @property
    def counts(self) -> torch.Tensor:
        """`(sublayers,)`: how many sources each sublayer has."""
        return (~self.weights[:, 0].isnan()).sum(-1)

    @property
    def mean_weights(self) -> torch.Tensor:
        """`(sublayers, sources)`: the mean over the tokens."""
        return self.weights.mean(1)

    @property
    def mean_factors(self) -> torch.Tensor:
        """`(sublayers, sources)`: mean weight times number of sources. 1: as in the base, above: more."""
        return self.mean_weights * self.counts.unsqueeze(-1)

    @property
    def entropies(self) -> torch.Tensor:
        """`(sublayers, tokens)`: the weights' entropy over that of equal weights. 1: equal; 0: all on one source."""
        weights = self.weights.nan_to_num(0)
        return weights.xlogy(weights).sum(-1) / -self.counts.log().unsqueeze(-1)


def inspect_checkpoint(
    checkpoint: str | Path,
    text: str = TEXT,
    base: str | Path | None = None,
    ablate: bool = False,
    max_tokens: int = 512,
    revision: str | None = None,
) -> Inspection:
    r"""
    Runs a text through an AttnRes checkpoint, in float32, and records its depth attention.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id of an AttnRes causal language model.
        text (`str`, *optional*, defaults to a paragraph of English): the text.
        base (`str` or `Path`, *optional*): folder or Hub id of its base, to compare dilution with.
        ablate (`bool`, *optional*, defaults to `False`):
            leave each source out of each sublayer, one at a time, and measure the loss: a forward pass for each. The
            largest weight is not the largest cause ([arXiv 2606.13168](https://arxiv.org/abs/2606.13168)).
        max_tokens (`int`, *optional*, defaults to 512): the length at which the text is cut.
        revision (`str`, *optional*): branch, tag or commit of a checkpoint on the Hub.

    Returns:
        [`Inspection`].

    Raises:
        `FileNotFoundError`: as for [`retrofit`].
        `ValueError`: not an AttnRes causal language model, no tokenizer, a text of less than two tokens, a base of
            another shape, or a model that has diverged.
    """
    files = _read(checkpoint, revision)
    require_attnres(files)
    base_files = None if base is None else _read(base)
    if base_files is not None and base_files.config["model_type"] != files.config["base_model_type"]:
        raise ValueError(
            f"{files.folder} has a base of type {files.config['base_model_type']!r}, but {base_files.folder} is of "
            f"type {base_files.config['model_type']!r}."
        )
    input_ids, tokens = _tokenize(files, text, max_tokens)
    model = _load(files)
    with torch.no_grad():
        with recorded_weights(model) as recorded:
            loss = model(input_ids, labels=input_ids).loss
        recorded = {name: weights[0] for name, weights in recorded.items()}
        if not all(tensor.isfinite().all() for tensor in (loss, *recorded.values())):
            raise ValueError(f"{files.folder} computes a loss or weights that are not finite: it has diverged.")
        sublayers, sources = list(recorded), depth_sources(model)
        weights = torch.full((len(sublayers), len(tokens), len(sources)), torch.nan)
        for row, recorded_row in zip(weights, recorded.values()):
            row[:, : recorded_row.shape[-1]] = recorded_row[0]
        inspection = Inspection(
            name=labels([checkpoint])[0],
            sublayers=sublayers,
            sources=sources,
            tokens=tokens,
            loss=loss.item(),
            weights=weights,
            query_norms=torch.stack([module.query.norm() for module in depth_attentions(model).values()]),
        )
        if ablate:
            inspection.loss_changes = _loss_changes(model, input_ids, inspection)
    if base_files is not None:
        inspection.dilution = _dilution(model, input_ids)
        del model
        base_model = _load(base_files)
        if base_model.config.num_hidden_layers != len(inspection.dilution.outputs):
            raise ValueError(
                f"{files.folder} has {len(inspection.dilution.outputs)} layers, but {base_files.folder} has "
                f"{base_model.config.num_hidden_layers}: it is not its base."
            )
        inspection.base_dilution = _dilution(base_model, input_ids)
    return inspection


def labels(checkpoints: list[str | Path]) -> list[str]:
    """Names of checkpoints: Hub ids, and of folders the shortest ends of their paths that tell them apart."""
    ids = [str(checkpoint) for checkpoint in checkpoints]
    parts = [Path(os.path.abspath(name)).parts if os.path.isdir(name) else (name,) for name in ids]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*path[-length:]) for path in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def require_one_shape(inspections: list[Inspection]) -> None:
    """Checkpoints of one run have the same sublayers and sources, and only then can they stand side by side."""
    first = inspections[0]
    for other in inspections[1:]:
        if (other.sublayers, other.sources) != (first.sublayers, first.sources):
            raise ValueError(
                f"{other.name} has other sublayers or sources than {first.name}: only checkpoints of one run can be "
                "compared."
            )


def _read(source: str | Path, revision: str | None = None) -> Checkpoint:
    checkpoint = read_checkpoint(find_checkpoint(source, revision))
    if not checkpoint.architecture.endswith("ForCausalLM"):
        raise ValueError(
            f"{checkpoint.folder} is a {checkpoint.architecture}, but only a causal language model can be inspected."
        )
    return checkpoint


def _tokenize(checkpoint: Checkpoint, text: str, max_tokens: int) -> tuple[torch.Tensor, list[str]]:
    if not any(checkpoint.folder.glob("token*")):
        raise ValueError(f"{checkpoint.folder} has no tokenizer: save one into it (`tokenizer.save_pretrained`).")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    length = min(max_tokens, checkpoint.config.get("max_position_embeddings") or max_tokens)
    input_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length]
    if input_ids.shape[1] < 2:
        raise ValueError(f"The text has {input_ids.shape[1]} tokens, but a loss needs at least 2.")
    return input_ids, [tokenizer.decode([token]) for token in input_ids[0]]


def _load(checkpoint: Checkpoint) -> PreTrainedModel:
    # Never a pickle, even if one is in the folder
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, use_safetensors=True).eval()


def _loss_changes(model: PreTrainedModel, input_ids: torch.Tensor, inspection: Inspection) -> torch.Tensor:
    changes = torch.full((len(inspection.sublayers), len(inspection.sources)), torch.nan)
    pairs = [(row, source) for row, count in enumerate(inspection.counts.tolist()) for source in range(count)]
    for row, source in tqdm(pairs, desc="Ablating", delay=1):
        mask = torch.ones(changes.shape, dtype=torch.bool)
        mask[row, source] = False
        with masked_sources(model, mask):
            changes[row, source] = model(input_ids, labels=input_ids).loss - inspection.loss
    return changes


def _dilution(model: PreTrainedModel, input_ids: torch.Tensor) -> Dilution:
    layers, outputs = model.model.layers, []
    is_attnres = model.config.model_type == "attnres"

    def keep(hidden_states):
        outputs.append(hidden_states.detach().square().mean(-1).sqrt().median().item())

    own = {id(p) for module in depth_attentions(model).values() for p in module.parameters()} if is_attnres else set()
    hooks = []
    for layer in layers:
        if not is_attnres:
            hook = lambda layer, args, output: keep(output[0] if isinstance(output, tuple) else output)  # noqa: E731
            hooks.append(layer.register_forward_hook(hook))
        elif layer.output_res is None:
            # The running block is the last source
            hooks.append(layer.register_forward_hook(lambda layer, args, output: keep(output[-1])))
        else:
            hooks.append(layer.output_res.register_forward_pre_hook(lambda module, sources: keep(sources[-1])))
    model(input_ids, labels=input_ids).loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = []
    for layer in layers:
        kept = [p.grad for p in layer.parameters() if p.grad is not None and id(p) not in own]
        gradients.append(sum(gradient.square().sum() for gradient in kept).sqrt().item())
    model.zero_grad()
    return Dilution(outputs, gradients)


def tables(inspections: list[Inspection]) -> str:
    """Inspections as text: the run, if there are several; then the last, sublayer by sublayer."""
    last = inspections[-1]
    parts = []
    if len(inspections) > 1:
        rows = [
            [i.name, f"{i.loss:.3f}", f"{i.entropies.mean():.4f}", f"{i.query_norms.mean():.4f}"] for i in inspections
        ]
        parts.append(_table(["checkpoint", "loss", "entropy", "|query|"], rows))
    parts.append(
        f"{last.name}: {len(last.tokens)} tokens, loss {last.loss:.3f}. Numbers: mean weight × sources (1: as in "
        "the base). Entropy 1: equal weights."
    )
    parts.append(_weights_table(last))
    if last.loss_changes is not None:
        parts.append(f"Change in loss without one source in one sublayer, largest first.\n\n{_ablation_table(last)}")
    if last.dilution is not None:
        parts.append("What each layer leaves (root mean square) and the norm of its gradient, base and AttnRes.")
        columns = (
            last.base_dilution.outputs,
            last.dilution.outputs,
            last.base_dilution.gradients,
            last.dilution.gradients,
        )
        rows = [[f"layer {i}", *(f"{number:.3g}" for number in row)] for i, row in enumerate(zip(*columns))]
        header = ["", "output, base", "output, AttnRes", "gradient, base", "gradient, AttnRes"]
        parts.append(_table(header, rows))
    return "\n\n".join(parts)


def _weights_table(inspection: Inspection, widest: int = 12) -> str:
    factors, entropies = inspection.mean_factors, inspection.entropies
    low, high = entropies.quantile(0.05, dim=1), entropies.quantile(0.95, dim=1)
    rows = []
    for i, sublayer in enumerate(inspection.sublayers):
        count = int(inspection.counts[i])
        if len(inspection.sources) <= widest:
            weights = [f"{factor:.3f}" for factor in factors[i, :count]]
        else:
            # The ones that differ most from the base
            largest = (factors[i, :count] - 1).abs().topk(min(3, count))[1]
            weights = [f"{inspection.sources[j]} {factors[i, j]:.3f}" for j in largest]
        spread = f"{entropies[i].mean():.3f} ({low[i]:.3f} to {high[i]:.3f})"
        rows.append([sublayer, f"{inspection.query_norms[i]:.4f}", spread, *weights])
    sources = inspection.sources if len(inspection.sources) <= widest else ["farthest from 1", "second", "third"]
    return _table(["sublayer", "|query|", "entropy (5 to 95 %)", *sources], rows)


def _ablation_table(inspection: Inspection, longest: int = 20) -> str:
    changes, means = inspection.loss_changes, inspection.mean_weights
    cells = (~changes.isnan()).nonzero().tolist()
    cells.sort(key=lambda cell: -changes[cell[0], cell[1]].abs().item())
    rows = [
        [inspection.sublayers[i], inspection.sources[j], f"{means[i, j]:.3f}", f"{changes[i, j]:+.4f}"]
        for i, j in cells[:longest]
    ]
    same = (changes.nan_to_num(-inf).argmax(1) == means.nan_to_num(-inf).argmax(1)).sum()
    return (
        _table(["sublayer", "without", "mean weight", "change in loss"], rows)
        + f"\n\nIn {same} of {len(inspection.sublayers)} sublayers the source with the largest weight is also the one "
        "whose absence hurts most."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Columns under each other: the first to the left, numbers to the right."""
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in [header, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)
