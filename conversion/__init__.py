# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""From a base checkpoint to an AttnRes checkpoint and back, on files; inspection; upload to the Hub."""

from .inspection import inspect_checkpoint, inspect_model
from .merge import merge
from .model_card import card
from .push import push
from .retrofit import retrofit
from .revert import revert
from .verify import verify


__all__ = ["card", "inspect_checkpoint", "inspect_model", "merge", "push", "retrofit", "revert", "verify"]
