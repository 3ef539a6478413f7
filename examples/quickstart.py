"""The main job, end to end, on a real pretrained Llama (SmolLM2-135M-Instruct): retrofit, verify, generate, go on
training, save, load.

    python examples/quickstart.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from continue_training import continue_training, training_arguments
from experiments.text import default_files
from generate import generate
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_attnres.conversion import retrofit, verify


PROMPT = "What is the capital of France, and what is it known for?"


def load(checkpoint: Path):
    # `trust_remote_code=True` is what makes it load where modeling_attnres is not installed
    return AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put the three checkpoints (default: a temporary folder)")
    parser.add_argument("--type", choices=["block", "full"], default="block")
    parser.add_argument("--files", nargs="+", default=default_files(), help="text files (default: Python's library)")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="attnres-"))

    print("1. A base checkpoint", flush=True)
    base_folder = smollm2(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)

    print("\n2. Retrofit and verify", flush=True)
    attnres_folder = retrofit(base_folder, folder / "attnres", attn_res_type=args.type)
    result = verify(base_folder, attnres_folder)
    print(f"Largest difference {result.max_difference:.1e} at a largest logit of {result.max_logit:.1f}")
    if not result.passed:
        raise SystemExit("The retrofit does not compute what its base computes.")

    print(f"\n3. Generate: {PROMPT}", flush=True)
    model = load(attnres_folder)
    answer = generate(model, tokenizer, PROMPT, do_sample=False)
    base_answer = generate(load(base_folder), tokenizer, PROMPT, show=False, do_sample=False)
    print(f"The base's answer is {'the same' if answer == base_answer else f'another: {base_answer}'}")

    print("\n4. Go on training", flush=True)
    arguments = training_arguments(folder / "trained", steps=args.steps)
    before, after = continue_training(model, tokenizer, arguments, args.files)
    print(f"Loss on held-out text: {before:.3f} before, {after:.3f} after")

    print("\n5. Load what was trained, and generate", flush=True)
    generate(load(folder / "trained"), tokenizer, PROMPT, do_sample=False)
    print(f"\nThe checkpoints are in {folder}")


if __name__ == "__main__":
    main()
