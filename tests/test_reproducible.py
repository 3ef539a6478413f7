"""The same input and options give the same output bytes, on any machine: there is no flag for it."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
from safetensors.numpy import save_file
from test_conversion import file_bytes, save_base

from modeling_attnres.conversion import retrofit


def digests(folder):
    return {name: hashlib.sha256(content).hexdigest() for name, content in file_bytes(folder).items()}


RETROFIT = "import sys; from modeling_attnres.conversion import retrofit; retrofit(sys.argv[1], sys.argv[2])"
MACHINES = [
    {"PYTHONHASHSEED": "1", "LC_ALL": "C", "PYTHONUTF8": "0", "TZ": "Pacific/Auckland", "HOME": "/nonexistent"},
    {"PYTHONHASHSEED": "2", "LC_ALL": "C.UTF-8", "USER": "somebody", "OMP_NUM_THREADS": "3", "RAYON_NUM_THREADS": "5"},
]


def test_the_same_bytes_in_other_surroundings(tmp_path):
    save_base(tmp_path / "base", sharded=True)
    expected = digests(retrofit(tmp_path / "base", tmp_path / "here"))
    for number, environment in enumerate(MACHINES):
        work = tmp_path / f"machine {number}"
        work.mkdir()
        source = "../base" if number else tmp_path / "base"
        command = [sys.executable, "-c", RETROFIT, source, "attnres"]
        subprocess.run(command, cwd=work, env={**os.environ, **environment}, check=True, capture_output=True)
        assert digests(work / "attnres") == expected


def write_fixed_base(folder):
    """A base whose bytes are written here, so that they depend on no version of anything."""
    folder.mkdir()
    hidden, heads, vocabulary, layers = 8, 2, 16, 2
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (hidden, hidden) for name in ("gate", "up", "down")},
    }
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    tensors = {name: np.arange(np.prod(shape), dtype="<f4").reshape(shape) / 64 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
        **{"hidden_size": hidden, "intermediate_size": hidden, "num_attention_heads": heads},
        **{"num_hidden_layers": layers, "vocab_size": vocabulary, "a name": "naïve 深"},
    }
    (folder / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return folder


WRITTEN = {
    "config.json": "b51bbd9fdc5ececd",
    "model-00002-of-00002.safetensors": "dd7be4d17e266769",
    "model.safetensors.index.json": "51b466c7e85206fb",
}


def test_the_bytes_are_these(tmp_path):
    """Written down once: another version of torch, transformers or safetensors, or another machine, shows here."""
    actual = digests(retrofit(write_fixed_base(tmp_path / "base"), tmp_path / "attnres"))
    assert {name: actual[name][:16] for name in WRITTEN} == WRITTEN
