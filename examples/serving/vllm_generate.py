"""Greedy tokens by vLLM, for checkpoints with AttnRes or without. To be run by the Python of vLLM's environment.

    $ATTNRES_VLLM_PYTHON examples/serving/vllm_generate.py jobs.json results.json

`jobs.json` is a list of objects with `model` (a folder), `prompts` (lists of token ids), `max_tokens` and `options`
(the arguments of `vllm.LLM`). With `adapter`, the folder of a LoRA, every second prompt uses the LoRA.
The prompts of a job are given twice, so that the second time finds them in the prefix cache.
`results.json` has for each job the `tokens` of both passes and how many `cached` ones the second found, or an `error`.
"""

import argparse
import json
import os
from pathlib import Path


# Only what is on this disk; and a small cache, as for small models
os.environ.update({"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"})
OPTIONS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "gpu_memory_utilization": 0.3,
    "disable_log_stats": True,
}


def engine(model: str, **options):
    from vllm import LLM

    processes = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    if processes > 1:
        # Each process gets a core, of its own while there are enough
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(p % os.cpu_count()) for p in range(processes))
    llm = LLM(model, **{**OPTIONS, **options})
    if options.get("pipeline_parallel_size", 1) > 1 and options.get("enforce_eager"):
        # On a CPU the buffer for a stage's input is made by the first dummy run, which vLLM 0.32 leaves out if eager
        llm.collective_rpc("execute_dummy_batch")
    return llm


def generate(llm, prompts: list[list[int]], max_tokens: int, adapter: str | None = None) -> list:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    loras = [lora if number % 2 else None for number in range(len(prompts))]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, parameters, lora_request=loras, use_tqdm=False)


def run(job: dict) -> dict:
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = engine(job["model"], **job["options"])
        passes = [generate(llm, job["prompts"], job["max_tokens"], job.get("adapter")) for _ in range(2)]
    except Exception as error:  # noqa: BLE001  one model of a list may be one that vLLM does not take
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    return {
        "tokens": [[list(output.outputs[0].token_ids) for output in outputs] for outputs in passes],
        "cached": sum(output.num_cached_tokens for output in passes[1]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    args.results.write_text(json.dumps([run(job) for job in json.loads(args.jobs.read_text())]))


# vLLM starts processes that import this file
if __name__ == "__main__":
    main()
