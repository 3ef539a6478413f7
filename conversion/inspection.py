# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Inspect: the weights of depth attention on a text, and the effect of each source on the loss."""

import html
import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_attnres.probing import depth_attentions, depth_sources, masked_sources, recorded_weights

from .merge import load_adapter
from .reading import ADAPTER_CONFIG, find_checkpoint, read_adapter, read_attnres, refused


TEXT = """The river comes down from the hills in spring, when the snow melts, and for some weeks the lower fields stand
under water. Farmers here have known it for as long as anyone can remember, and they build their houses on the high
ground. In 1911 an engineer proposed a dam. He drew it with care, counted the cost, and was sent home: the flood, he was
told, brings the soil in which everything grows. "What would you have us plant," an old woman asked him, "in your dry
fields?" He had no answer, and the river still comes down every spring.
"""


@dataclass
class Inspection:
    """
    The depth attention of a model on a text. Its text form is a table, in a notebook it is shown as a page. Each row
    of a tensor is a sublayer. NaN means that the sublayer does not have this source.
    """

    name: str
    sublayers: list[str]
    sources: list[str]
    tokens: list[str]
    # Mean over the text
    loss: float
    # (sublayers, tokens, sources)
    weights: torch.Tensor
    # (sublayers,): 0 before training
    query_norms: torch.Tensor
    # (sublayers, sources): the growth of the loss without one source in one sublayer, the other weights renormalized
    loss_changes: torch.Tensor | None = None

    @property
    def counts(self) -> torch.Tensor:
        """`(sublayers,)`: the number of sources of each sublayer."""
        return (~self.weights[:, 0].isnan()).sum(-1)

    @property
    def mean_weights(self) -> torch.Tensor:
        """`(sublayers, sources)`: the mean over the tokens."""
        return self.weights.mean(1)

    @property
    def mean_factors(self) -> torch.Tensor:
        """`(sublayers, sources)`: mean weight times number of sources. 1 is the weight of the base."""
        return self.mean_weights * self.counts.unsqueeze(-1)

    @property
    def entropies(self) -> torch.Tensor:
        """`(sublayers, tokens)`: entropy of the weights / entropy of equal weights. 1: equal; 0: one source has all."""
        return torch.special.entr(self.weights.nan_to_num(0)).sum(-1) / self.counts.log().unsqueeze(-1)

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON. `factors`: weight times number of sources by sublayer, token and source."""

        def cut(values):
            return [[float(f"{value:.5g}") for value in row if value == value] for row in values.tolist()]

        factors = self.weights * self.counts[:, None, None]
        return {
            "name": self.name,
            "loss": self.loss,
            "tokens": self.tokens,
            "sublayers": self.sublayers,
            "sources": self.sources,
            "query_norms": self.query_norms.tolist(),
            "entropies": self.entropies.mean(1).tolist(),
            "factors": [cut(rows) for rows in factors],
            "loss_changes": None if self.loss_changes is None else cut(self.loss_changes),
        }

    def page(self) -> str:
        """An HTML page that shows the weights at each token. It needs no server and no other file."""
        # Escaped, because "</script>" in a text would end the script
        data = json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        return page.replace("__NAME__", html.escape(self.name)).replace("__DATA__", data)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.page())}" width="100%" height="700"></iframe>'

    def __str__(self) -> str:
        """Tables of at most 80 columns."""
        lines = [f"{self.name}: {len(self.tokens)} tokens, loss {self.loss:.4f}."]
        if self.query_norms.any():
            lines.append("1 - entropy: 0 if all sources have equal weights, as in the base.\n")
            lines.append(f"{'sublayer':20} |query|  1 - entropy  {'weight changed most':20} by")
            for i, count in enumerate(self.counts.tolist()):
                changes, unevenness = self.mean_factors[i, :count] - 1, 1 - self.entropies[i].double().mean()
                j = changes.abs().argmax().item()
                change = f"{self.sources[j]:20} {100 * changes[j]:+.3g}%"
                lines.append(f"{self.sublayers[i]:20} {self.query_norms[i]:.1e}  {unevenness:<11.1e}  {change}")
        else:
            lines[0] += " All queries are zero: equal weights."
        if self.loss_changes is not None:
            lines.append("\nChange in loss without one source in one sublayer, largest first:")
            lines.append(f"{'sublayer':20} {'without':20} mean weight  change in loss")
            for index in self.loss_changes.nan_to_num(0).abs().flatten().argsort(descending=True)[:20].tolist():
                i, j = divmod(index, len(self.sources))
                numbers = f"{self.mean_weights[i, j]:<11.3f}  {self.loss_changes[i, j]:+.2e}"
                lines.append(f"{self.sublayers[i]:20} {self.sources[j]:20} {numbers}")
        return "\n".join(lines)


def inspect_checkpoint(
    checkpoint: str | Path, text: str = TEXT, ablate: bool = False, max_tokens: int = 512, revision: str | None = None
) -> Inspection:
    r"""
    Runs a text through an AttnRes checkpoint, in float32, and records its depth attention.

    Args:
        checkpoint (`str` or `Path`): folder or Hub id of an AttnRes causal language model or of a PEFT adapter for one.
        text (`str`, *optional*, defaults to a paragraph of English): the text.
        ablate (`bool`, *optional*, defaults to `False`): leave each source out of each sublayer, one at a time, and
            measure the loss: the source with the largest weight may not have the largest effect
            ([arXiv 2606.13168](https://arxiv.org/abs/2606.13168)).
        max_tokens (`int`, *optional*, defaults to 512): the length at which the text is cut.
        revision (`str`, *optional*): branch, tag or commit of a checkpoint on the Hub.

    Raises:
        `FileNotFoundError`: as for [`retrofit`].
        `ValueError`: no AttnRes causal language model, no tokenizer, fewer than two tokens, or a diverged model.
    """
    folder = find_checkpoint(checkpoint, revision)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    source = read_adapter(folder)[1] if is_adapter else read_attnres(folder)
    if not source.architecture.endswith("ForCausalLM"):
        raise ValueError(f"{source.folder} is a {source.architecture}, but must be a causal language model.")
    with_tokenizer = [path for path in (folder, source.folder) if any(path.glob("token*"))]
    if not with_tokenizer:
        raise ValueError(f"{folder} has no tokenizer: save one into it (`tokenizer.save_pretrained`).")
    with refused(f"The tokenizer of {with_tokenizer[0]} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(with_tokenizer[0], trust_remote_code=False)
    if is_adapter:
        model = load_adapter(folder, source, torch.float32)
    else:
        with refused(f"{folder} cannot be loaded"):
            # Never a pickle, even if one is in the folder
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    name = Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else str(checkpoint)
    return inspect_model(model, tokenizer, text, ablate, max_tokens, name)


@torch.no_grad()
def inspect_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str = TEXT,
    ablate: bool = False,
    max_tokens: int = 512,
    name: str = "model",
) -> Inspection:
    """The same for a model in memory, in its dtype and on its device."""
    max_tokens = min(max_tokens, getattr(model.config, "max_position_embeddings", None) or max_tokens)
    input_ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :max_tokens].to(model.device)
    if input_ids.shape[1] < 2:
        raise ValueError(f"The text has {input_ids.shape[1]} tokens, but a loss needs at least 2.")
    if (token := input_ids.max().item()) >= (count := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"The tokenizer of {name} makes token {token}, but the model has {count} tokens.")
    is_training = model.training
    model.eval()
    with recorded_weights(model) as recorded:
        loss = model(input_ids, labels=input_ids).loss.item()
    if not isfinite(loss) or not all(weight.isfinite().all() for (weight,) in recorded.values()):
        raise ValueError(f"{name} computes a loss or weights that are not finite: it has diverged.")
    sublayers, sources = list(recorded), depth_sources(model)
    weights = torch.full((len(sublayers), input_ids.shape[1], len(sources)), torch.nan)
    for row, (weight,) in zip(weights, recorded.values()):
        # Without the virtual tokens of an adapter
        row[:, : weight.shape[-1]] = weight[0, -input_ids.shape[1] :]
    norms = torch.stack([module.query.float().norm().cpu() for module in depth_attentions(model).values()])
    tokens = [tokenizer.decode([token]) for token in input_ids[0].tolist()]
    inspection = Inspection(name, sublayers, sources, tokens, loss, weights, norms)
    if ablate:
        changes = torch.full((len(sublayers), len(sources)), torch.nan)
        for row, source in tqdm((~inspection.mean_weights.isnan()).nonzero().tolist(), desc="Ablating", delay=1):
            mask = torch.ones(changes.shape, dtype=torch.bool)
            mask[row, source] = False
            with masked_sources(model, mask):
                changes[row, source] = model(input_ids, labels=input_ids).loss.item() - loss
        inspection.loss_changes = changes
    model.train(is_training)
    return inspection
