# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint may come from a stranger: what its files must not hold. A `ValueError` names it, and where it is."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Far more than any configuration has, and few enough for whatever walks through it
_DEEPEST_JSON = 100
_MOST_LABELS = 100_000


def refuse_links_out_of(folder: Path) -> None:
    """Through such a link any file of this machine could come into the output."""
    from modeling_attnres.model_card import leads_out_of

    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and leads_out_of(folder, path):
            raise ValueError(
                f"{path} is a link out of the folder, to {os.path.realpath(path)}: put the file itself in its place."
            )


def check_config(config: Any, path: Path) -> None:
    """The parts of a configuration that are used before transformers has validated them."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} has no `model_type`: it is not the configuration of a model.")
    architectures, auto_map = config.get("architectures"), config.get("auto_map")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ValueError(f"`architectures` of {path} is {architectures!r}, but it has to be a list of class names.")
    if auto_map is not None and not isinstance(auto_map, dict):
        raise ValueError(f"`auto_map` of {path} is {auto_map!r}, but it has to map Auto classes to class names.")
    labels = config.get("num_labels")
    if isinstance(labels, int) and not 0 <= labels <= _MOST_LABELS:
        # transformers writes a name down for each
        raise ValueError(f"`num_labels` of {path} is {labels}, but at most {_MOST_LABELS} are taken.")
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions < 1:
        raise ValueError(f"`max_position_embeddings` of {path} is {positions}, but it has to be at least 1.")
    if config.get("transformers_weights") is not None:
        raise ValueError(
            f"`transformers_weights` of {path} names a file of weights, {config['transformers_weights']!r}: give that "
            "file the usual name, model.safetensors, and take the field out."
        )
    for name in ("attn_implementation", "experts_implementation"):
        for field in (name, f"_{name}", f"_{name}_internal"):
            # As in owner/name: transformers would fetch such a kernel from the Hub and run it
            if "/" in str(config.get(field)):
                raise ValueError(f"`{field}` of {path} is {config[field]!r}, code from the Hub: take the field out.")


def check_tokenizer_config(config: Any, path: Path) -> None:
    """AutoTokenizer takes some of it for paths, and opens them wherever they lead."""
    root = Path(os.path.realpath(path.parent))
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a tokenizer.")
    for field, value in config.items():
        if field in ("mecab_kwargs", "sudachi_kwargs", "jumanpp_kwargs") and value:
            raise ValueError(f"`{field}` of {path} is {value!r}, options of another program: take it out.")
        # Older tokenizers kept in this one where they were made, and nothing opens it
        for name in [] if field == "special_tokens_map_file" else _texts(value):
            # From the folder or from the current one: which of them, the tokenizer's class decides
            for file in (root / name, Path(name)):
                if os.path.isfile(file) and root not in Path(os.path.abspath(file)).parents:
                    raise ValueError(
                        f"`{field}` of {path} names {name!r}, and {os.path.abspath(file)} is a file outside of the "
                        "folder: take it out."
                    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def parse_json(text: bytes, origin: Path | str) -> Any:
    """JSON that every reader understands alike."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in content if names.count(name) > 1)!r} stands there twice")
        return content

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        # Half of a surrogate pair can be read, but not written
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is not valid JSON: {error}") from error
    level, depth = [content], 0
    while level := [part for part in level if isinstance(part, (dict, list))]:
        depth += 1
        if depth > _DEEPEST_JSON:
            raise ValueError(f"{origin} is nested more than {_DEEPEST_JSON} levels deep.")
        level = [child for part in level for child in (part.values() if isinstance(part, dict) else part)]
    return content
