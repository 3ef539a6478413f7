"""
The paper's depth attention in float64, and its AttnRes on the modules of an untouched base model: oracles for the
operators and for the wiring.
"""

import inspect
from contextlib import contextmanager

import torch


def attention_weights(query, key_norm, sources, eps=1e-6, kept=None):
    """
    The weights αᵢ of the sources, in the last dimension, and the sources stacked as that of the weights. The logit of a
    source that is not `kept` is -inf.
    """
    values = torch.stack([source.double() for source in sources], dim=-2)
    keys = values / (values.pow(2).mean(-1, keepdim=True) + eps).sqrt() * key_norm.double()
    logits = keys @ query.double()
    if kept is not None:
        logits = logits.masked_fill(~kept, -torch.inf)
    return logits.softmax(-1), values


def depth_attention(query, key_norm, sources, scale, eps=1e-6, kept=None):
    """`s · Σ αᵢ vᵢ`, where s is the number of (kept) sources or 1."""
    weights, values = attention_weights(query, key_norm, sources, eps, kept)
    s = 1 if scale == "mean" else len(sources) if kept is None else kept.sum()
    return s * (weights.unsqueeze(-1) * values).sum(-2)


def parameters(module):
    """Query, divided by its temperature, and key norm of a depth attention."""
    return module.query / module.temperature, module.key_norm


def first(output):
    return output[0] if isinstance(output, tuple) else output


def sublayers(layer, kwargs):
    """For each read of a base's layer, in order, a function from the read to the outputs that the layer adds."""
    if hasattr(layer, "temporal_block"):  # RecurrentGemma

        def temporal(h):
            positions, mask = kwargs["position_ids"], kwargs["attention_mask"]
            return [first(layer.temporal_block(layer.temporal_pre_norm(h), positions, mask))]

        return [temporal, lambda h: [layer.mlp_block(layer.channel_pre_norm(h))]]

    factor = getattr(layer, "residual_multiplier", 1.0)
    if getattr(layer, "block_type", None) == "linear_attention":
        linear = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
        attention = lambda h: first(linear(h))  # noqa: E731
    else:
        attention = lambda h: first(layer.self_attn(h, **kwargs))  # noqa: E731
    feed_forward = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
    mlp = lambda h: first(feed_forward(h))  # noqa: E731

    if not hasattr(layer, "post_attention_layernorm"):  # Cohere: parallel sublayers
        return [lambda h: [attention(layer.input_layernorm(h)), mlp(layer.input_layernorm(h))]]
    if not hasattr(layer, "post_feedforward_layernorm"):  # Llama: a norm before each sublayer
        return [
            lambda h: [attention(layer.input_layernorm(h)) * factor],
            lambda h: [mlp(layer.post_attention_layernorm(h)) * factor],
        ]
    # OLMo 2: a norm after each sublayer. Gemma 2: before and after
    before_attention = getattr(layer, "input_layernorm", torch.nn.Identity())
    before_mlp = getattr(layer, "pre_feedforward_layernorm", torch.nn.Identity())
    return [
        lambda h: [layer.post_attention_layernorm(attention(before_attention(h)))],
        lambda h: [layer.post_feedforward_layernorm(mlp(before_mlp(h)))],
    ]


@contextmanager
def value_input(layer, attnres_layer, sources):
    """Within it, the values of a base's attention come from a read of their own, if the AttnRes model has one."""
    if (read := attnres_layer.value_res) is None:
        yield
        return
    hidden_states = depth_attention(*parameters(read), sources, read.scale, read.eps).to(sources[0].dtype)
    norm = getattr(layer, "input_layernorm", torch.nn.Identity())
    hook = layer.self_attn.v_proj.register_forward_pre_hook(lambda module, args: norm(hidden_states))
    yield
    hook.remove()


def reference_hidden_states(base, attnres, input_ids):
    """
    The final norm's output, from the modules of `base` and the queries of `attnres`. The embedding, masks and positions
    are those of the base's own forward pass.
    """
    config, decoder, calls = attnres.config, base.model, []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for layer in decoder.layers
    ]
    base(input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    # `blocks` holds the embedding and the finished blocks, `partial` the running sum, as in the paper's listing
    hidden_states = calls[0][0][0]
    outputs, blocks, partial = [hidden_states], [], hidden_states
    for i, (layer, (args, kwargs)) in enumerate(zip(decoder.layers, calls)):
        _, *names = inspect.signature(layer.forward).parameters
        kwargs = {**dict(zip(names, args[1:])), **kwargs}
        reads = [getattr(attnres.model.layers[i], name, None) for name in ("self_attention_res", "mlp_res")]
        if i % config.attn_res_block_size == 0:
            blocks.append(partial)
            partial = None
        for read, sublayer in zip(reads, sublayers(layer, kwargs)):
            sources = blocks if partial is None else [*blocks, partial]
            sources = outputs if config.attn_res_type == "full" else sources
            if len(sources) > 1:
                hidden_states = depth_attention(*parameters(read), sources, read.scale, read.eps).to(outputs[0].dtype)
            with value_input(layer, attnres.model.layers[i], sources):
                added = sublayer(hidden_states)
            for output in added:
                outputs = [*outputs, output]
                partial = output if partial is None else partial + output
    sources = outputs if config.attn_res_type == "full" else [*blocks, partial]
    read = attnres.model.layers[-1].output_res
    hidden_states = depth_attention(*parameters(read), sources, read.scale, read.eps).to(outputs[0].dtype)
    return getattr(decoder, "norm", getattr(decoder, "final_norm", None))(hidden_states)
