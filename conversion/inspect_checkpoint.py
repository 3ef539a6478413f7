# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Inspect: where do the sublayers of a checkpoint look, how decidedly, and what is it good for?"""

import os
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .checkpoint import Checkpoint, download, read_checkpoint


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

TEXT = """The river comes down from the hills in spring, when the snow melts, and for some weeks the lower fields stand
under water. Farmers here have known it for as long as anyone can remember, and they build their houses on the high
ground. In 1911 an engineer proposed a dam. He drew it with care, counted the cost, and was sent home: the flood, he was
told, brings the soil in which everything grows. "What would you have us plant," an old woman asked him, "in your dry
fields?" He had no answer, and the river still comes down every spring.
"""


@dataclass
class Dilution:
    """
    What a signal has to stand up to on its way through a model, per layer. `outputs`: the root mean square of what the
    layer leaves (the residual stream; with AttnRes the sum of the running block or the MLP's output), the median over
    the tokens. `gradients`: the norm of the loss's gradient with respect to the layer's parameters, as its base has
    them.
    """

    outputs: list[float]
    gradients: list[float]


@dataclass
class Inspection:
    """
    What depth attention does in one checkpoint, on one text.

    Args:
        name (`str`): the checkpoint's.
        digest (`str`): of its weights, by which a picture is known to show them.
        sublayers (`list[str]`): what each depth attention feeds, in order; the rows of what follows.
        sources (`list[str]`): what it attends over; the columns.
        tokens (`list[str]`): the text.
        loss (`float`): mean loss on the text.
        weights (`torch.Tensor` of shape `(sublayers, tokens, sources)`): NaN at sources that a sublayer does not have.
        query_norms (`torch.Tensor` of shape `(sublayers,)`): how far each query is from zero, where it started.
        loss_changes (`torch.Tensor` of shape `(sublayers, sources)`, *optional*):
            what the loss gains when one source is taken out of one sublayer and the other weights are renormalised.
        dilution, base_dilution ([`Dilution`], *optional*): the checkpoint's and its base's.
    """

    name: str
    digest: str
    sublayers: list[str]
    sources: list[str]
    tokens: list[str]
    loss: float
    weights: "torch.Tensor"
    query_norms: "torch.Tensor"
    loss_changes: "torch.Tensor | None" = None
    dilution: Dilution | None = None
    base_dilution: Dilution | None = None

    @property
    def mean_weights(self) -> "torch.Tensor":
        """`(sublayers, sources)`: the mean over the tokens."""
        return self.weights.mean(1)

    @property
    def entropies(self) -> "torch.Tensor":
        """`(sublayers, tokens)`: the weights' entropy over that of equal weights. 1: equal; 0: all on one source."""
        weights = self.weights.nan_to_num(0)
        counts = (~self.weights[:, 0].isnan()).sum(-1)
        return weights.xlogy(weights).sum(-1) / -counts.log().unsqueeze(-1)


def inspect_checkpoint(
    checkpoint: str | Path,
    text: str = TEXT,
    base: str | Path | None = None,
    ablate: bool = False,
    max_tokens: int = 512,
    revision: str | None = None,
) -> Inspection:
    r"""
    Runs a text through an AttnRes checkpoint, in float32, and looks at its depth attentions.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id of an AttnRes causal language model.
        text (`str`, *optional*): what to run; a paragraph of English if nothing is given.
        base (`str` or `Path`, *optional*): folder or Hub id of its base, to compare dilution with.
        ablate (`bool`, *optional*, defaults to `False`):
            take each source out of each sublayer, one at a time, and measure the loss: a forward pass for each. The
            largest weight is not the largest cause ([arXiv 2606.13168](https://arxiv.org/abs/2606.13168)).
        max_tokens (`int`, *optional*, defaults to 512): where the text is cut off.
        revision (`str`, *optional*): branch, tag or commit of a checkpoint on the Hub.

    Returns:
        [`Inspection`].

    Raises:
        `FileNotFoundError`: as for [`retrofit`].
        `ValueError`: not an AttnRes causal language model, no tokenizer, a text of less than two tokens, a base of
            another shape, or a model that has diverged.
    """
    import torch

    # This registers the model type, too
    from modeling_attnres.inspected import weights_digest

    files = _read(checkpoint, revision)
    if files.config["model_type"] != "attnres":
        raise ValueError(f"{files.folder} is not AttnRes: its `model_type` is {files.config['model_type']!r}.")
    base_files = None if base is None else _read(base)
    if base_files is not None and base_files.config["model_type"] != files.config["base_model_type"]:
        raise ValueError(
            f"{files.folder} has a base of type {files.config['base_model_type']!r}, but {base_files.folder} is of "
            f"type {base_files.config['model_type']!r}."
        )
    input_ids, tokens = _tokenize(files, text, max_tokens)
    model = _load(files)
    queries = [module.query for name, module in model.named_modules() if name.endswith("_res")]
    sublayers, sources = model.config.depth_attention_names, model.config.depth_source_names
    with torch.no_grad():
        output = model(input_ids, labels=input_ids, output_depth_attentions=True)
        if not all(tensor.isfinite().all() for tensor in (output.loss, *output.depth_attentions)):
            raise ValueError(f"{files.folder} computes a loss or weights that are not finite: it has diverged.")
        weights = torch.full((len(sublayers), len(tokens), len(sources)), torch.nan)
        for row, recorded in zip(weights, output.depth_attentions):
            row[:, : recorded.shape[-1]] = recorded[0]
        inspection = Inspection(
            name=labels([checkpoint])[0],
            digest=weights_digest(model.config, [files.folder / shard for shard in files.weights.files_metadata]),
            sublayers=sublayers,
            sources=sources,
            tokens=tokens,
            loss=output.loss.item(),
            weights=weights,
            query_norms=torch.stack([query.norm() for query in queries]),
            loss_changes=_loss_changes(model, input_ids, output.loss) if ablate else None,
        )
    if base_files is not None:
        inspection.dilution = _dilution(model, input_ids)
        del model, queries
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
    checkpoint = read_checkpoint(download(str(source), revision))
    architecture = (checkpoint.config.get("architectures") or ["ForCausalLM"])[0]
    if not architecture.endswith("ForCausalLM"):
        raise ValueError(f"{checkpoint.folder} is a {architecture}, but only a causal language model can be inspected.")
    return checkpoint


def _tokenize(checkpoint: Checkpoint, text: str, max_tokens: int) -> tuple["torch.Tensor", list[str]]:
    from transformers import AutoTokenizer

    if not any(checkpoint.folder.glob("token*")):
        raise ValueError(f"{checkpoint.folder} has no tokenizer: save one into it (`tokenizer.save_pretrained`).")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    length = min(max_tokens, checkpoint.config.get("max_position_embeddings") or max_tokens)
    input_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :length]
    if input_ids.shape[1] < 2:
        raise ValueError(f"The text has {input_ids.shape[1]} tokens, but a loss needs at least 2.")
    return input_ids, [tokenizer.decode([token]) for token in input_ids[0]]


def _load(checkpoint: Checkpoint) -> "PreTrainedModel":
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def _loss_changes(model: "PreTrainedModel", input_ids: "torch.Tensor", loss: "torch.Tensor") -> "torch.Tensor":
    import torch

    counts = model.config.depth_attention_sources
    every = torch.ones(len(counts), len(model.config.depth_source_names), dtype=torch.bool)
    changes = torch.full(every.shape, torch.nan)
    pairs = [(sublayer, source) for sublayer, count in enumerate(counts) for source in range(count)]
    for sublayer, source in tqdm(pairs, desc="Ablating", delay=1):
        mask = every.clone()
        mask[sublayer, source] = False
        changes[sublayer, source] = model(input_ids, labels=input_ids, depth_attention_mask=mask).loss - loss
    return changes


def _dilution(model: "PreTrainedModel", input_ids: "torch.Tensor") -> Dilution:
    layers, outputs = model.model.layers, []
    is_attnres = model.config.model_type == "attnres"

    def keep(layer, args, output):
        # What is running stands last; a base's layer gives its hidden states alone or first
        hidden_states = output if not isinstance(output, tuple) else output[-1 if is_attnres else 0]
        outputs.append(hidden_states.detach().square().mean(-1).sqrt().median().item())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    model(input_ids, labels=input_ids).loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = []
    for layer in layers:
        squares = [
            parameter.grad.square().sum()
            for name, parameter in layer.named_parameters()
            if parameter.grad is not None and not name.startswith(("self_attention_res.", "mlp_res."))
        ]
        gradients.append(sum(squares).sqrt().item())
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
        f"{last.name}: {len(last.tokens)} tokens, loss {last.loss:.3f}. Mean weights; entropy 1: equal weights."
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
    means, entropies = inspection.mean_weights, inspection.entropies
    low, high = entropies.quantile(0.05, dim=1), entropies.quantile(0.95, dim=1)
    rows = []
    for i, sublayer in enumerate(inspection.sublayers):
        count = int((~means[i].isnan()).sum())
        if len(inspection.sources) <= widest:
            weights = [f"{weight:.3f}" for weight in means[i, :count]]
        else:
            weights = [f"{inspection.sources[j]} {means[i, j]:.3f}" for j in means[i, :count].topk(min(3, count))[1]]
        spread = f"{entropies[i].mean():.3f} ({low[i]:.3f} to {high[i]:.3f})"
        rows.append([sublayer, f"{inspection.query_norms[i]:.4f}", spread, *weights])
    sources = inspection.sources if len(inspection.sources) <= widest else ["largest", "second", "third"]
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
