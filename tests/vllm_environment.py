"""vLLM in an environment of its own, which `ATTNRES_VLLM_PYTHON` names (examples/serving/vllm_environment.sh)."""

import json
import os
import subprocess
from pathlib import Path


VLLM_PYTHON = os.environ.get("ATTNRES_VLLM_PYTHON")
SCRIPT = Path(__file__).parents[1] / "examples" / "serving" / "vllm_generate.py"
# Variables that the test run sets for itself
FOREIGN = ("PYTHONPATH", "OMP_NUM_THREADS", "TRANSFORMERS_VERBOSITY", "TRITON_INTERPRET")


def environment(work: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    caches = {"HF_HOME": "hf", "VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    return {**kept, **{name: str(work / folder) for name, folder in caches.items()}, "VLLM_CPU_KVCACHE_SPACE": "1"}


def run_jobs(
    jobs: list[dict], work: Path, timeout: int = 1800, script: Path = SCRIPT, **variables: str
) -> tuple[list[dict], str]:
    """The results of `vllm_generate.py`, and its output."""
    files = work / "jobs.json", work / "results.json"
    files[0].write_text(json.dumps(jobs))
    files[1].unlink(missing_ok=True)
    process = subprocess.run(
        [VLLM_PYTHON, script, *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env={**environment(work), **variables},
    )
    assert files[1].exists(), process.stdout[-8000:]
    return json.loads(files[1].read_text()), process.stdout


def job(model: Path, prompts: list[list[int]], max_tokens: int, **options) -> dict:
    return {"model": str(model), "prompts": prompts, "max_tokens": max_tokens, "options": options}
