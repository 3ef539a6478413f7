"""How near a retrofit is to its base, on real text: the figures in the README.

    python examples/exactness.py

float32: largest difference of a logit from the base's, over the base's largest logit. bfloat16: mean error against the
float32 base, over that of the bfloat16 base. Several texts; their median, least and greatest.
"""

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from smollm2 import smollm2
from text import default_files
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_attnres  # noqa: F401  registers AttnRes with the Auto classes
from modeling_attnres.conversion import retrofit


RETROFITS = {
    "block, `sum`": {"attn_res_type": "block"},
    "full, `sum`": {"attn_res_type": "full"},
    "block, `mean` (the paper's form)": {"attn_res_type": "block", "attn_res_scale": "mean"},
}


def logits(folder: Path, texts: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return [model(text).logits.float() for text in texts]


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder of the base (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--files", nargs="+", default=default_files()[:5], help="text files")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        base = Path(args.base) if args.base else smollm2(Path(folder) / "base")
        tokenizer = AutoTokenizer.from_pretrained(base)
        texts = [
            tokenizer(Path(file).read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : args.tokens]
            for file in args.files
        ]
        exact = logits(base, texts, torch.float32)
        base_errors = [(a - e).abs().mean() for a, e in zip(logits(base, texts, torch.bfloat16), exact)]

        print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}")
        print(f"{len(texts)} texts of {args.tokens} tokens; the largest logit is {max(e.max() for e in exact):.0f}\n")
        print("| retrofit | float32: largest difference / largest logit | bfloat16: mean error / the base's own |")
        print("|---|---|---|")
        for number, (name, attn_res) in enumerate(RETROFITS.items()):
            checkpoint = retrofit(base, Path(folder) / f"attnres-{number}", **attn_res)
            actual = logits(checkpoint, texts, torch.float32)
            differences = [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, exact)]
            actual = logits(checkpoint, texts, torch.bfloat16)
            ratios = [((a - e).abs().mean() / b).item() for a, e, b in zip(actual, exact, base_errors)]
            print(f"| {name} | {spread(differences, '.1e')} | {spread(ratios, '.2f')} |", flush=True)


if __name__ == "__main__":
    main()
