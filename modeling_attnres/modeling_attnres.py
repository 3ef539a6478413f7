# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""
AttnRes models: Transformers models whose residual connections are replaced by Attention Residuals.

The forward passes are those of the base model. Head, decoder and decoder layer are subclasses of the base's classes,
made when a model is built. Two things differ. Decoder layers receive a [`ResidualStream`] in place of `hidden_states`.
Its `+` keeps the outputs of the sublayers apart. A submodule that is called with the stream receives the output of a
depth attention over these outputs.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from threading import RLock

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.output_capturing import OutputRecorder

from .configuration_attnres import WIDTH_AT_TEMPERATURE_1, AttnResConfig
from .depth_attention import DepthAttention
from .residual_stream import Reader, ResidualStream, call, trace


# The depth attentions of a decoder layer, in the order of its reads
READ_NAMES = ("self_attention_res", "mlp_res", "second_mlp_res", "third_mlp_res", "fourth_mlp_res")
# All names of depth attentions
ATTN_RES_MODULES = [*READ_NAMES, "value_res", "output_res"]


class OverBase:
    """Mixin for classes that are subclassed once per base class: `cls.over(base_class)` inherits from both."""

    _classes: dict[tuple[type, type], type] = {}
    _lock = RLock()

    @classmethod
    def over(cls, base_class: type) -> type:
        if issubclass(cls, base_class):
            return cls
        with OverBase._lock:
            if (cls, base_class) not in OverBase._classes:
                try:
                    OverBase._classes[cls, base_class] = cls._make_class(base_class)
                except (AttributeError, TypeError) as error:
                    raise RuntimeError(
                        f"modeling_attnres does not work with transformers {transformers.__version__}: {error}. "
                        "Install transformers 5.24, or a newer modeling_attnres."
                    ) from error
            return OverBase._classes[cls, base_class]

    @classmethod
    def _make_class(cls, base_class: type, name: str | None = None, **attributes) -> type:
        attributes["__qualname__"] = f"{cls.__name__}[{base_class.__name__}]"
        return type(name or cls.__name__, (cls, base_class), {"__module__": cls.__module__, **attributes})

    def __reduce_ex__(self, protocol):
        # These classes cannot be imported by name, so pickle and deepcopy make them again
        return new_over, type(self).__bases__, vars(self)


def new_over(cls: type, base_class: type) -> nn.Module:
    return object.__new__(cls.over(base_class))


class AttnResAttention(OverBase):
    """The base's attention. `v_proj` receives another input than the other projections (`attn_res_value_read`)."""

    @classmethod
    def _make_class(cls, base_class: type) -> type:
        # `wraps`, because vLLM recognizes an attention by the source of its forward, which has to be the base's
        @wraps(base_class.forward)
        def forward(self, *args, value_input: torch.Tensor, **kwargs):
            def call_with_value_input(module: nn.Module, *args, **kwargs):
                return module(value_input) if module is self.v_proj else module(*args, **kwargs)

            return base_class.forward(Reader(self, call_with_value_input), *args, **kwargs)

        return super()._make_class(base_class, forward=forward)


class AttnResDecoderLayer(OverBase, GradientCheckpointingLayer):
    r"""
    The base's decoder layer, run on a [`ResidualStream`]. It adds the depth attentions `self_attention_res` and
    `mlp_res` (the first and second read of the layer; `READ_NAMES` has more) and, in the last layer, `output_res`,
    which feeds the final norm. With `attn_res_value_read`, `value_res` reads the same sources as `self_attention_res`.

    Between layers the decoder carries the stream. Hooks, gradient checkpointing and `forward` see its sources as
    positional tensors.
    """

    @classmethod
    def _make_class(cls, base_class: type) -> type:
        # Without decorators: transformers' checkpointing must wrap a layer once
        forward = inspect.unwrap(base_class.forward)
        names = list(inspect.signature(forward).parameters)
        if len(names) < 2 or names[0] != "self" or names[1] in ("args", "kwargs"):
            raise TypeError(
                f"the arguments of `{base_class.__name__}.forward` are {names}, not (self, hidden_states, ...)"
            )
        return super()._make_class(base_class, base_forward=staticmethod(forward), argument_names=names[2:])

    def add_depth_attention(self, config: AttnResConfig, layer_idx: int) -> None:
        try:
            num_reads, self.num_outputs = trace(self, self.base_forward)
            if num_reads > len(READ_NAMES):
                raise TypeError(f"it reads the stream {num_reads} times, and at most {len(READ_NAMES)} are supported")
        except Exception as error:
            raise ValueError(
                f"`base_model_type` is {config.base_model_type!r}, but `{type(self).__bases__[1].__name__}` is not a "
                f"decoder layer that adds its sublayers' outputs to a residual stream: {error}."
            ) from error
        self.layer_idx = layer_idx
        self.is_full = config.attn_res_type == "full"
        self.is_block_boundary = layer_idx % config.attn_res_block_size == 0
        # The first read of the model has a single source, the embedding
        self.read_names = READ_NAMES[1 if layer_idx == 0 else 0 : num_reads]
        device = next(self.parameters()).device
        for name in self.read_names:
            setattr(self, name, DepthAttention(config).to(device))
        self.value_res = None
        if config.attn_res_value_read:
            attention = next((module for module in self.children() if getattr(module, "v_proj", None)), None)
            if attention is None:
                raise ValueError(
                    f"`attn_res_value_read` is True, but layer {layer_idx} of {config.base_model_type!r} has no "
                    "attention with a projection `v_proj` for its values: set it to False."
                )
            if "self_attention_res" in self.read_names:
                self.value_res = DepthAttention(config).to(device)
                attention.__class__ = AttnResAttention.over(type(attention))
        is_last = layer_idx == config.num_hidden_layers - 1
        self.output_res = DepthAttention(config).to(device) if is_last else None

    def __call__(self, hidden_states: torch.Tensor | ResidualStream, *args, **kwargs):
        is_stream = isinstance(hidden_states, ResidualStream)
        if self.layer_idx > 0 and not is_stream:
            raise ValueError(
                f"Layer {self.layer_idx} of an AttnRes model needs the sources of all layers before it, but received "
                "one tensor. In vLLM, pipeline parallelism needs this package: install modeling_attnres in vLLM's "
                "environment, and start vLLM without `--model-impl`. Elsewhere, use tensor parallelism."
            )
        sources = hidden_states.sources if is_stream else (hidden_states,)
        _, final, others, *sources = super().__call__(*sources, **dict(zip(self.argument_names, args)), **kwargs)
        hidden_states = ResidualStream(tuple(sources)) if final is None else final
        return hidden_states if others is None else (hidden_states, *others)

    def forward(self, *sources: torch.Tensor, **kwargs) -> tuple:
        """
        Returns:
            `tuple`: the layer's first read; `None`, or in the last layer the input of the final norm; the base layer's
            other results, or `None` if it returns no tuple; the sources, but not in the last layer. The first two are
            recorded for `output_hidden_states`.
        """
        reads = iter([getattr(self, name) for name in self.read_names])
        first = ResidualStream(sources, reads, self.is_block_boundary, self.is_full)
        call_submodule = call if self.value_res is None else self.call_with_value_read(first)
        result = self.base_forward(Reader(self, call_submodule), first, **kwargs)
        stream, others = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        if self.output_res is not None:
            return first.value, self.output_res(*stream.sources), others
        return first.value, None, others, *stream.sources

    def call_with_value_read(self, stream: ResidualStream) -> Callable:
        """[`call`] for a layer with `value_res`. It also passes the second read to attention, after the same norm."""
        read, value_read = stream.read(), self.value_res(*stream.sources)
        # Inputs and their counterparts from the second read: the reads, and the outputs of the norm called with them
        pairs = [(read, value_read)]

        def call_submodule(module: nn.Module, *args, **kwargs):
            if isinstance(module, AttnResAttention):
                hidden_states = args[0] if args else kwargs["hidden_states"]
                for tensor, counterpart in pairs:
                    if tensor is hidden_states:
                        return module(*args, value_input=counterpart, **kwargs)
                raise TypeError(
                    f"`attn_res_value_read` is True, but `{type(self).__bases__[1].__name__}` changes the input of its "
                    "attention after the norm: set it to False."
                )
            output = module(*args, **kwargs)
            if args and args[0] is read:
                pairs.append((output, module(value_read)))
            return output

        return call_submodule


class AttnResPreTrainedModel(PreTrainedModel):
    config: AttnResConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttnResDecoderLayer"]
    _pp_plan = {}
    # Class-level defaults for callers such as vLLM. A model uses the values of its base
    _supports_attention_backend = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True


class AttnResOverBase(OverBase, AttnResPreTrainedModel):
    """A model that inherits from a base model class. It builds the base, or takes over the modules of a given one."""

    _base_classes = None

    def __new__(cls, config: AttnResConfig, base: PreTrainedModel | None = None):
        base_config_class = CONFIG_MAPPING[config.base_model_type]
        if base is None and base_config_class not in cls._base_classes:
            raise ValueError(
                f"`base_model_type` is {config.base_model_type!r}, for which Transformers has no {cls._base_kind}."
            )
        return new_over(cls, cls._base_classes[base_config_class] if base is None else type(base))

    def __init__(self, config: AttnResConfig, base: PreTrainedModel | None = None):
        if base is None:
            super().__init__(config)
        else:
            PreTrainedModel.__init__(self, config)
            vars(self).update(vars(base), config=config)
        self.add_model_tags("attnres")
        self._no_split_modules = AttnResPreTrainedModel._no_split_modules

    @classmethod
    def _make_class(cls, base_class: type, **kwargs) -> type:
        names = [name for name in vars(AttnResPreTrainedModel) if name.startswith("_supports")]
        names += ["base_model_prefix", "_can_set_experts_implementation"]
        attributes = {name: getattr(base_class, name) for name in names}
        in_float32 = [*(base_class._keep_in_fp32_modules_strict or []), *ATTN_RES_MODULES]
        return super()._make_class(base_class, _keep_in_fp32_modules_strict=in_float32, **attributes, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DepthAttention):
            init.zeros_(module.query)
            init.ones_(module.key_norm)
        else:
            super()._init_weights(module)


class AttnResModel(AttnResOverBase):
    r"""
    The decoder of `config.base_model_type` with Attention Residuals, without a head on top. Its forward is the base's.

    Args:
        config ([`AttnResConfig`]): the model's configuration.
        base ([`PreTrainedModel`], *optional*): a decoder of the base whose modules the model takes over.

    Raises:
        `ValueError`: if the base's layers use the residual stream for anything other than adding, scaling and reading.
    """

    _auto_class = "AutoModel"
    _base_classes = MODEL_MAPPING
    _base_kind = "decoder"

    def __init__(self, config: AttnResConfig, base: PreTrainedModel | None = None):
        super().__init__(config, base)
        for layer_idx, layer in enumerate(decoder_layers(self)):
            layer.__class__ = AttnResDecoderLayer.over(type(layer))
            layer.add_depth_attention(config, layer_idx)
        self.post_init()

    @classmethod
    def _make_class(cls, base_class: type) -> type:
        # Transformers finds the layout of checkpoints by class name, so the name depends on the base
        name = f"AttnRes{base_class.__name__}"
        mapping = get_checkpoint_conversion_mapping(base_class.config_class.model_type)
        if mapping is not None:
            register_checkpoint_conversion_mapping(name, [escape_mlp(entry) for entry in mapping], overwrite=True)
        recorders = [OutputRecorder(AttnResDecoderLayer, i, capture_initial_hidden_state=False) for i in (0, 1)]
        recorded = {**(base_class._can_record_outputs or {}), "hidden_states": recorders}
        return super()._make_class(base_class, name=name, _can_record_outputs=recorded)


def decoder_layers(decoder: PreTrainedModel) -> nn.ModuleList:
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == decoder.config.num_hidden_layers:
            return child
    raise ValueError(
        f"`base_model_type` is {decoder.config.base_model_type!r}, but `{type(decoder).__bases__[1].__name__}` has no "
        f"list of decoder layers (`ModuleList` of {decoder.config.num_hidden_layers})."
    )


def escape_mlp(entry):
    """Escapes `.mlp.`, which Transformers also uses as a regular expression. It would match `.mlp_res.`."""
    is_renaming = isinstance(entry, WeightRenaming) and entry.target_patterns == [".mlp."]
    return WeightRenaming(entry.source_patterns[0], r"\.mlp\.") if is_renaming else entry


class AttnResForCausalLM(AttnResOverBase, GenerationMixin):
    r"""
    [`AttnResModel`] with the language modeling head of its base. Its forward is the base's.

    Args:
        config ([`AttnResConfig`]): the model's configuration.
        base ([`PreTrainedModel`], *optional*): a causal language model whose modules the model takes over.
    """

    _auto_class = "AutoModelForCausalLM"
    _base_classes = MODEL_FOR_CAUSAL_LM_MAPPING
    _base_kind = "causal language model"

    def __init__(self, config: AttnResConfig, base: PreTrainedModel | None = None):
        super().__init__(config, base)
        name, decoder = next(child for child in self.named_children() if isinstance(child[1], PreTrainedModel))
        setattr(self, name, AttnResModel(config, decoder))
        self.post_init()

    @classmethod
    def from_base(cls, base: PreTrainedModel, **attn_res) -> "AttnResForCausalLM":
        r"""
        Creates an AttnRes model from a loaded base model, whose weights it takes over without a copy. The base is not
        usable afterwards.

        Args:
            base ([`PreTrainedModel`]): a causal language model.
            attn_res: the `attn_res_*` fields of [`AttnResConfig`] that differ from their defaults. Here, the default of
                `attn_res_temperature` is `hidden_size / 128`.

        Raises:
            `ValueError`: if the base is not a causal language model, is not supported, is sharded by FSDP, or is
                offloaded. Tensor parallelism and quantization are supported.
        """
        base_config = base.config
        attn_res = {"attn_res_temperature": base_config.hidden_size / WIDTH_AT_TEMPERATURE_1, **attn_res}
        config = AttnResConfig.from_base_config(base_config, **attn_res)
        # Also the attributes that config.json does not have: implementations, quantization, parallelism
        vars(config).update({name: value for name, value in vars(base_config).items() if name != "model_type"})
        for name, module in base.named_modules():
            if type(module).__module__.startswith("torch.distributed") or hasattr(module, "_hf_hook"):
                raise ValueError(
                    f"`{name or 'base'}` is sharded or offloaded (FSDP or `device_map`): convert the base first, and "
                    "shard or offload the AttnRes model."
                )
        if type(base) is not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config), None):
            raise ValueError(f"`base` is a {type(base).__name__}, but must be a causal language model of transformers.")
        for module in base.modules():
            if getattr(module, "config", None) is base_config:
                module.config = config
            # The weights are loaded, and must not be initialized again
            module._is_hf_initialized = True
            # Remove the recorders of hidden states that were installed for the base's layers
            vars(module).pop("_output_capturing_hooks_installed", None)
            for key, hook in list(module._forward_hooks.items()):
                if hook.__module__ == OutputRecorder.__module__:
                    del module._forward_hooks[key]
        return cls(config, base).train(base.training)


# Trainer's label smoothing and `transformers serve` recognize causal language models by class name
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[AttnResConfig.model_type] = AttnResForCausalLM.__name__


class AttnResGenericHead(AttnResPreTrainedModel):
    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        # The generic heads build their decoder by AutoModel, to which a configuration of remote code is unknown
        if type(config) not in MODEL_MAPPING:
            AutoModel.register(type(config), AttnResModel)


class AttnResForSequenceClassification(GenericForSequenceClassification, AttnResGenericHead):
    _auto_class = "AutoModelForSequenceClassification"


class AttnResForTokenClassification(GenericForTokenClassification, AttnResGenericHead):
    _auto_class = "AutoModelForTokenClassification"


class AttnResForQuestionAnswering(GenericForQuestionAnswering, AttnResGenericHead):
    _auto_class = "AutoModelForQuestionAnswering"
