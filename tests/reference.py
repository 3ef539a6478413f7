"""AttnRes written directly from the paper, on the modules of an untouched base model: an oracle for the wiring."""

import inspect

import torch


def depth_attend(module, sources, scale):
    """`s · Σ αᵢ vᵢ` in float64."""
    values = torch.stack(sources).double()
    keys = values / (values.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * module.key_norm.double()
    logits = torch.einsum("mbtd,d->mbt", keys, module.query.double()) / module.temperature
    hidden_states = torch.einsum("mbt,mbtd->btd", logits.softmax(0), values)
    return (hidden_states * (len(sources) if scale == "sum" else 1)).to(sources[0].dtype)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def sublayers(layer, kwargs):
    """For each read of a base's layer, in order, a function from the read to the outputs that the layer adds."""
    if hasattr(layer, "temporal_block"):  # RecurrentGemma

        def temporal(h):
            return [
                first(
                    layer.temporal_block(layer.temporal_pre_norm(h), kwargs["position_ids"], kwargs["attention_mask"])
                )
            ]

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
                hidden_states = depth_attend(read, sources, config.attn_res_scale)
            for output in sublayer(hidden_states):
                outputs = [*outputs, output]
                partial = output if partial is None else partial + output
    sources = outputs if config.attn_res_type == "full" else [*blocks, partial]
    hidden_states = depth_attend(attnres.model.layers[-1].output_res, sources, config.attn_res_scale)
    return getattr(decoder, "norm", getattr(decoder, "final_norm", None))(hidden_states)
