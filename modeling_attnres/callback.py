# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""A callback for Trainer that shows routing form while a model trains. It does not travel with checkpoints."""

import torch
from transformers import Trainer, TrainerCallback

from .depth_attention import DepthAttention


class DepthAttentionCallback(TrainerCallback):
    r"""
    Logs how evenly depth attention looks and how far its queries are from zero, whenever Trainer logs, to whatever
    Trainer reports to.

    - `depth_attention/entropy`: the weights' entropy over that of equal weights, mean over tokens and sublayers. 1 at
      zero queries; 0 where every sublayer takes one source alone.
    - `depth_attention/least_entropy`: that of the most decided sublayer.
    - `depth_attention/query_norm`, `depth_attention/largest_query_norm`: mean and largest norm of the queries.

    The weights are those of one batch, the first of the evaluation data or else of the training data, which is the
    same each time. A forward pass without gradients is what it costs; training itself is not touched. Where the
    queries are sharded (DeepSpeed ZeRO-3, FSDP1), their norms are those of what lies on the first device.

    Args:
        trainer ([`Trainer`]): the trainer that it is added to.
        per_sublayer (`bool`, *optional*, defaults to `False`): log both numbers for each sublayer too.

    ```python
    >>> from modeling_attnres.callback import DepthAttentionCallback

    >>> trainer.add_callback(DepthAttentionCallback(trainer))
    ```

    Raises:
        `ValueError`: the trainer's model has no depth attention.
    """

    def __init__(self, trainer: Trainer, per_sublayer: bool = False):
        if not any(isinstance(module, DepthAttention) for module in trainer.model.modules()):
            raise ValueError(
                f"The trainer's model is a {type(trainer.model).__name__}, which has no depth "
                "attention; of remote code, import modeling_attnres before you load it."
            )
        self.trainer = trainer
        self.per_sublayer = per_sublayer
        self.inputs = {}

    def on_train_begin(self, args, state, control, **kwargs):
        dataset = self.trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        dataset = self.trainer.train_dataset if dataset is None else dataset
        # A data loader draws a seed, and the training has to draw what it would draw without
        with torch.random.fork_rng(devices=[]):
            self.inputs = next(iter(self.trainer.get_eval_dataloader(dataset)))
        self.log()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log:
            self.log()
            # Logging takes it back, and Trainer has its own numbers to log yet
            control.should_log = True

    on_epoch_end = on_step_end

    def log(self) -> None:
        """Measures, and hands the numbers to Trainer."""
        names, entropies, norms = self.measure()
        logs = {
            "depth_attention/entropy": sum(entropies) / len(entropies),
            "depth_attention/least_entropy": min(entropies),
            "depth_attention/query_norm": sum(norms) / len(norms),
            "depth_attention/largest_query_norm": max(norms),
        }
        if self.per_sublayer:
            for name, entropy, norm in zip(names, entropies, norms):
                logs[f"depth_attention_entropy/{name.replace(' ', '_')}"] = entropy
                logs[f"depth_attention_query_norm/{name.replace(' ', '_')}"] = norm
        self.trainer.log(logs)

    @torch.no_grad()
    def measure(self) -> tuple[list[str], list[float], list[float]]:
        """Names, mean entropies and query norms of the depth attentions."""
        model = self.trainer.model_wrapped
        was_training = model.training
        model.eval()
        # Of the modules that are called: PEFT keeps others beside them
        norms = []
        hooks = [
            module.register_forward_pre_hook(lambda module, _: norms.append(module.query.float().norm().item()))
            for module in model.modules()
            if isinstance(module, DepthAttention)
        ]
        weights = model(**self.inputs, output_depth_attentions=True)["depth_attentions"]
        for hook in hooks:
            hook.remove()
        model.train(was_training)
        mask = self.inputs.get("attention_mask", torch.ones_like(weights[0][..., 0])).bool()
        # Prompt tuning puts virtual tokens before the batch's
        weights = [w[:, -mask.shape[1] :] for w in weights]
        entropies = [(w.xlogy(w).sum(-1) / -torch.tensor(w.shape[-1]).log())[mask].mean().item() for w in weights]
        config = self.trainer.accelerator.unwrap_model(model).config
        return config.depth_attention_names, entropies, norms
