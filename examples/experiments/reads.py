"""Input-dependent queries, as an experiment. Their input-dependent part is zero at first, so a retrofit is exact."""

import re

import torch
from torch import nn
from torch.nn import functional as F

from modeling_attnres.depth_attention import DepthAttention, depth_attention
from modeling_attnres.modeling_attnres import decoder_layers


class InputDependentDepthAttention(DepthAttention):
    """Depth attention with the query `q + B · A · RMSNorm(Σᵢ vᵢ) / rank`, separately at each position."""

    def __init__(self, config, rank: int):
        super().__init__(config)
        self.down = nn.Linear(config.hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, config.hidden_size, bias=False)
        nn.init.normal_(self.down.weight, std=config.hidden_size**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, *sources: torch.Tensor) -> torch.Tensor:
        stream = torch.stack(sources).sum(0)
        # Divided by the rank: a step of Adam then changes the logits as much as that of a static query does
        query = self.query + self.up(self.down(F.rms_norm(stream, self.query.shape))) / self.up.in_features
        return depth_attention(query / self.temperature, self.key_norm, sources, self.scale, self.eps)


def add_input_dependent_queries(model: nn.Module, arm: str) -> None:
    """Adds them if the arm's name has, for instance, "query16". 16 is then their rank."""
    if rank := re.search(r"query(\d+)", arm):
        for layer in decoder_layers(model.model):
            for name in (*layer.read_names, "output_res"):
                if getattr(layer, name) is not None:
                    setattr(layer, name, InputDependentDepthAttention(model.config, int(rank[1])))
