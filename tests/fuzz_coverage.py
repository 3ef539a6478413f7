"""
Coverage-guided fuzzing of what parses a stranger's files: libFuzzer, by way of atheris, writes config.json, an index, a
tokenizer's configuration or a shard, and learns from the branches that it reaches.

pip install ".[fuzz]" && python tests/fuzz_coverage.py -max_total_time=600
"""

import json
import os
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import atheris


with atheris.instrument_imports(include=["modeling_attnres"]):
    from modeling_attnres.conversion.reading import (
        CONFIG,
        INDEX,
        SINGLE_SHARD,
        SPECIAL_TOKENS,
        TOKENIZER_CONFIG,
        read_checkpoint,
    )
    from modeling_attnres.conversion.retrofit import _new_tensors, read_config

import numpy as np
from safetensors.numpy import save


# In memory: a file for each case
WORK = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
FILES = (CONFIG, INDEX, TOKENIZER_CONFIG, SPECIAL_TOKENS, SINGLE_SHARD)
HIDDEN = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 4}
# All that the configuration asks for, so that one that is nearly right goes the whole way
SHAPES = {f"self_attn.{name}_proj": (8, 8) for name in "qkvo"} | {
    f"mlp.{n}_proj": (8, 8) for n in ("gate", "up", "down")
}
SHAPES |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
SHAPES = {f"layers.0.{name}": shape for name, shape in SHAPES.items()} | {"embed_tokens": (4, 8), "norm": (8,)}
SHARD = save({f"model.{name}.weight": np.ones(shape, np.float32) for name, shape in SHAPES.items()})
CONFIGURATION = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "auto_map": {},
    "tie_word_embeddings": True,
    **HIDDEN,
}
SEEDS = {
    CONFIG: json.dumps(CONFIGURATION).encode(),
    INDEX: json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors"}}).encode(),
    TOKENIZER_CONFIG: json.dumps({"tokenizer_class": "LlamaTokenizer", "vocab_file": "vocab"}).encode(),
    SPECIAL_TOKENS: json.dumps({"unk_token": "<unk>", "tokenizer_file": "tokenizer.json"}).encode(),
    SINGLE_SHARD: SHARD,
}
outcomes = Counter()


def test_one(data: bytes):
    """The first byte says which file the others are."""
    if not data:
        return
    name = FILES[data[0] % len(FILES)]
    folder = WORK / name
    (folder / name).write_bytes(data[1:])
    try:
        checkpoint = read_checkpoint(folder)
        if name == CONFIG:
            _new_tensors(checkpoint, read_config(checkpoint), "AttnResForCausalLM")
        outcomes[f"{name}: read"] += 1
    except (ValueError, OSError) as error:
        assert str(error)
        outcomes[f"{name}: {type(error).__name__}"] += 1
    if sum(outcomes.values()) % 5000 == 0:
        print(sum(outcomes.values()), dict(sorted(outcomes.items())), flush=True)
        assert {path.name for path in WORK.iterdir()} == {*FILES, "corpus"}, "nothing is written"


def main():
    warnings.simplefilter("ignore")
    (WORK / "corpus").mkdir()
    for number, (name, seed) in enumerate(SEEDS.items()):
        (WORK / "corpus" / name).write_bytes(bytes([number]) + seed)
        # A checkpoint that is whole, but for the file of that name
        (WORK / name).mkdir()
        for other in (CONFIG, TOKENIZER_CONFIG):
            (WORK / name / other).write_bytes(SEEDS[other])
        (WORK / name / ("a.safetensors" if name == INDEX else SINGLE_SHARD)).write_bytes(SHARD)
    fuzzer = os.fork()
    if fuzzer:
        _, status = os.waitpid(fuzzer, 0)
        shutil.rmtree(WORK)
        raise SystemExit(os.waitstatus_to_exitcode(status))
    # It ends the process by itself
    limits = ["-rss_limit_mb=4096", "-timeout=30", "-max_len=4096", "-len_control=0"]
    atheris.Setup([*sys.argv, *limits, str(WORK / "corpus")], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
