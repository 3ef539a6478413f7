# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""A Trainer callback that logs depth attention during training."""

import torch
from transformers import Trainer, TrainerCallback

from .probing import depth_attentions, recorded_weights
from .training import warn_of_half_precision


class DepthAttentionCallback(TrainerCallback):
    r"""
    Logs the entropy of the depth attention weights and the norms of the queries whenever Trainer logs.

    - `depth_attention/1-entropy` and `max_1-entropy`: `1 - H(weights) / H(equal weights)`, where `H` is the entropy:
      mean and max over the depth attentions. 0 at zero queries; 1 if a single source has all the weight.
    - `depth_attention/query_norm` and `max_query_norm`: mean and max norm of the queries.

    The weights are those of the first batch of the evaluation data, or else of the training data. The cost is a forward
    pass without gradients. The norms of sharded queries (DeepSpeed ZeRO-3, FSDP1) are of the first device's part.

    Args:
        trainer ([`Trainer`]): the trainer that the callback is added to.
        per_sublayer (`bool`, *optional*, defaults to `False`): log entropy and query norm of each depth attention too.

    Raises:
        `ValueError`: the trainer's model has no depth attention.

    ```python
    >>> trainer.add_callback(DepthAttentionCallback(trainer))
    ```"""

    def __init__(self, trainer: Trainer, per_sublayer: bool = False):
        warn_of_half_precision(module.query for module in depth_attentions(trainer.model).values())
        self.trainer = trainer
        self.per_sublayer = per_sublayer

    def on_train_begin(self, args, state, control, **kwargs):
        dataset = self.trainer.train_dataset if self.trainer.eval_dataset is None else self.trainer.eval_dataset
        if isinstance(dataset, dict):
            dataset = next(iter(dataset.values()))
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

    @torch.no_grad()
    def log(self) -> None:
        """Measures, and passes the numbers to Trainer."""
        model = self.trainer.model_wrapped
        was_training = model.training
        model.eval()

        def measure(module, sources):
            weights = module.attention_weights(*sources)
            mask = self.inputs.get("attention_mask", torch.ones_like(weights[..., 0])).bool()
            # Prompt tuning puts virtual tokens before the batch's
            weights = weights[:, -mask.shape[1] :].double()
            entropy = weights.xlogy(weights).sum(-1) / -torch.tensor(weights.shape[-1]).log()
            # The query within the forward, where FSDP2 has gathered it
            return {"1-entropy": 1 - entropy[mask].mean().item(), "query_norm": module.query.float().norm().item()}

        with recorded_weights(model, measure) as measured:
            model(**self.inputs)
        model.train(was_training)
        logs = {}
        for kind in ("1-entropy", "query_norm"):
            values = {name.replace(" ", "_"): result[kind] for name, (result,) in measured.items()}
            logs[f"depth_attention/{kind}"] = sum(values.values()) / len(values)
            logs[f"depth_attention/max_{kind}"] = max(values.values())
            if self.per_sublayer:
                logs |= {f"depth_attention_{kind}/{name}": value for name, value in values.items()}
        # Not by the trainer's `log`, where TRL's trainers empty their own metrics into this row
        Trainer.log(self.trainer, logs)
