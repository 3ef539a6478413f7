"""vLLM's throughput of retrofits next to their base's. To be run by the Python of vLLM's environment.

    $ATTNRES_VLLM_PYTHON examples/serving/vllm_throughput.py BASE ATTNRES [ATTNRES ...] [--eager]

All engines are up in one run and take turns. Prefill: long prompts, one token is generated for each. Decode: short
prompts, many tokens are generated. Median over the rounds of the ratio to the base in the same round (min to max). With
`--eager` on a CPU, also the share of the time that is spent in depth attention.
"""

import argparse
import os
import platform
import random
import statistics
import time

from vllm_generate import engine, generate


# `collective_rpc` sends the next two functions to vLLM's process
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def time_depth_attention(worker) -> None:
    from modeling_attnres import DepthAttention

    forward, DepthAttention.seconds = DepthAttention.forward, 0.0

    def timed(self, *sources):
        start = time.perf_counter()
        output = forward(self, *sources)
        DepthAttention.seconds += time.perf_counter() - start
        return output

    DepthAttention.forward = timed


def depth_attention_seconds(worker) -> float:
    """Since the last call."""
    from modeling_attnres import DepthAttention

    seconds, DepthAttention.seconds = DepthAttention.seconds, 0.0
    return seconds


def seconds(llm, prompts: list[list[int]], max_tokens: int) -> float:
    start = time.perf_counter()
    generate(llm, prompts, max_tokens)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders: the base, then its retrofits")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prefill", nargs=2, type=int, default=[4, 512], help="prompts and tokens of each")
    parser.add_argument("--decode", nargs=2, type=int, default=[8, 32], help="prompts and tokens made for each")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    import torch
    import transformers
    import vllm

    base = args.checkpoints[0]
    options = {"dtype": args.dtype, "enforce_eager": args.eager, "enable_prefix_caching": False, "max_model_len": 1024}
    # The base on vLLM's Transformers backend too
    engines = {
        checkpoint: engine(checkpoint, model_impl="transformers" if checkpoint == base else "auto", **options)
        for checkpoint in args.checkpoints
    }
    if args.eager:
        for llm in engines.values():
            llm.collective_rpc(time_depth_attention)
    random.seed(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[random.randrange(1000, 2000) for _ in range(length)] for _ in range(count)]

    mode = "eager" if args.eager else "compiled"
    versions = f"vllm {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(platform.machine(), versions, mode, args.dtype, sep=", ", end="\n\n")
    print("| | checkpoint | tokens/s | of the base's | in depth attention |\n|---|---|---|---|---|")
    measurements = {
        "prefill": (args.prefill[0] * args.prefill[1], prompts(*args.prefill), 1),
        "decode": (args.decode[0] * args.decode[1], prompts(args.decode[0], 8), args.decode[1]),
    }
    for name, (tokens, inputs, max_tokens) in measurements.items():
        times, shares = ({checkpoint: [] for checkpoint in engines} for _ in range(2))
        for number in range(args.rounds + 1):
            for checkpoint, llm in engines.items():
                took = seconds(llm, inputs, max_tokens)
                inside = llm.collective_rpc(depth_attention_seconds)[0] if args.eager else 0.0
                if number > 0:  # the first is a warm-up
                    times[checkpoint].append(took)
                    shares[checkpoint].append(inside / took)
        for checkpoint, own in times.items():
            ratios = [b / o for b, o in zip(times[base], own)]
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            share = f"{statistics.median(shares[checkpoint]):.1%}" if args.eager else ""
            print(f"| {name} | {checkpoint} | {tokens / statistics.median(own):.0f} | {spread} | {share} |", flush=True)


if __name__ == "__main__":
    main()
