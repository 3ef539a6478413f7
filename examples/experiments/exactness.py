"""The distance between a retrofit and its base, on real text.

    python examples/smollm2.py smollm2
    python examples/experiments/exactness.py smollm2

float32: the largest difference between their logits, over the largest logit of the base. bfloat16: the mean error
against the float32 base, over the mean error of the bfloat16 base. Median, min and max over several texts.
"""

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
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
    parser.add_argument("base", type=Path, help="folder of the base")
    parser.add_argument("--files", nargs="+", default=default_files()[:5], help="text files")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(args.base)
        texts = [
            tokenizer(Path(file).read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : args.tokens]
            for file in args.files
        ]
        exact = logits(args.base, texts, torch.float32)
        base_errors = [(a - e).abs().mean() for a, e in zip(logits(args.base, texts, torch.bfloat16), exact)]

        print(f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}")
        print(f"{len(texts)} texts of {args.tokens} tokens; the largest logit is {max(e.max() for e in exact):.0f}\n")
        print("| retrofit | float32: largest difference / largest logit | bfloat16: mean error / the base's own |")
        print("|---|---|---|")
        for number, (name, attn_res) in enumerate(RETROFITS.items()):
            checkpoint = retrofit(args.base, Path(folder) / f"attnres-{number}", **attn_res)
            actual = logits(checkpoint, texts, torch.float32)
            differences = [((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, exact)]
            actual = logits(checkpoint, texts, torch.bfloat16)
            ratios = [((a - e).abs().mean() / b).item() for a, e, b in zip(actual, exact, base_errors)]
            print(f"| {name} | {spread(differences, '.1e')} | {spread(ratios, '.2f')} |", flush=True)


if __name__ == "__main__":
    main()
