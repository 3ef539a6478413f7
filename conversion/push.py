# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Push: a checkpoint goes to the Hub, with its model card."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError

import modeling_attnres

from .model_card import PLACEHOLDER, card_metadata, carried_license, model_card
from .reading import CARD, CONFIG, INDEX, find_checkpoint, read_checkpoint
from .retrofit import new_tensors_of, read_config, require_attnres
from .revert import trained_queries


def write_card(checkpoint: str | Path, retrofit: str | Path) -> Path:
    r"""
    Writes the model card of a trained checkpoint, in place of the one that is there. Base and license are those in the
    card of the retrofit that it was trained from.

    Args:
        checkpoint (`str` or `Path`): folder of the trained AttnRes checkpoint.
        retrofit (`str` or `Path`): folder or Hub id of the retrofit.

    Returns:
        `Path`: the card.

    Raises:
        `FileNotFoundError`, `ValueError`: not a whole AttnRes checkpoint, or a retrofit without a readable card.
    """
    files, source = read_checkpoint(Path(checkpoint)), find_checkpoint(retrofit)
    if not (source / CARD).is_file():
        raise FileNotFoundError(f"{source} has no {CARD}, which names base and license.")
    queries = [name for name in new_tensors_of(files) if name.endswith(".query") and name in files.tensors]
    base_id = card_metadata(source / CARD).get("base_model")
    base = base_id or f"A {files.config['base_model_type']} model"
    count = len(trained_queries(files, queries))
    state = f"It was trained from a retrofit: {count} of {len(queries)} queries are not zero."
    made = f"Trained from the retrofit `{source.name}`."
    auto_class = getattr(modeling_attnres, files.architecture)._auto_class
    card = model_card(read_config(files), auto_class, base, carried_license(source), state, made, base_id)
    (files.folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    return files.folder / CARD


def push(checkpoint: str | Path, name: str, *, private: bool = False) -> str:
    r"""
    Uploads an AttnRes checkpoint, in one commit. If the upload is interrupted, the same call continues it: files that
    are on the Hub already are not sent again. The card is sent with the Hub id in it.

    Args:
        checkpoint (`str` or `Path`): folder of an AttnRes checkpoint.
        name (`str`): Hub id, `owner/name` or `name`. The repository is made if it is not there.
        private (`bool`, *optional*, defaults to `False`): whether a new repository is private.

    Returns:
        `str`: the address of the repository.

    Raises:
        `FileNotFoundError`, `ValueError`: not a whole AttnRes checkpoint, or one without a card.
        `ConnectionError`: the upload was interrupted, or the Hub refused it.
    """
    files = read_checkpoint(Path(checkpoint))
    require_attnres(files)
    card = files.folder / CARD
    if not card.is_file():
        raise FileNotFoundError(
            f"{files.folder} has no {CARD}: write one with `attnres card`, or use `model.push_to_hub`."
        )
    card_metadata(card)
    paths = [CONFIG, *files.shards, *(str(path) for path in files.other_files() if str(path) != CARD)]
    if (files.folder / INDEX).is_file():
        paths.append(INDEX)
    try:
        api = HfApi()
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        sent = card.read_text(encoding="utf-8").replace(PLACEHOLDER, repository.repo_id)
        operations = [CommitOperationAdd(path, str(files.folder / path)) for path in paths]
        operations.append(CommitOperationAdd(CARD, sent.encode()))
        api.create_commit(repository.repo_id, operations, commit_message="Upload an AttnRes checkpoint")
    except (HTTPError, RuntimeError) as error:  # a RuntimeError if the upload of a file failed
        raise ConnectionError(
            f"{files.folder} was not uploaded to {name}: {error.__cause__ or error} The checkpoint is whole. To "
            f"continue: `attnres push {files.folder} {name}{' --private' if private else ''}`."
        ) from error
    return str(repository)
