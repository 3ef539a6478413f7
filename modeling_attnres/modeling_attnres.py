# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""
AttnRes models: a base model of transformers in which Attention Residuals replace the residual connections.

The base's own code runs at every level. Head, decoder and decoder layer are subclasses of the base's classes, made when
a model is built. Two things differ: decoder layers run on a [`ResidualStream`] in place of `hidden_states`, whose `+`
keeps the sublayers' outputs apart, and a submodule that is called with the stream receives a depth attention over them.
"""

import inspect
import operator
from collections.abc import Callable, Iterator
from itertools import repeat
from threading import RLock
from typing import Any

import torch
import transformers
from torch import fx, nn
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

from .configuration_attnres import AttnResConfig
from .depth_attention import DepthAttention


# The depth attentions of a decoder layer, in the order of its reads
READ_NAMES = ("self_attention_res", "mlp_res", "second_mlp_res", "third_mlp_res", "fourth_mlp_res")

# Class attributes that tools read from the class, for which that of the base holds
BASE_CLASS_ATTRIBUTES = (
    "base_model_prefix",
    "_can_set_experts_implementation",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
)


ADDITIONS = {
    *(operator.add, operator.iadd, torch.add),
    *(getattr(torch.Tensor, name) for name in ("add", "__add__", "__radd__")),
}
MULTIPLICATIONS = {
    *(operator.mul, operator.imul, torch.mul),
    *(getattr(torch.Tensor, name) for name in ("mul", "__mul__", "__rmul__")),
}


class ResidualStream:
    r"""
    The residual stream as the sources of depth attention ([arXiv 2603.15031](https://arxiv.org/abs/2603.15031),
    section 3). It takes the place of `hidden_states` in the forward of a base's decoder layer:

    - `stream + output` opens a source or adds to the last one;
    - `stream * number` scales every source;
    - a submodule that is called with the stream receives `stream.read()`.

    Any other operation raises a `TypeError`.

    Args:
        sources (`tuple[torch.Tensor, ...]`): the embedding, followed by the block sums (Block AttnRes; the last one is
            that of the current block) or by every sublayer's output (Full AttnRes). Each is `(batch, sequence,
            hidden_size)`.
        reads (`Iterator[Callable]`, *optional*): the depth attentions of this layer that have not been used yet.
        opens_source (`bool`, *optional*): whether the next output becomes a source of its own.
        is_full (`bool`, *optional*): whether every output becomes a source of its own.
    """

    def __init__(
        self,
        sources: tuple[torch.Tensor, ...],
        reads: Iterator[Callable] | None = None,
        opens_source: bool = False,
        is_full: bool = False,
    ):
        self.sources = sources
        self.reads = reads
        self.opens_source = opens_source
        self.is_full = is_full
        self.value = None

    def read(self) -> torch.Tensor:
        """The depth attention over the sources. All submodules that are called with this stream share it."""
        if self.value is None:
            self.value = self.sources[0] if len(self.sources) == 1 else next(self.reads)(*self.sources)
        return self.value

    def __add__(self, output: torch.Tensor) -> "ResidualStream":
        sources = self.sources
        if isinstance(output, ResidualStream) or output.shape != self.shape:
            raise TypeError("a residual stream can only be added to a tensor of its own shape")
        if output.dtype != self.dtype:
            # Autocast: as in the base's sum, the wider dtype wins
            dtype = torch.promote_types(output.dtype, self.dtype)
            sources, output = tuple(source.to(dtype) for source in sources), output.to(dtype)
        if self.opens_source or self.is_full:
            sources = (*sources, output)
        else:
            sources = (*sources[:-1], sources[-1] + output)
        return ResidualStream(sources, self.reads, False, self.is_full)

    def __mul__(self, factor: float | torch.Tensor) -> "ResidualStream":
        if isinstance(factor, torch.Tensor) and factor.numel() != 1:
            raise TypeError("a residual stream can only be multiplied by a number")
        sources = tuple(source * factor for source in self.sources)
        return ResidualStream(sources, self.reads, self.opens_source, self.is_full)

    __radd__ = __add__
    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        # `tensor + stream` arrives here, and under a compiler `stream + tensor` too. The methods are called by name,
        # since `+` would come back here
        if function in ADDITIONS:
            return args[0].__add__(args[1]) if isinstance(args[0], cls) else args[1].__add__(args[0])
        if function in MULTIPLICATIONS:
            return args[0].__mul__(args[1]) if isinstance(args[0], cls) else args[1].__mul__(args[0])
        name = getattr(function, "__name__", function)
        raise TypeError(f"a residual stream can be added to, scaled and given to submodules, but not used in `{name}`")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(f"a residual stream can be added to, scaled and given to submodules, but it has no `{name}`")

    shape = property(lambda self: self.sources[0].shape)
    dtype = property(lambda self: self.sources[0].dtype)
    device = property(lambda self: self.sources[0].device)


class Reader:
    """`self` for the forward of a base's decoder layer. Submodules that are called with the stream receive its read."""

    def __init__(self, module: nn.Module, call: Callable):
        self._module = module
        self._call = call

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        if isinstance(value, nn.Module):
            return Reader(value, self._call)
        return value.__func__.__get__(self) if inspect.ismethod(value) else value

    def __call__(self, *args, **kwargs):
        return self._call(self._module, *map(read, args), **{name: read(value) for name, value in kwargs.items()})


def read(value: Any) -> Any:
    return value.read() if isinstance(value, ResidualStream) else value


def call(module: nn.Module, *args, **kwargs):
    return module(*args, **kwargs)


class Symbol(fx.Proxy):
    """Stands for a tensor in a forward that is run to see its structure."""

    def __add__(self, other):
        # As a tensor does, it leaves the sum to the stream
        return NotImplemented if isinstance(other, ResidualStream) else super().__add__(other)

    def __mul__(self, other):
        return NotImplemented if isinstance(other, ResidualStream) else super().__mul__(other)


class SymbolTracer(fx.proxy.GraphAppendingTracer):
    def proxy(self, node: fx.Node) -> Symbol:
        return Symbol(node, self)

    def symbol(self, *args, **kwargs) -> Symbol:
        return self.proxy(self.graph.placeholder("symbol"))

    def to_bool(self, obj: fx.Proxy) -> bool:
        return False


def trace(layer: nn.Module, forward: Callable) -> tuple[int, int]:
    """
    Runs the forward of a base's decoder layer on symbols, without its submodules. This is the one place that determines
    how many depth attentions a layer has: one for each state of the stream that a submodule is called with.

    Returns:
        `tuple[int, int]`: the numbers of reads, and of outputs that are added to the stream.
    """
    tracer, reads = SymbolTracer(fx.Graph()), []

    def count(*sources):
        reads.append(sources)
        return tracer.symbol()

    parameters = list(inspect.signature(forward).parameters.values())[2:]
    required = [p.name for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    # Two sources, since a single one is read without a depth attention
    stream = ResidualStream((tracer.symbol(), tracer.symbol()), repeat(count), is_full=True)
    output = forward(Reader(layer, tracer.symbol), stream, **{name: tracer.symbol() for name in required})
    stream = output[0] if isinstance(output, tuple) else output
    if not isinstance(stream, ResidualStream):
        raise TypeError("its result is not the residual stream")
    return len(reads), len(stream.sources) - 2


class OverBase:
    """For classes of which a subclass is made for each base: `cls.over(base_class)` inherits from both."""

    _classes = {}
    _lock = RLock()

    @classmethod
    def over(cls, base_class: type) -> type:
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
        cls, base_class = type(self).__bases__
        return new_over, (cls, base_class), vars(self)


def new_over(cls: type, base_class: type) -> nn.Module:
    return object.__new__(cls.over(base_class))


class AttnResDecoderLayer(OverBase, GradientCheckpointingLayer):
    r"""
    A base's decoder layer on a [`ResidualStream`]. It adds the depth attentions `self_attention_res` and `mlp_res` (the
    first and second read of the layer) and, in the last layer, `output_res`, which feeds the final norm.

    Between layers the decoder carries the stream. Hooks, gradient checkpointing and `forward` see its sources as
    positional tensors.
    """

    @classmethod
    def _make_class(cls, base_class: type) -> type:
        # Without decorators: transformers' checkpointing must wrap a layer once
        forward = inspect.unwrap(base_class.forward)
        names = list(inspect.signature(forward).parameters)
        if len(names) < 2 or names[0] != "self" or names[1] in ("args", "kwargs"):
            raise TypeError(f"`{base_class.__name__}.forward` starts with {names[:2]}, not with the hidden states")
        return super()._make_class(base_class, base_forward=staticmethod(forward), argument_names=names[2:])

    def add_depth_attention(self, config: AttnResConfig, layer_idx: int) -> None:
        try:
            num_reads, self.num_outputs = trace(self, self.base_forward)
        except Exception as error:
            raise ValueError(
                f"`base_model_type` is {config.base_model_type!r}, but `{type(self).__bases__[1].__name__}` is not a "
                f"decoder layer that adds its sublayers' outputs to a residual stream: {error}."
            ) from error
        self.layer_idx = layer_idx
        self.is_full = config.attn_res_type == "full"
        self.is_block_boundary = layer_idx % config.attn_res_block_size == 0
        # The first read of the model has a single source, the embedding
        self.read_names = READ_NAMES[layer_idx == 0 : num_reads]
        device = next(self.parameters()).device
        for name in self.read_names:
            setattr(self, name, DepthAttention(config).to(device))
        is_last = layer_idx == config.num_hidden_layers - 1
        self.output_res = DepthAttention(config).to(device) if is_last else None

    def __call__(self, hidden_states: torch.Tensor | ResidualStream, *args, **kwargs):
        is_stream = isinstance(hidden_states, ResidualStream)
        if self.layer_idx > 0 and not is_stream:
            raise ValueError(
                f"Layer {self.layer_idx} of an AttnRes model needs the sources of all layers before it, but received "
                "one tensor. Pipeline parallelism passes on one tensor: use tensor parallelism instead (vLLM: "
                "`--tensor-parallel-size N --pipeline-parallel-size 1`)."
            )
        sources = hidden_states.sources if is_stream else (hidden_states,)
        _, output, others, *sources = super().__call__(*sources, **dict(zip(self.argument_names, args)), **kwargs)
        hidden_states = ResidualStream(tuple(sources)) if output is None else output
        return hidden_states if others is None else (hidden_states, *others)

    def forward(self, *sources: torch.Tensor, **kwargs) -> tuple:
        """
        Returns:
            `tuple`: for `output_hidden_states`, the layer's first read and, in the last layer, the input of the final
            norm; the base layer's other results, if it returns a tuple; the sources.
        """
        reads = iter([getattr(self, name) for name in self.read_names])
        first = ResidualStream(sources, reads, self.is_block_boundary, self.is_full)
        output = self.base_forward(Reader(self, call), first, **kwargs)
        stream, *others = output if isinstance(output, tuple) else (output,)
        others = others if isinstance(output, tuple) else None
        if self.output_res is not None:
            return first.value, self.output_res(*stream.sources), others
        return first.value, None, others, *stream.sources


class AttnResPreTrainedModel(PreTrainedModel):
    config: AttnResConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttnResDecoderLayer"]
    _pp_plan = {}
    # For callers that query the class (vLLM). A model has its base's
    _supports_attention_backend = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_sdpa = True


class AttnResOverBase(OverBase, AttnResPreTrainedModel):
    """A model over a base's class. It builds the base, or takes over the modules of one that is given."""

    _base_classes = None

    def __new__(cls, config: AttnResConfig, base: PreTrainedModel | None = None):
        base_config_class = CONFIG_MAPPING[config.base_model_type]
        if base is None and base_config_class not in cls._base_classes:
            raise ValueError(f"`base_model_type` is {config.base_model_type!r}, which has no {cls._base_kind}.")
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
        attributes = {name: getattr(base_class, name) for name in BASE_CLASS_ATTRIBUTES}
        in_float32 = [*(base_class._keep_in_fp32_modules_strict or []), *READ_NAMES, "output_res"]
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
        `ValueError`: the base's layers do something else with the residual stream than adding, scaling and reading.
    """

    _auto_class = "AutoModel"
    _base_classes = MODEL_MAPPING
    _base_kind = "decoder in transformers"

    def __init__(self, config: AttnResConfig, base: PreTrainedModel | None = None):
        super().__init__(config, base)
        for layer_idx, layer in enumerate(decoder_layers(self)):
            layer.__class__ = AttnResDecoderLayer.over(type(layer))
            layer.add_depth_attention(config, layer_idx)
        self.post_init()

    @classmethod
    def _make_class(cls, base_class: type) -> type:
        # Transformers looks up by class name how weights are stored, so the name depends on the base
        name = f"AttnRes{base_class.__name__}"
        mapping = get_checkpoint_conversion_mapping(base_class.config_class.model_type)
        if mapping is not None:
            register_checkpoint_conversion_mapping(
                name, [without_wildcards(entry) for entry in mapping], overwrite=True
            )
        recorders = [OutputRecorder(AttnResDecoderLayer, i, capture_initial_hidden_state=False) for i in (0, 1)]
        recorded = {**(base_class._can_record_outputs or {}), "hidden_states": recorders}
        return super()._make_class(base_class, name=name, _can_record_outputs=recorded)


def decoder_layers(decoder: PreTrainedModel) -> nn.ModuleList:
    for name in ("layers", "h", "blocks"):
        if isinstance(getattr(decoder, name, None), nn.ModuleList):
            return getattr(decoder, name)
    raise ValueError(
        f"`base_model_type` is {decoder.config.base_model_type!r}, but `{type(decoder).__bases__[1].__name__}` has no "
        "list of decoder layers named `layers`, `h` or `blocks`."
    )


def without_wildcards(entry):
    """Transformers uses the target `.mlp.` as a regular expression too, which must not match `.mlp_res.`."""
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
    _base_kind = "causal language model in transformers"

    def __init__(self, config: AttnResConfig, base: PreTrainedModel | None = None):
        super().__init__(config, base)
        name, decoder = next(child for child in self.named_children() if isinstance(child[1], PreTrainedModel))
        setattr(self, name, AttnResModel(config, decoder))
        self.post_init()

    @classmethod
    def from_base(cls, base: PreTrainedModel, **attn_res) -> "AttnResForCausalLM":
        r"""
        Makes an AttnRes model of a loaded base. Its weights are shared, not copied, and the base is not usable
        afterwards.

        Args:
            base ([`PreTrainedModel`]): a causal language model.
            attn_res: the `attn_res_*` fields of [`AttnResConfig`] that differ from their defaults.

        Raises:
            `ValueError`: the base is not a causal language model, or is not supported.
        """
        base_config, config = base.config, AttnResConfig.from_base_config(base.config, **attn_res)
        if type(base) is not MODEL_FOR_CAUSAL_LM_MAPPING.get(type(base_config), None):
            raise ValueError(f"`base` is a {type(base).__name__}, but must be a causal language model of transformers.")
        for module in base.modules():
            if getattr(module, "config", None) is base_config:
                module.config = config
            # The weights are loaded, and must not be initialized again
            module._is_hf_initialized = True
        return cls(config, base).train(base.training)


# Trainer's label smoothing and `transformers serve` recognize causal language models by class name
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[AttnResConfig.model_type] = AttnResForCausalLM.__name__


class AttnResGenericHead(AttnResPreTrainedModel):
    def __init__(self, config: AttnResConfig):
        super().__init__(config)
        # The generic heads build their decoder by AutoModel, which may not know a configuration of remote code
        if type(config) not in MODEL_MAPPING:
            AutoModel.register(type(config), AttnResModel)


class AttnResForSequenceClassification(GenericForSequenceClassification, AttnResGenericHead):
    _auto_class = "AutoModelForSequenceClassification"


class AttnResForTokenClassification(GenericForTokenClassification, AttnResGenericHead):
    _auto_class = "AutoModelForTokenClassification"


class AttnResForQuestionAnswering(GenericForQuestionAnswering, AttnResGenericHead):
    _auto_class = "AutoModelForQuestionAnswering"


__all__ = [
    "AttnResForCausalLM",
    "AttnResForQuestionAnswering",
    "AttnResForSequenceClassification",
    "AttnResForTokenClassification",
    "AttnResModel",
    "AttnResPreTrainedModel",
]
