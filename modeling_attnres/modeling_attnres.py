# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""AttnRes models: the decoder of a base model with Attention Residuals in place of its residual connections."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from threading import get_ident

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_attnres import AttnResConfig
from .depth_attention import DepthAttention


# What the base's modules call the cache: transformers 5.24 renamed it. The models take either name
CACHE_NAME = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# What a base's class says of its attention, cache and weights holds for its AttnRes model
BASE_MODEL_FLAGS = (
    "_can_compile_fullgraph",
    "_compatible_flash_implementations",
    "_is_stateful",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_unexpected",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
)


# A key that is no field is lost on the way through what is wrapped around a model: DDP, accelerate's mixed precision
@dataclass
class AttnResModelOutputWithPast(MoeModelOutputWithPast):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResCausalLMOutputWithPast(CausalLMOutputWithPast):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResMoeCausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResSequenceClassifierOutputWithPast(SequenceClassifierOutputWithPast):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResTokenClassifierOutput(TokenClassifierOutput):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class AttnResQuestionAnsweringModelOutput(QuestionAnsweringModelOutput):
    depth_attentions: tuple[torch.FloatTensor, ...] | None = None


# What the heads of transformers put out, with depth attentions
HEAD_OUTPUTS = {
    CausalLMOutputWithPast: AttnResCausalLMOutputWithPast,
    MoeCausalLMOutputWithPast: AttnResMoeCausalLMOutputWithPast,
    SequenceClassifierOutputWithPast: AttnResSequenceClassifierOutputWithPast,
    TokenClassifierOutput: AttnResTokenClassifierOutput,
    QuestionAnsweringModelOutput: AttnResQuestionAnsweringModelOutput,
}


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
        for name, module in base_layer.named_children():
            setattr(self, name, module)
        # Where families differ: names, a factor or a dropout on what a sublayer puts out, the cache's name
        self.attention_name = "self_attn" if hasattr(self, "self_attn") else "linear_attn"
        self.mlp_name = "mlp" if hasattr(self, "mlp") else "block_sparse_moe"
        self.residual_multiplier = getattr(base_layer, "residual_multiplier", 1.0)
        self.is_linear_attention = getattr(base_layer, "block_type", None) == "linear_attention"
        # The first sublayer of the model has one source, the embedding: nothing to attend over
        self.self_attention_res = DepthAttention(config) if layer_idx > 0 else None
        self.mlp_res = DepthAttention(config)

    def forward(
        self,
        *sources: torch.Tensor,
        depth_attention_masks: Sequence[list[bool] | None] = (None, None),
        output_depth_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, ...]:
        r"""
        Args:
            sources (`torch.Tensor` of shape `(batch, sequence, hidden_size)`):
                What earlier sublayers left: the embedding, then the block sums (Block AttnRes; the last is that of the
                running block) or the sublayers' outputs (Full AttnRes).
            depth_attention_masks (`Sequence[list[bool] | None]`, *optional*):
                which sources the attention and the MLP attend over. See [`DepthAttention.forward`].
            output_depth_attentions (`bool`, *optional*, defaults to `False`): compute the weights, to be recorded.
            kwargs: what the base's attention takes.

        Returns:
            `tuple[torch.Tensor, ...]`: what the attention was given, for who asks for hidden states, then the sources
            for the next layer. All flat, as reentrant checkpointing needs it.
        """
        if self.is_linear_attention and CACHE_NAME == "past_key_values":
            kwargs["cache_params"] = kwargs.pop("past_key_values")

        attention_input = sources[0]
        if self.self_attention_res is not None:
            attention_input = self.self_attention_res(*sources)
        hidden_states = self.input_layernorm(attention_input)
        output = getattr(self, self.attention_name)(hidden_states=hidden_states, **kwargs)
        output = self.sublayer_output(output, "resid_attn_dropout")
        sources = add_source(sources, output, opens=self.opens_block)

        hidden_states = self.mlp_res(*sources)
        hidden_states = self.post_attention_layernorm(hidden_states)
        output = self.sublayer_output(getattr(self, self.mlp_name)(hidden_states), "resid_mlp_dropout")
        return attention_input, *add_source(sources, output, opens=self.is_full)

    def sublayer_output(self, output: torch.Tensor | tuple, dropout_name: str) -> torch.Tensor:
        """What a base adds to the residual stream. Attention weights or router scores may stand beside it."""
        if isinstance(output, tuple):
            output = output[0]
        if hasattr(self, dropout_name):
            output = getattr(self, dropout_name)(output)
        return output if self.residual_multiplier == 1.0 else output * self.residual_multiplier


def add_source(sources: tuple[torch.Tensor, ...], output: torch.Tensor, opens: bool) -> tuple[torch.Tensor, ...]:
    """A sublayer's output opens a source of its own or is added to the running one, the last."""
    if output.dtype != sources[0].dtype:
        # As in the base's sum, the wider wins: under autocast that is the embedding, with embeddings that a caller gave
        # in half precision it is what the sublayers put out
        dtype = torch.promote_types(output.dtype, sources[0].dtype)
        sources, output = [source.to(dtype) for source in sources], output.to(dtype)
    return (*sources, output) if opens else (*sources[:-1], sources[-1] + output)


class AttnResPreTrainedModel(PreTrainedModel):
    config: AttnResConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttnResDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    # What most bases support, for who asks the class (vLLM does) before there is an instance that knows its base
    _supports_attention_backend = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True
    _can_record_outputs = {
        # What each layer's attention was given; what `output_res` gives is replaced by the final norm's output
        "hidden_states": [
            OutputRecorder(AttnResDecoderLayer, capture_initial_hidden_state=False),
            OutputRecorder(DepthAttention, layer_name="output_res", capture_initial_hidden_state=False),
        ],
        # As each base does it that comes along
        "attentions": [],
        "router_logits": [],
    }

    def __init__(self, config: AttnResConfig, *args, **kwargs):
        base_class = MODEL_MAPPING[CONFIG_MAPPING[config.base_model_type]]
        for name in BASE_MODEL_FLAGS:
            if hasattr(base_class, name):
                setattr(self, name, getattr(base_class, name))
        for name in ("attentions", "router_logits"):
            recorder = base_class._can_record_outputs.get(name)
            if recorder is not None and recorder not in self._can_record_outputs[name]:
                self._can_record_outputs[name].append(recorder)
        super().__init__(config, *args, **kwargs)
        self.add_model_tags("attnres")
        self.use_base_checkpoint_layout()

    @property
    def supports_pp_plan(self):
        """vLLM asks for this when it is about to cut a model into pipeline stages, and would go on after a `False`."""
        raise NotImplementedError(
            "AttnRes models cannot be cut into pipeline stages: a stage hands one tensor of `hidden_size` to the next, "
            "but depth attention needs all earlier block sums. Use tensor parallelism in place of pipeline parallelism "
            "(vLLM: `--tensor-parallel-size N --pipeline-parallel-size 1`)."
        )

    def use_base_checkpoint_layout(self):
        """
        Some bases keep their weights otherwise on disk than in memory, for instance each expert by itself. transformers
        looks up how under the `model_type`, which is one for all bases: so it is set anew before each load and save.
        """
        mapping = [
            # Saving, transformers looks for the second as a regular expression, where `.mlp.` finds `.mlp_res` too
            WeightRenaming(entry.source_patterns[0], r"\.mlp\.") if entry.target_patterns == [".mlp."] else entry
            for entry in get_checkpoint_conversion_mapping(self.config.base_model_type) or []
        ]
        register_checkpoint_conversion_mapping(self.config.model_type, mapping, overwrite=True)

    def save_pretrained(self, *args, **kwargs):
        self.use_base_checkpoint_layout()
        return super().save_pretrained(*args, **kwargs)

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
        self.embedding_multiplier = getattr(base, "embedding_multiplier", 1.0)
        self.embedding_dropout = nn.Dropout(getattr(base, "embedding_dropout", 0.0))
        # What is left of the base model knows how to initialise its modules
        self.init_base_weights = base._init_weights
        self.layers = nn.ModuleList(
            AttnResDecoderLayer(config, base_layer, layer_idx) for layer_idx, base_layer in enumerate(base_layers)
        )
        self.output_res = DepthAttention(config)
        # Other bases ignore a window that came along in their config.json
        base_config_class = CONFIG_MAPPING[config.base_model_type]
        self.has_windows = hasattr(base_config_class, "sliding_window") or hasattr(base_config_class, "layer_types")
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        output_depth_attentions: bool | None = None,
        depth_attention_mask: torch.BoolTensor | list[list[bool]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AttnResModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + sequence)`, *optional*): 0 at padding, 1 elsewhere.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): positions of the tokens.
            cache ([`Cache`], *optional*): the base's own cache; depth attention keeps nothing in it.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, hidden_size)`, *optional*):
                embeddings, in place of `input_ids`.
            use_cache (`bool`, *optional*): whether to return a cache.
            past_key_values ([`Cache`], *optional*): the older name of `cache`.
            output_depth_attentions (`bool`, *optional*):
                whether to return the weights of the depth attentions. Defaults to the configuration's value, if it has
                one. Under reentrant gradient checkpointing they have no gradient, as `attentions` have none.
            depth_attention_mask (`torch.BoolTensor` of shape `(depth attentions, sources)`, *optional*):
                `False` takes a source out of a depth attention, at all positions; `config.depth_attention_names` and
                `config.depth_source_names` say what rows and columns are. The softmax goes over what is left, and
                `"sum"` scaling counts what is left: at zero queries the source is subtracted from the residual stream.
                Columns of sources that a depth attention does not have are not read. Its values steer the wiring, which
                `torch.compile(fullgraph=True)` cannot follow.

        Returns:
            [`AttnResModelOutputWithPast`]: on request with `hidden_states` (what each layer's attention was given, then
            the final norm's output), `attentions`, `router_logits` and `depth_attentions`: a tuple with a
            `torch.Tensor` of shape `(batch, sequence, sources)`, float32, for each of `config.depth_attention_names`.

        Raises:
            `ValueError`: both or none of `input_ids` and `inputs_embeds`, or a `depth_attention_mask` of another shape
            or that leaves a depth attention no source.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.embedding_multiplier != 1.0:
            inputs_embeds = inputs_embeds * self.embedding_multiplier
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        # One mask, or one for each type of layer
        masks = attention_mask
        if not isinstance(masks, dict):
            create_masks = create_masks_for_generate if self.has_windows else create_causal_mask
            masks = create_masks(self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
        kwargs[CACHE_NAME] = cache
        if hasattr(self, "rotary_emb"):
            kwargs["position_embeddings"] = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        if output_depth_attentions is None:
            output_depth_attentions = getattr(self.config, "output_depth_attentions", False)
        # For each sublayer, of which the first has no depth attention, and for the output
        depth_masks = [None] * (2 * self.config.num_hidden_layers + 1)
        if depth_attention_mask is not None:
            depth_masks[1:] = self.checked_depth_attention_mask(depth_attention_mask)

        sources = (self.embedding_dropout(inputs_embeds),)
        for layer_idx, decoder_layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            _, *sources = decoder_layer(
                *sources,
                attention_mask=masks[self.config.layer_types[layer_idx]] if isinstance(masks, dict) else masks,
                position_ids=position_ids,
                use_cache=use_cache,
                depth_attention_masks=depth_masks[2 * layer_idx : 2 * layer_idx + 2],
                output_depth_attentions=output_depth_attentions,
                **kwargs,
            )

        hidden_states = self.output_res(*sources)
        return AttnResModelOutputWithPast(self.norm(hidden_states), **{CACHE_NAME: cache if use_cache else None})

    def checked_depth_attention_mask(self, mask: torch.BoolTensor | list[list[bool]]) -> list[list[bool]]:
        """The rows of a `depth_attention_mask`, one for each depth attention."""
        mask = torch.as_tensor(mask)
        names = self.config.depth_attention_names
        expected = (len(names), len(self.config.depth_source_names))
        if mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(
                f"`depth_attention_mask` is {mask.dtype} of shape {tuple(mask.shape)}, but it has to be torch.bool of "
                f"shape {expected}: a row for each of `config.depth_attention_names`, a column for each of "
                "`config.depth_source_names`."
            )
        rows = mask.tolist()
        for name, row, sources in zip(names, rows, self.config.depth_attention_sources):
            if not any(row[:sources]):
                raise ValueError(
                    f"`depth_attention_mask` leaves {name!r} none of its {sources} sources: one has to be `True`."
                )
        return rows


@contextmanager
def depth_attentions_of(model: PreTrainedModel) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """The `depth_attentions` of each forward pass of `model` within the block, in this thread."""
    recorded, thread = [], get_ident()

    def keep(module, args, output):
        if get_ident() == thread:
            recorded.append(output.depth_attentions)

    hook = model.register_forward_hook(keep)
    try:
        yield recorded
    finally:
        hook.remove()


def with_depth_attentions(forward: Callable) -> Callable:
    """Adds the decoder's `depth_attentions` to what a head of transformers, which knows nothing of them, puts out."""

    @wraps(forward)
    def wrapper(self, *args, output_depth_attentions: bool | None = None, **kwargs):
        if output_depth_attentions is None:
            output_depth_attentions = getattr(self.config, "output_depth_attentions", False)
        if not output_depth_attentions:
            return forward(self, *args, output_depth_attentions=False, **kwargs)
        with depth_attentions_of(self.base_model) as recorded:
            output = forward(self, *args, output_depth_attentions=True, **kwargs)
        if isinstance(output, tuple):
            return (*output, recorded[0])
        return HEAD_OUTPUTS[type(output)](**output, depth_attentions=recorded[0])

    return wrapper


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
        # Logits, loss and auxiliary loss are the base's own: its head's forward is called on this model. Looked up
        # here, since a compiler cannot look into transformers' mapping
        self.base_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[config.base_model_type]]
        self.vocab_size = config.vocab_size
        # What the head of a mixture of experts reads
        self.num_experts = getattr(config, "num_experts", getattr(config, "num_local_experts", None))
        self.num_experts_per_tok = getattr(config, "num_experts_per_tok", None)
        self.router_aux_loss_coef = getattr(config, "router_aux_loss_coef", None)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @with_depth_attentions
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        output_depth_attentions: bool | None = None,
        depth_attention_mask: torch.BoolTensor | list[list[bool]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        r"""
        Takes what [`AttnResModel.forward`] takes, and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                tokens to predict, not shifted; -100 is left out of the loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                how many logits to compute, from the end (0: all), or the positions to compute them at.
            kwargs: `shift_labels` (`labels` already shifted) and `num_items_in_batch` reach the loss.

        Returns:
            [`CausalLMOutputWithPast`], or [`MoeCausalLMOutputWithPast`] where the base is a mixture of experts.
        """
        if labels is None:
            labels = kwargs.get("shift_labels")
        kwargs[CACHE_NAME] = past_key_values if cache is None else cache
        return self.base_class.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_depth_attentions=output_depth_attentions,
            depth_attention_mask=depth_attention_mask,
            **kwargs,
        )

    @wraps(GenerationMixin.generate)
    def generate(self, *args, **kwargs):
        if kwargs.get("depth_attention_mask") is not None:
            # Tensors are taken for a batch, and repeated for each beam
            kwargs["depth_attention_mask"] = torch.as_tensor(kwargs["depth_attention_mask"]).tolist()
        if kwargs.get("output_depth_attentions") is None and getattr(self.config, "output_depth_attentions", False):
            kwargs["output_depth_attentions"] = True
        if not kwargs.get("output_depth_attentions"):
            return super().generate(*args, **kwargs)
        with depth_attentions_of(self) as recorded:
            output = super().generate(*args, **kwargs)
        if not isinstance(output, torch.Tensor):
            output["depth_attentions"] = tuple(recorded)
        return output

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        if model_kwargs.get("output_depth_attentions"):
            raise ValueError(
                "`output_depth_attentions` is True, but `generate` cannot record them in assisted generation, where a "
                "pass also sees drafted tokens that are refused: set it to False, and afterwards call "
                "`model(sequences, output_depth_attentions=True)` on what was generated."
            )
        # What drafts may be a base, or have other sources
        own = ("output_depth_attentions", "depth_attention_mask")
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in own}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        # Generation from embeddings asks for this name
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> dict:
        if cache is not None and CACHE_NAME != "cache":
            # Beside which it would make one of its own
            raise ValueError(
                "`generate` got a `cache`, which this version of transformers calls `past_key_values`: use that name."
            )
        cache = past_key_values if cache is None else cache
        if self.config.base_model_type == "phi3" and cache is not None:
            # Its rotary embedding changes at this length, and what was cached before is of no use after
            if cache.get_seq_length() <= self.config.original_max_position_embeddings < input_ids.shape[1]:
                cache = None
                kwargs["next_sequence_length"] = None
        kwargs[CACHE_NAME] = cache
        return super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)


# Trainer's label smoothing and `transformers serve` know a causal language model by the name of its class
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[AttnResConfig.model_type] = AttnResForCausalLM.__name__


class AttnResGenericHead(AttnResPreTrainedModel):
    """What transformers' generic heads need: they make their decoder by `AutoModel`."""

    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        # The class of a configuration that came as remote code from a folder is not the one imported above, since
        # transformers imports that file once by itself and once with this one
        if type(config) not in MODEL_MAPPING:
            AutoModel.register(type(config), AttnResModel)


class AttnResForSequenceClassification(GenericForSequenceClassification, AttnResGenericHead):
    _auto_class = "AutoModelForSequenceClassification"
    forward = with_depth_attentions(GenericForSequenceClassification.forward)


class AttnResForTokenClassification(GenericForTokenClassification, AttnResGenericHead):
    _auto_class = "AutoModelForTokenClassification"
    forward = with_depth_attentions(GenericForTokenClassification.forward)


class AttnResForQuestionAnswering(GenericForQuestionAnswering, AttnResGenericHead):
    _auto_class = "AutoModelForQuestionAnswering"
    forward = with_depth_attentions(GenericForQuestionAnswering.forward)


__all__ = [
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "AttnResPreTrainedModel",
]
