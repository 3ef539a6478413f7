"""Text files as blocks of tokens, for training."""

import argparse
import hashlib
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
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


def package_files(requirements: Path) -> tuple[list[Path], list[Path]]:
    """
    Python files of the installed packages in a requirements file, for training and held out, in the order of their
    hashes. Held out are the packages below the line `# held out`. Each text is in one file only.
    """
    parts, seen = [], set()
    # The held-out packages come first, so that none of their texts is in the training files
    for packages in reversed(requirements.read_text().split("# held out\n")):
        files = {}
        for name, version in (line.split("==") for line in packages.split()):
            package = distribution(name)
            if package.version != version:
                raise ValueError(
                    f"{name} {package.version} is installed, but {requirements} lists {version}: "
                    f"`pip install --no-deps -r {requirements}`."
                )
            for file in (Path(file.locate()) for file in package.files if file.suffix == ".py"):
                if file.exists() and (content := hashlib.sha256(file.read_bytes()).hexdigest()) not in seen:
                    seen.add(content)
                    files[content] = file
        parts.append([files[content] for content in sorted(files)])
    held_out, train = parts
    return train, held_out


def cut(files: list[str | Path], tokenizer: PreTrainedTokenizerBase, length: int) -> np.ndarray:
    """Text files as blocks of `length` tokens, with an end-of-text token after each file."""
    if chats := [str(file) for file in files if str(file).endswith((".json", ".jsonl"))]:
        raise ValueError(f"{chats[0]} is not a text file: train on it with `continue_training.py`.")
    end_of_text = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    streams = [np.empty(0, dtype=np.int32)]
    for file in tqdm(files, desc="Tokenizing", delay=1):
        text = Path(file).read_text(encoding="utf-8", errors="replace")
        # Not verbose: a text may be longer than the context of the model, since it is cut into blocks
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end_of_text
        streams.append(np.array(tokens, dtype=np.int32))
    stream = np.concatenate(streams)
    return stream[: len(stream) // length * length].reshape(-1, length)


def dataset(blocks: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")


def sample(blocks: Dataset, count: int) -> Dataset:
    """`count` random blocks, the same on each call. All blocks if there are fewer."""
    return blocks.shuffle(seed=0).select(range(min(count, len(blocks))))


def token_blocks(files: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Dataset, Dataset]:
    """
    Blocks of [`cut`].

    Returns:
        `tuple[Dataset, Dataset]`: blocks for training, and held-out blocks for evaluation. Each tenth file is held out.
        With fewer than ten files, the end of the text is held out. Both have `input_ids` and `labels`.
    """
    held_out = cut(files[9::10], tokenizer, length)
    blocks = cut([file for number, file in enumerate(files) if number % 10 != 9], tokenizer, length)
    if not len(held_out):
        blocks, held_out = blocks[: -len(blocks) // 10], blocks[-len(blocks) // 10 :]
    if not len(blocks) or not len(held_out):
        raise ValueError(
            f"{len(files)} text files do not make two blocks of {length} tokens, one for training and one held out: "
            "give more text or a smaller block length."
        )
    return dataset(blocks), dataset(held_out)


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
