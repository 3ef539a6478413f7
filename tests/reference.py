"""AttnRes written straight down from the paper, on the modules of an untouched base model: an oracle for the wiring."""

import torch


def depth_attend(module, sources, scale):
    """`s · Σ αᵢ vᵢ` in float64."""
    values = torch.stack(sources).double()
    keys = values / (values.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * module.key_norm.double()
    logits = torch.einsum("mbtd,d->mbt", keys, module.query.double()) / module.config.attn_res_temperature
    weights = logits.softmax(0)
    hidden_states = torch.einsum("mbt,mbtd->btd", weights, values)
    return (hidden_states * (len(sources) if scale == "sum" else 1)).to(sources[0].dtype)


def causal_mask(config, layer_idx, length):
    """Additive mask of one layer, with its window if it has one."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    allowed = distance >= 0
    layer_types = getattr(config, "layer_types", None)
    windowed = layer_types is None or layer_types[layer_idx] == "sliding_attention"
    if windowed and getattr(config, "sliding_window", None) is not None:
        allowed &= distance < config.sliding_window
    return torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]


def reference_logits(base, attnres, input_ids):
    """
    Logits of `attnres`, from the modules of `base` (attention implementation: eager) and the queries of `attnres`.

    `blocks` holds the embedding and the finished blocks, `partial` the running sum, as in the paper's listing.
    """
    config, decoder = attnres.config, base.model
    hidden_states = decoder.embed_tokens(input_ids) * getattr(decoder, "embedding_multiplier", 1.0)
    positions = {"position_ids": torch.arange(input_ids.shape[1])[None]}
    if hasattr(decoder, "rotary_emb"):
        positions["position_embeddings"] = decoder.rotary_emb(hidden_states, positions["position_ids"])

    def sublayer(layer, output):
        output = output[0] if isinstance(output, tuple) else output
        return output * getattr(layer, "residual_multiplier", 1.0)

    def attention(layer_idx, hidden_states):
        layer = decoder.layers[layer_idx]
        hidden_states = layer.input_layernorm(hidden_states)
        if getattr(layer, "block_type", None) == "linear_attention":
            mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
            return sublayer(layer, mixer(hidden_states))
        mask = causal_mask(config, layer_idx, input_ids.shape[1])
        return sublayer(layer, layer.self_attn(hidden_states, attention_mask=mask, **positions))

    def mlp(layer_idx, hidden_states):
        layer = decoder.layers[layer_idx]
        mixer = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        return sublayer(layer, mixer(layer.post_attention_layernorm(hidden_states)))

    res = attnres.model
    if config.attn_res_type == "full":
        outputs = [hidden_states]
        for i in range(config.num_hidden_layers):
            if i > 0:
                hidden_states = depth_attend(res.layers[i].self_attention_res, outputs, config.attn_res_scale)
            outputs.append(attention(i, hidden_states))
            outputs.append(mlp(i, depth_attend(res.layers[i].mlp_res, outputs, config.attn_res_scale)))
        sources = outputs
    else:
        blocks, partial = [], hidden_states
        for i in range(config.num_hidden_layers):
            if i % config.attn_res_block_size == 0:
                blocks.append(partial)
                partial = None
            sources = blocks if partial is None else [*blocks, partial]
            if i > 0:
                hidden_states = depth_attend(res.layers[i].self_attention_res, sources, config.attn_res_scale)
            output = attention(i, hidden_states)
            partial = output if partial is None else partial + output
            hidden_states = depth_attend(res.layers[i].mlp_res, [*blocks, partial], config.attn_res_scale)
            partial = partial + mlp(i, hidden_states)
        sources = [*blocks, partial]
    hidden_states = decoder.norm(depth_attend(res.layers[-1].output_res, sources, config.attn_res_scale))
    return base.lm_head(hidden_states) / getattr(config, "logits_scaling", 1.0)
