# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Push: a checkpoint goes to the Hub, with its model card."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HTTPError

from .model_card import PLACEHOLDER
from .reading import CARD, CONFIG, INDEX, other_files, read_attnres


def push(checkpoint: str | Path, name: str, *, private: bool = False) -> str:
    r"""
    Uploads an AttnRes checkpoint, in one commit. After an interruption the same call continues the upload: files that
    are on the Hub already are not sent again. The card is sent with the Hub id in it.

    Args:
        checkpoint (`str` or `Path`): folder of an AttnRes checkpoint.
        name (`str`): Hub id, `owner/name` or `name`. The repository is created if needed. Its address is returned.
        private (`bool`, *optional*, defaults to `False`): whether a new repository is private.

    Raises:
        `FileNotFoundError`, `ValueError`: not a complete AttnRes checkpoint, or one without a card.
        `ConnectionError`: the upload was interrupted, or the Hub refused it.
    """
    files = read_attnres(checkpoint)
    card = files.folder / CARD
    if not card.is_file():
        raise FileNotFoundError(f"{files.folder} has no {CARD}: `attnres card {files.folder}` writes one.")
    index = [INDEX] if (files.folder / INDEX).is_file() else []
    paths = [CONFIG, *index, *files.shards, *map(str, other_files(files.folder))]
    try:
        api = HfApi()
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        sent = card.read_text(encoding="utf-8").replace(PLACEHOLDER, repository.repo_id)
        operations = [CommitOperationAdd(path, str(files.folder / path)) for path in paths if path != CARD]
        operations.append(CommitOperationAdd(CARD, sent.encode()))
        api.create_commit(repository.repo_id, operations, commit_message="Upload an AttnRes checkpoint")
    except (HTTPError, RuntimeError) as error:  # a RuntimeError if the upload of a file failed
        raise ConnectionError(
            f"{files.folder} was not uploaded to {name}: {error.__cause__ or error} The folder is "
            f"unchanged. To continue: `attnres push {files.folder} {name}{' --private' if private else ''}`."
        ) from error
    return str(repository)
