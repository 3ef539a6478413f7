"""Text files as blocks of tokens, for training."""

import argparse
import sysconfig
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def default_files() -> list[str]:
    """Real text on every machine: the sources of Python's standard library."""
    return sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py")))


def recent_files() -> list[str]:
    """
    Sources of transformers with a copyright notice of 2026. No model released before 2026 was trained on these files.
    Much of their content is older: most of their longer lines are in older files too.
    """
    sources = sorted(Path(transformers.__file__).parent.rglob("*.py"))
    return [str(file) for file in sources if "Copyright 2026" in file.read_text(encoding="utf-8")[:200]]


def sample(blocks: Dataset, count: int) -> Dataset:
    """`count` random blocks, the same on each call. All blocks if there are fewer."""
    return blocks.shuffle(seed=0).select(range(min(count, len(blocks))))


def token_blocks(files: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Dataset, Dataset]:
    """
    Cuts text files into blocks of `length` tokens, with an end-of-text token after each file.

    Returns:
        `tuple[Dataset, Dataset]`: blocks for training, and held-out blocks for evaluation. Each tenth file is held out.
        With fewer than ten files, the end of the text is held out. Both have `input_ids` and `labels`.
    """
    end_of_text = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(files):
        stream = []
        for file in tqdm(files, desc="Tokenizing", delay=1):
            # Not verbose: a text may be longer than the context of the model, since it is cut into blocks below
            text = Path(file).read_text(encoding="utf-8")
            stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end_of_text
        return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]

    held_out = cut(files[9::10])
    blocks = cut([file for number, file in enumerate(files) if number % 10 != 9])
    if not held_out:
        blocks, held_out = blocks[: -len(blocks) // 10], blocks[-len(blocks) // 10 :]
    if not blocks or not held_out:
        raise ValueError(
            f"{len(files)} text files do not make two blocks of {length} tokens, one for training and one held out: "
            "give more text or a smaller block length."
        )
    train, evaluation = (Dataset.from_dict({"input_ids": rows, "labels": rows}) for rows in (blocks, held_out))
    return train.with_format("torch"), evaluation.with_format("torch")


def parse_and_load(
    parser: argparse.ArgumentParser,
) -> tuple[argparse.Namespace, PreTrainedModel, Dataset, Dataset]:
    """The options, the model of their `checkpoint` in float32, and the blocks of [`token_blocks`]."""
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--files", nargs="+", help="text files (default: the newest sources of transformers)")
    parser.add_argument("--block-length", type=int, default=256)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    return args, model, *token_blocks(args.files or recent_files(), tokenizer, args.block_length)
