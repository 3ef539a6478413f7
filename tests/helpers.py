"""Models, checkpoints and processes that several test files use."""

import hashlib
import io
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import families
import pytest
import torch
from families import TINY
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from attnres import app
from modeling_attnres import AttnResConfig, DepthAttention
from modeling_attnres.conversion import retrofit, revert, verify


# An older transformers lacks the newest
OTHERS = [family for family in families.OTHERS if family in CONFIG_MAPPING]
FAMILIES = {family: fields for family, fields in families.FAMILIES.items() if family in CONFIG_MAPPING}
MIXTURES = [family for family, fields in FAMILIES.items() if "num_experts_per_tok" in fields]
AUTO_CLASSES = {
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
}
BLOCK, FULL = {"attn_res_block_size": 2}, {"attn_res_type": "full"}
VALUE_READ = {**BLOCK, "attn_res_value_read": True}
both_types = pytest.mark.parametrize("attn_res", [BLOCK, FULL], ids=["block", "full"])
each_type = pytest.mark.parametrize("attn_res", [BLOCK, FULL, VALUE_READ], ids=["block", "full", "value read"])


def tiny_base_config(base_model_type, **fields):
    config_class = CONFIG_MAPPING[base_model_type]
    if base_model_type in families.OTHERS:
        return config_class(**{**families.other_fields(config_class().to_dict()), **fields})
    return config_class(**{**TINY, **FAMILIES[base_model_type], **fields})


def tiny_base(base_model_type, auto_class=AutoModelForCausalLM, **fields):
    """
    A base with random weights, norms too: an untrained norm hides a missing one. Routers are decided, or a difference
    in rounding would send a token to another expert.
    """
    torch.manual_seed(0)
    base = auto_class.from_config(tiny_base_config(base_model_type, **fields)).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            scale = 0.3 if "norm" in name else 0.5 if name.endswith((".gate.weight", ".router.weight")) else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    return base


def attnres_of(base, **attn_res):
    """The base's weights in an AttnRes model, without any of the conversion code."""
    config = AttnResConfig.from_base_config(base.config, **attn_res)
    model = AutoModelForCausalLM.from_config(config, dtype=base.dtype).eval()
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(("_res.query", "_res.key_norm")) for name in missing)
    return model


def randomize_depth_attention(model, scale=0.3, seed=1):
    """Queries and key norms as after training: at zero queries wrong wiring would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DepthAttention):
                module.query.copy_(torch.randn(module.query.shape, generator=generator) * scale)
                module.key_norm.copy_(1 + torch.randn(module.query.shape, generator=generator) * 0.3)
    return model


def trained(base, **attn_res):
    """The base's weights in an AttnRes model with random queries and key norms."""
    return randomize_depth_attention(attnres_of(base, **attn_res))


def greedy(model, prompts, max_new_tokens):
    """The tokens that follow each prompt."""
    options = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens, "do_sample": False}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


def chat_inputs(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **template)


def answer(model, tokenizer, question, max_new_tokens, **options):
    """The greedy answer to a question in a chat."""
    inputs = chat_inputs(tokenizer, question)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def logits(model, tokens):
    with torch.no_grad():
        return model(**tokens).logits


def train(model, tokens, steps=3, learning_rate=3e-2):
    """Trains by AdamW on one batch. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**tokens, labels=tokens["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# Checkpoints


def save(folder, *parts):
    """Saves models and tokenizers in one folder, and returns it."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def save_word_tokenizer(folder, words, **fields):
    """A tokenizer of these words, separated by blanks."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **fields).save_pretrained(folder)


def save_base(folder, family="llama", sharded=False, dtype=torch.bfloat16, **fields):
    """A base checkpoint with the other files of a checkpoint on the Hub."""
    tiny_base(family, **fields).to(dtype).save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    save_word_tokenizer(folder, ["<unk>", "word"], chat_template="{{ messages }}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A base\n")
    (folder / "LICENSE").write_text("the license")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


def edit_json(file, **fields):
    """Sets fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def json_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def logged_losses(checkpoint):
    """Those that Trainer logged."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def file_bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensor_hashes(folder):
    """sha256 over the bytes of each tensor, read by the safetensors library."""
    hashes = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            hashes[name] = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return hashes


def new_shard(output):
    """The last shard, which has the tensors that a retrofit adds."""
    return max(output.glob("*.safetensors"))


def trained_retrofit(base_folder, folder, scale, **options):
    """A retrofit of the base with queries as after training, and the base's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(retrofit(base_folder, folder / "attnres", link=True, **options))
    randomize_depth_attention(model, scale=scale).save_pretrained(folder / "trained")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder / "trained")
    return folder / "trained"


def there_and_back(base_folder, work, **options):
    """Retrofits a base, verifies that, and reverts it to the bytes of the base. Returns the retrofit."""
    output = retrofit(base_folder, work / "attnres", **options)
    assert verify(base_folder, output).passed
    assert file_bytes(revert(output, work / "reverted")) == file_bytes(base_folder)
    return output


# Processes

EXAMPLES = Path(__file__).parents[1] / "examples"
# A terminal that does not wrap or color a message
TERMINAL = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}


def run(*command, env=None, **options):
    """Runs a command, which has to succeed, and returns its output."""
    environment = {**os.environ, **(env or {})}
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, **options)
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_python(code, *arguments, **options):
    return run(sys.executable, "-c", code, *arguments, **options)


def run_example(script, *arguments):
    """Runs an example in this process, which saves the time of its imports. Returns its output."""
    path, output = EXAMPLES / script, io.StringIO()
    arguments = [str(path), *map(str, arguments)]
    with patch.object(sys, "argv", arguments), patch.object(sys, "path", [str(path.parent), *sys.path]):
        with redirect_stdout(output):
            runpy.run_path(str(path), run_name="__main__")
    return output.getvalue()


def attnres(*arguments, command=("attnres",), env=None):
    """The finished process of the `attnres` command."""
    environment = {**os.environ, **TERMINAL, **(env or {})}
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)


def invoke_attnres(*arguments):
    """Runs `attnres` in this process, which saves the time of its imports. Returns a `typer.testing.Result`."""
    result = CliRunner().invoke(app, [*map(str, arguments)], env=TERMINAL)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# This package cannot be imported, nor can the packages of its extras
ISOLATED = """
import sys
for package in ("modeling_attnres", "attnres", "fla", "trl", "datasets", "tensorboard"):
    sys.modules[package] = None
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
name, work = sys.argv[1:]
input_ids = torch.arange(1, 15)[None]
"""
INPUT_IDS = torch.arange(1, 15)[None]


def run_isolated(script, name, work, env=None):
    """Runs a script on the model `name` without this package. Returns its printed lines, or the tensors it saved."""
    environment = {"HF_HOME": str(work / "hf"), "HF_MODULES_CACHE": str(work / "modules"), **(env or {})}
    output = run_python(ISOLATED + script, name, work, env=environment, cwd=work, stdin=subprocess.DEVNULL)
    return load_file(work / "out.safetensors") if (work / "out.safetensors").exists() else output.splitlines()
