"""The families on vLLM's Transformers backend: the README's table.

    ATTNRES_VLLM_PYTHON=/tmp/vllm/bin/python python tests/vllm_families.py [FAMILY ...]

A small random base of each family and its retrofit, with random queries, are served; greedy tokens are compared with
those of `generate`. Where vLLM does not take the base, the reason is its own.
"""

import sys
import tempfile
from pathlib import Path

import conftest  # noqa: F401  sets the environment
import helpers
import torch
from families import other_fields
from transformers import CONFIG_MAPPING
from vllm_environment import job, run_jobs


# vLLM's attention on a CPU wants heads of 32, and latent attention in DeepSeek's own sizes
SIZES = {
    **{"vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "head_dim": 32},
    **{"kv_lora_rank": 512, "q_lora_rank": 32, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    **{"linear_head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    **{"shared_expert_intermediate_size": 64, "max_position_embeddings": 128},
}
OPTIONS = {"enforce_eager": True, "max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}
MAX_TOKENS = 12


def larger(family: str) -> dict:
    """The tests' fields of a family, in sizes that vLLM takes."""
    if family in helpers.FAMILIES:
        fields = {**helpers.TINY, **helpers.FAMILIES[family]}
    else:
        fields = other_fields(CONFIG_MAPPING[family]().to_dict())
    return {name: SIZES[name] for name, value in fields.items() if name in SIZES and value is not None}


def cell(result: dict, expected: list[list[int]]) -> str:
    if "error" in result:
        return f"no: {result['error'].splitlines()[0][:100]}"
    return "yes" if result["tokens"] == [expected, expected] else "other tokens"


def served(families: list[str], prompts: list[list[int]]) -> list[str]:
    """The rows of some families. One process for all engines, since its start takes longer than its work."""
    with tempfile.TemporaryDirectory() as work:
        jobs, expected = [], []
        for family in families:
            base = helpers.tiny_base(family, **larger(family))
            model = helpers.trained(base, **helpers.BLOCK)
            for kind, own in (("base", base), ("attnres", model)):
                own.save_pretrained(Path(work) / family / kind)
                options = {**OPTIONS, "model_impl": "transformers" if kind == "base" else "auto"}
                jobs.append(job(Path(work) / family / kind, prompts, MAX_TOKENS, **options))
                expected.append(helpers.greedy(own, prompts, MAX_TOKENS))
        results, log = run_jobs(jobs, Path(work), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    print(log, file=sys.stderr)
    cells = (cell(result, tokens) for result, tokens in zip(results, expected, strict=True))
    return [f"| `{family}` | {next(cells)} | {next(cells)} |" for family in families]


def main():
    families = sys.argv[1:] or sorted([*helpers.FAMILIES, *helpers.OTHERS])
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 99, (length,), generator=generator).tolist() for length in (5, 40, 17)]
    print("| `base_model_type` | base served | retrofit served |\n|---|---|---|")
    for start in range(0, len(families), 5):
        print(*served(families[start : start + 5], prompts), sep="\n", flush=True)


if __name__ == "__main__":
    main()
