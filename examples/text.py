"""Text files as blocks of tokens, for training."""

import sysconfig
from itertools import chain
from pathlib import Path

import transformers
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase


def default_files() -> list[str]:
    """Real text that every machine has: the sources of Python's standard library."""
    return sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py")))


def recent_files() -> list[str]:
    """Text that no model released before 2026 was trained on: those sources of transformers that say they are newer."""
    sources = sorted(Path(transformers.__file__).parent.rglob("*.py"))
    return [str(file) for file in sources if "Copyright 2026" in file.read_text(encoding="utf-8")[:200]]


def token_blocks(files: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Dataset, Dataset]:
    """
    Cuts text files into blocks of `length` tokens, with an end-of-text token after each file.

    Returns:
        `tuple[Dataset, Dataset]`: blocks to train on and, from each tenth file, blocks to evaluate on. Both have
        `input_ids` and `labels`.
    """
    documents = load_dataset("text", data_files=files, sample_by="document", split="train")
    is_held_out = [index % 10 == 9 for index in range(len(documents))]
    if not any(is_held_out):
        raise ValueError(f"{len(documents)} text files were given, but at least 10 are needed to hold one out.")

    def cut(batch):
        # The blocks are cut here, so a text longer than the model's context is no cause for a warning
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        stream = list(chain.from_iterable(document + [tokenizer.eos_token_id] for document in ids))
        blocks = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        return {"input_ids": blocks, "labels": blocks}

    def blocks(held_out):
        rows = [index for index, is_out in enumerate(is_held_out) if is_out == held_out]
        cut_documents = documents.select(rows).map(cut, batched=True, remove_columns=["text"], desc="Tokenizing")
        return cut_documents.with_format("torch")

    return blocks(held_out=False), blocks(held_out=True)
