# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Push: a checkpoint goes to the Hub, with a card that says what it is."""

import warnings
from pathlib import Path

from .checkpoint import CONFIG, INDEX, read_checkpoint, replace_text
from .retrofit import read_config
from .verify import TOLERANCE, Verification


def push(
    checkpoint: str | Path,
    name: str,
    private: bool = False,
    verification: Verification | None = None,
) -> str:
    r"""
    Uploads an AttnRes checkpoint, in one commit. If that is interrupted, the same call goes on: what the Hub has of it
    by then is not sent again.

    The result of the verification is written into the card in the folder, for a later call. The card is sent with the
    Hub id in it, and with the heat map of [`write_pictures`] and the page of [`write_page`] (`page.html`), if they are
    in the checkpoint's folder. Pictures and pages of other weights are left out, with a warning.

    Args:
        checkpoint (`str` or `Path`): folder of an AttnRes checkpoint.
        name (`str`): Hub id, `owner/name` or `name`. The repository is made if it is not there.
        private (`bool`, *optional*, defaults to `False`): whether a new repository is private.
        verification ([`Verification`], *optional*): what [`verify`] found of it.

    Returns:
        `str`: the address of the repository.

    Raises:
        `FileNotFoundError`, `ValueError`: not a whole AttnRes checkpoint.
        `ConnectionError`: the upload was interrupted, or the Hub refused it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    # Of the HTTP client that this version of huggingface_hub has: an error of the Hub's, or no connection at all
    from huggingface_hub.errors import HTTPError

    from modeling_attnres.inspected import sort_pictures
    from modeling_attnres.model_card import card_metadata, carried_licence, for_hub, with_pictures

    files = read_checkpoint(Path(checkpoint))
    if files.config["model_type"] != "attnres":
        raise ValueError(f"{files.folder} is not AttnRes: its `model_type` is {files.config['model_type']!r}.")
    path = files.folder / "README.md"
    if not path.is_file():
        raise FileNotFoundError(
            f"{files.folder} has no README.md: copy the retrofit's and say what was done since, or use "
            "`model.push_to_hub`."
        )
    if verification is not None:
        keep_verification(files.folder, verification)
    card = path.read_text(encoding="utf-8")
    try:
        metadata = card_metadata(card)
    except Exception as error:  # noqa: BLE001  the YAML parser's own, and others
        raise ValueError(f"The metadata at the head of {path} cannot be read: {error}") from error
    if "license_link" in metadata.keys() - carried_licence(metadata, files.folder).keys():
        warnings.warn(
            f"`license_link` of {path} is {metadata['license_link']!r}, a file that is not there: put it into the "
            "folder, or take the field out.",
            stacklevel=2,
        )
    shards = [files.folder / shard for shard in files.weights.files_metadata]
    others = [str(path) for path in files.other_files()]
    pictures, left_out = sort_pictures(files.folder, others, read_config(files), shards)
    paths = [CONFIG, *files.weights.files_metadata, *(path for path in others if path not in left_out)]
    if (files.folder / INDEX).is_file():
        paths.append(INDEX)
    try:
        api = HfApi()
        repository = api.create_repo(name, private=private or None, exist_ok=True)
        operations = [CommitOperationAdd(path, str(files.folder / path)) for path in paths if path != "README.md"]
        sent = for_hub(with_pictures(card, pictures), repository.repo_id)
        operations.append(CommitOperationAdd("README.md", sent.encode()))
        api.create_commit(repository.repo_id, operations, commit_message="Upload an AttnRes checkpoint")
    except (HTTPError, RuntimeError) as error:  # the latter where it was a file's upload that failed
        raise ConnectionError(
            f"{files.folder} was not uploaded to {name}: {error.__cause__ or error} The checkpoint is whole; to go on, "
            f"`attnres push {files.folder} {name}{' --private' if private else ''}`."
        ) from error
    return str(repository)


def keep_verification(folder: Path, verification: Verification) -> None:
    """Writes what [`verify`] found into the card of a checkpoint, from which it is carried on."""
    from modeling_attnres.model_card import VERIFICATION, with_section

    base = f"`{verification.base}`{f' at commit {verification.commit}' if verification.commit else ''}"
    content = (
        f"Compared with its base, {base}, by `attnres verify`, in float32, before any training that followed: the "
        f"largest difference between logits was {verification.max_difference:.2e}, the largest logit "
        f"{verification.max_logit:.2e}. The two computed {'the same' if verification.passed else 'different things'} "
        f"({verification.relative_difference:.1e} of it, {TOLERANCE:.0e} allowed)."
    )
    path = folder / "README.md"
    replace_text(path, with_section(path.read_text(encoding="utf-8"), VERIFICATION, content))
