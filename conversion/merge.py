# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Merge: a PEFT adapter and its AttnRes checkpoint become one checkpoint."""

import warnings
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

import modeling_attnres

from .model_card import card
from .reading import (
    ADAPTER,
    CARD,
    KEPT,
    TOKENIZER_CONFIG,
    Checkpoint,
    other_files,
    read_adapter,
    read_header,
    refused,
)
from .writing import new_folder, place_files


def merge(adapter: str | Path, output: str | Path, *, base: str | Path | None = None) -> Path:
    r"""
    Merges a PEFT adapter into its AttnRes checkpoint, also with a depth attention that was trained in full
    (`modules_to_save`). The model is loaded. Queries and key norms stay in float32, the other tensors in the base's
    dtype. The tokenizer is the adapter's, if it has one.

    Args:
        adapter (`str` or `Path`): folder or Hub id of the adapter.
        output (`str` or `Path`): folder to write, new or empty. It is returned.
        base (`str` or `Path`, *optional*): folder or Hub id of the checkpoint. The default is in the adapter.

    Raises:
        `FileNotFoundError`, `FileExistsError`: as for [`retrofit`].
        `ValueError`: no adapter, one that does not fit, or a base that is no AttnRes checkpoint or is quantized.
    """
    folder, source = read_adapter(adapter, base)
    if source.config.get("quantization_config") is not None:
        raise ValueError(f"{source.folder} is quantized: use the base before its quantization (`base`, --base).")
    model = load_adapter(folder, source, "auto")
    # Some of PEFT's methods have no merge
    with refused(f"{folder} cannot be merged into {source.folder}"):
        model = model.merge_and_unload()
    files = {file: source.folder / file for file in other_files(source.folder) if file.parts[0] != KEPT}
    files |= {file: folder / file for file in other_files(folder) if str(file) != CARD}

    with new_folder(Path(output), source) as partial:
        place_files((path, partial / file) for file, path in files.items())
        model.save_pretrained(partial)
        card(partial, source.name)
    return Path(output)


def load_adapter(folder: Path, source: Checkpoint, dtype: torch.dtype | str) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict

    with refused(f"{folder} cannot be loaded into {source.folder}"):
        # Never a pickle, even if one is in the folder
        model_class = getattr(modeling_attnres, source.architecture)
        model = model_class.from_pretrained(source.folder, dtype=dtype, use_safetensors=True)
        if (folder / TOKENIZER_CONFIG).is_file():
            # As PEFT's Auto classes do for tokens that were added before the training
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(len(tokenizer))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(model, folder)
        # PEFT drops such tensors without a warning
        expected = get_peft_model_state_dict(model, save_embedding_layers=True)
        if surplus := sorted(read_header(folder / ADAPTER).keys() - expected.keys()):
            raise ValueError(f"the model has no place for its tensor {surplus[0]!r}")
        return model
