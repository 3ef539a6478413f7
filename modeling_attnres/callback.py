# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""A Trainer callback that logs depth attention during training."""

from contextlib import ExitStack

import torch
from transformers import Trainer, TrainerCallback

from .probing import depth_attentions, recorded_weights
from .training import warn_of_half_precision


class DepthAttentionCallback(TrainerCallback):
    r"""
    Logs the entropy of the depth attention weights and the norms of the queries whenever Trainer logs.

    - `depth_attention/1-entropy`: `1 - H(weights) / H(equal weights)`, where `H` is the entropy; mean over tokens and
      depth attentions. 0 at zero queries; 1 if every depth attention takes a single source.
    - `depth_attention/max_1-entropy`: that of the most selective depth attention.
    - `depth_attention/query_norm`, `depth_attention/max_query_norm`: mean and max norm of the queries.

    The weights are those of one batch, the first of the evaluation data or else of the training data, which is the same
    each time. The cost is a forward pass without gradients; training is not affected. If the queries are sharded
    (DeepSpeed ZeRO-3, FSDP1), the norms are those of the first device's part.

    Args:
        trainer ([`Trainer`]): the trainer that the callback is added to.
        per_sublayer (`bool`, *optional*, defaults to `False`): log entropy and query norm of each depth attention too.

    ```python
    >>> from modeling_attnres.callback import DepthAttentionCallback

    >>> trainer.add_callback(DepthAttentionCallback(trainer))
    ```

    Raises:
        `ValueError`: the trainer's model has no depth attention.
    """

    def __init__(self, trainer: Trainer, per_sublayer: bool = False):
        warn_of_half_precision(module.query for module in depth_attentions(trainer.model).values())
        self.trainer = trainer
        self.per_sublayer = per_sublayer
        self.inputs = {}

    def on_train_begin(self, args, state, control, **kwargs):
        dataset = self.trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
        dataset = self.trainer.train_dataset if dataset is None else dataset
        # A data loader draws a seed, which must not change the training's random numbers
        with torch.random.fork_rng(devices=[]):
            self.inputs = next(iter(self.trainer.get_eval_dataloader(dataset)))
        self.log()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log:
            self.log()
            # `log` resets it, but Trainer has yet to log its own metrics
            control.should_log = True

    on_epoch_end = on_step_end

    def log(self) -> None:
        """Measures, and passes the numbers to Trainer."""
        selectivity, norms = self.measure()
        logs = {
            "depth_attention/1-entropy": sum(selectivity.values()) / len(selectivity),
            "depth_attention/max_1-entropy": max(selectivity.values()),
            "depth_attention/query_norm": sum(norms.values()) / len(norms),
            "depth_attention/max_query_norm": max(norms.values()),
        }
        if self.per_sublayer:
            for name in norms:
                logs[f"depth_attention_1-entropy/{name.replace(' ', '_')}"] = selectivity[name]
                logs[f"depth_attention_query_norm/{name.replace(' ', '_')}"] = norms[name]
        # Not by the trainer's `log`, where TRL's trainers empty their own metrics into this row
        Trainer.log(self.trainer, logs)

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], dict[str, float]]:
        """For each depth attention, 1 minus the mean entropy of its weights, and the norm of its query."""
        model = self.trainer.model_wrapped
        was_training = model.training
        model.eval()
        norms = {}
        with ExitStack() as hooks:
            for name, module in depth_attentions(model).items():
                # Within the forward, where FSDP2 has gathered the parameters
                def record(module, _, name=name):
                    norms[name] = module.query.float().norm().item()

                hooks.callback(module.register_forward_pre_hook(record).remove)
            weights = hooks.enter_context(recorded_weights(model))
            model(**self.inputs)
        model.train(was_training)
        selectivity = {}
        for name, (w,) in weights.items():
            mask = self.inputs.get("attention_mask", torch.ones_like(w[..., 0])).bool()
            # Prompt tuning puts virtual tokens before the batch's
            w = w[:, -mask.shape[1] :].double()
            entropy = w.xlogy(w).sum(-1) / -torch.tensor(w.shape[-1]).log()
            selectivity[name] = 1 - entropy[mask].mean().item()
        return selectivity, norms
