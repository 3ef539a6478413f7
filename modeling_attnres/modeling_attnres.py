# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""AttnRes models: the decoder of a base model with Attention Residuals in place of its residual connections."""

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_attnres import AttnResConfig
from .depth_attention import DepthAttention


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # older versions of transformers slice by an int or a 1D tensor alone

    def slice_logits_to_keep(hidden_states, logits_to_keep):
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


class AttnResDecoderLayer(GradientCheckpointingLayer):
    r"""
    A base's decoder layer with depth attention in place of its two residual connections. It takes over the base
    layer's modules under their own names and adds `self_attention_res` and `mlp_res`.

    Args:
        config ([`AttnResConfig`]): the model's configuration.
        base_layer (`nn.Module`): the base's decoder layer.
        layer_idx (`int`): the layer's number, from 0.
    """

    def __init__(self, config: AttnResConfig, base_layer: nn.Module, layer_idx: int):
        super().__init__()
        self.is_full = config.attn_res_type == "full"
        self.opens_block = self.is_full or layer_idx % config.attn_res_block_size == 0
        # Phi3 alone drops out what a sublayer puts out
        self.resid_attn_dropout = self.resid_mlp_dropout = nn.Identity()
        for name, module in base_layer.named_children():
            setattr(self, name, module)
        # The first sublayer of the model has one source, the embedding: nothing to attend over
        self.self_attention_res = DepthAttention(config) if layer_idx > 0 else None
        self.mlp_res = DepthAttention(config)

    def forward(self, *sources: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> tuple[torch.Tensor, ...]:
        r"""
        Args:
            sources (`torch.Tensor` of shape `(batch, sequence, hidden_size)`):
                What earlier sublayers left: the embedding, then the block sums (Block AttnRes; the last is that of the
                running block) or the sublayers' outputs (Full AttnRes).
            kwargs: what the base's attention takes.

        Returns:
            `tuple[torch.Tensor, ...]`: the sources for the next layer.
        """
        hidden_states = sources[0] if self.self_attention_res is None else self.self_attention_res(*sources)
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        sources = add_source(sources, self.resid_attn_dropout(hidden_states), opens=self.opens_block)

        hidden_states = self.mlp_res(*sources)
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        return add_source(sources, self.resid_mlp_dropout(hidden_states), opens=self.is_full)


def add_source(sources: tuple[torch.Tensor, ...], output: torch.Tensor, opens: bool) -> tuple[torch.Tensor, ...]:
    """A sublayer's output opens a source of its own or is added to the running one, the last."""
    return (*sources, output) if opens else (*sources[:-1], sources[-1] + output)


class AttnResPreTrainedModel(PreTrainedModel):
    config: AttnResConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttnResDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        # What each layer's attention was given. The first of these modules brings the embedding too, as its first
        # argument; what the last one gives is replaced by the final norm's output.
        "hidden_states": [
            OutputRecorder(DepthAttention, layer_name="self_attention_res"),
            OutputRecorder(DepthAttention, layer_name="output_res"),
        ],
        # By name: the attention's class is the base's
        "attentions": "self_attn",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DepthAttention):
            init.zeros_(module.query)
            init.ones_(module.key_norm)
        else:
            self.base_model.init_base_weights(module)


class AttnResModel(AttnResPreTrainedModel):
    r"""
    The decoder of `config.base_model_type` with Attention Residuals, without a head on top.

    It is built by the base's own class in transformers, whose modules it takes over under their own names. So a base
    checkpoint loads as it is, and attention, MLP, rotary embedding, cache and parallel plans are the base's.

    Args:
        config ([`AttnResConfig`]): the model's configuration.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        base = MODEL_MAPPING[CONFIG_MAPPING[config.base_model_type]](config)
        base_layers = base.layers
        for name, module in list(base.named_children()):
            setattr(self, name, module)
            delattr(base, name)
        # What is left of the base model knows how to initialise its modules
        self.init_base_weights = base._init_weights
        self.layers = nn.ModuleList(
            AttnResDecoderLayer(config, base_layer, layer_idx) for layer_idx, base_layer in enumerate(base_layers)
        )
        self.output_res = DepthAttention(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + sequence)`, *optional*): 0 at padding, 1 elsewhere.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): positions of the tokens.
            past_key_values ([`Cache`], *optional*): the base's own cache; depth attention keeps nothing in it.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`, *optional*):
                embeddings, in place of `input_ids`.
            use_cache (`bool`, *optional*): whether to return a cache.

        Returns:
            [`BaseModelOutputWithPast`]: on request with `hidden_states` (what each layer's attention was given, then
            the final norm's output) and `attentions`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        # One mask, or one for each type of layer
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_masks_for_generate(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids
            )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        sources = (inputs_embeds,)
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            sources = decoder_layer(
                *sources,
                attention_mask=masks[self.config.layer_types[layer_idx]] if isinstance(masks, dict) else masks,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )

        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(self.output_res(*sources)), past_key_values=past_key_values
        )


class AttnResForCausalLM(AttnResPreTrainedModel, GenerationMixin):
    r"""
    [`AttnResModel`] with a language-modelling head.

    Args:
        config ([`AttnResConfig`]): the model's configuration.

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("my-attnres-model", trust_remote_code=True)
    >>> tokenizer = AutoTokenizer.from_pretrained("my-attnres-model")
    >>> inputs = tokenizer("Attention over depth", return_tensors="pt")
    >>> tokenizer.batch_decode(model.generate(**inputs))
    ```"""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        self.model = AttnResModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Takes what [`AttnResModel.forward`] takes, and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                tokens to predict, not shifted; -100 is left out of the loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                how many logits to compute, from the end (0: all), or the positions to compute them at.
            kwargs: `shift_labels` (`labels` already shifted) and `num_items_in_batch` reach the loss.

        Returns:
            [`CausalLMOutputWithPast`]
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, past_key_values: Cache | None = None, **kwargs
    ) -> dict:
        # Phi3's rotary embedding changes at this length, and what was cached before is of no use after
        switch = getattr(self.config, "original_max_position_embeddings", None)
        if (
            past_key_values is not None
            and switch is not None
            and past_key_values.get_seq_length() <= switch < input_ids.shape[1]
        ):
            past_key_values = None
            kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)


__all__ = ["AttnResForCausalLM", "AttnResModel", "AttnResPreTrainedModel"]
