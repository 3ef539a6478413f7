"""The cost of AttnRes: a model with depth attention next to its own base, in one process.

    python examples/experiments/benchmark.py --size hidden-1024 --sequence 512 --output figures.json
    python examples/experiments/benchmark.py --quick    # three minutes on two cores

Base and AttnRes share their weights and run in turns, A B C A B C. Time: the ratio to the base in the same round, as
median (min to max) over the rounds. Memory: the peak of the resident set (on a GPU: of the allocated memory).
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling_attnres import AttnResForCausalLM, DepthAttention
from modeling_attnres.depth_attention import ATTN_RES_IMPLEMENTATIONS, into_one_buffer, streaming_depth_attention


SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "hidden-1024": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "mixture": {
        "model_type": "mixtral",
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_local_experts": 8,
    },
}


def einsum_as_published(query, key_norm, sources, scale, eps):
    """The listing of the paper: all sources in one stack."""
    values = torch.stack(sources)
    query, key_norm = query.to(values.dtype), key_norm.to(values.dtype)
    keys = torch.nn.functional.rms_norm(values, values.shape[-1:], key_norm, eps)
    weights = torch.einsum("d,n b t d -> n b t", query, keys).softmax(dim=0)
    output = torch.einsum("n b t, n b t d -> b t d", weights, values)
    return output * len(sources) if scale == "sum" else output


def fla_naive(query, key_norm, sources, scale, eps):
    from fla.ops.attnres import naive_attnres  # the import takes seconds

    output = naive_attnres(query, sources, key_norm, rms_eps=eps)
    return output * len(sources) if scale == "sum" else output


def flash_attn_res(query, key_norm, sources, scale, eps):
    """The first phase of flash-attn-res, for one query. It computes in bfloat16."""
    from flash_attn_res import phase_1_batched_attention_triton_op

    outputs, _ = phase_1_batched_attention_triton_op(torch.stack(sources), (query * key_norm)[None], eps)
    output = outputs[0].to(sources[0].dtype)
    return output * len(sources) if scale == "sum" else output


def kept_norms(query, key_norm, sources, scale, eps):
    """Our streaming operator for a prefill, with the norm of a source computed at its first read."""
    upcast = into_one_buffer(sources[0])
    products = []
    for source in sources:
        copy = upcast(source)
        if not hasattr(source, "norm_of_source"):
            source.norm_of_source = torch.linalg.vector_norm(copy, dim=-1)
        products.append(torch.matmul(copy, query * key_norm))
    norms = torch.stack([source.norm_of_source for source in sources])
    logits = torch.stack(products) * (norms.square() / query.shape[-1] + eps).rsqrt()
    weights = (logits.softmax(dim=0) * (len(sources) if scale == "sum" else 1)).unsqueeze(-1)
    output = weights[0] * upcast(sources[0])
    for weight, source in zip(weights[1:], sources[1:]):
        output.addcmul_(weight, upcast(source))
    return output.to(sources[0].dtype)


PEERS = {"einsum as published": einsum_as_published, "fla, naive": fla_naive}
EXPERIMENTS = {"kept norms": kept_norms}
# On CUDA, AttnRes itself uses the fused kernel of fla
CUDA_PEERS = {"plain PyTorch": streaming_depth_attention, "flash-attn-res": flash_attn_res}


def attnres_of(base: PreTrainedModel, blocks: str, operator=None, **attn_res) -> AttnResForCausalLM:
    """An AttnRes model with the base's weights and random queries. `operator` replaces the depth attention."""
    layers = base.config.num_hidden_layers
    shape = {"attn_res_type": "full"} if blocks == "full" else {"attn_res_block_size": max(1, layers // int(blocks))}
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = AttnResForCausalLM.from_base(copy.deepcopy(base, shared), **shape, **attn_res)
    for module in model.modules():
        if isinstance(module, DepthAttention):
            torch.nn.init.normal_(module.query, std=0.02)
            if operator is not None:
                module.forward = partial(compute_by, operator, module)
    return model


def compute_by(operator, module: DepthAttention, *sources: torch.Tensor, **_) -> torch.Tensor:
    return operator(module.tempered_query(), module.key_norm, sources, module.scale, module.eps)


class PeakMemory:
    """Peak of the resident set of this process in bytes. On a GPU: peak of the allocated memory."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            # Gives free memory back to the system, and resets the peak that the kernel keeps
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.bytes = int(status["VmHWM"].split()[0]) * 1024


def memory_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of 256 MB, in GB/s: the best of five."""
    source = torch.ones(2**26, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds) / 1e9


def prefill(model: torch.nn.Module, tokens: torch.Tensor):
    with torch.no_grad():
        model(tokens, logits_to_keep=1)


def decode(model: torch.nn.Module, tokens: torch.Tensor):
    model.generate(tokens[:, :8], max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)


def training_step(model: torch.nn.Module, tokens: torch.Tensor):
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-9).step()
    model.zero_grad()


MEASUREMENTS = {"prefill": prefill, "decode": decode, "training step": training_step}


def measure(measurement: str, models: dict[str, torch.nn.Module], tokens: torch.Tensor, rounds: int) -> list[dict]:
    """One row for each model: its seconds in each round and its peak memory, with the ratios to the base."""

    def run(model: torch.nn.Module) -> float:
        start = time.perf_counter()
        MEASUREMENTS[measurement](model, tokens)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    progress = tqdm(total=len(models) * (rounds + 1), desc=measurement, leave=False, disable=None)
    seconds, peak_bytes = {name: [] for name in models}, {}
    for name, model in models.items():  # warm-up; it also gives the peak memory
        with PeakMemory(tokens.device) as peak:
            run(model)
        peak_bytes[name] = peak.bytes
        progress.update()
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(run(model))
            progress.update()
    progress.close()

    rows = []
    for name in models:
        ratios = [own / base for own, base in zip(seconds[name], seconds["base"])]
        rows.append(
            {
                "measurement": measurement,
                "variant": name,
                "sequence": tokens.shape[1],
                "seconds": seconds[name],
                "ratio": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
                "peak_bytes": peak_bytes[name],
                "memory_ratio": peak_bytes[name] / peak_bytes["base"],
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["hidden-1024"])
    parser.add_argument("--sequence", nargs="+", type=int, default=[512], help="tokens")
    parser.add_argument("--blocks", nargs="+", default=["8"], help="numbers of blocks, or `full`")
    parser.add_argument("--measure", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=PEERS | CUDA_PEERS | EXPERIMENTS,
        default=[*PEERS, *(CUDA_PEERS if torch.cuda.is_available() else ())],
        help="for the first of `--blocks`",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--implementation", choices=ATTN_RES_IMPLEMENTATIONS, default="auto", help="of AttnRes")
    parser.add_argument("--value-read", action="store_true", help="also with a separate read for the values")
    parser.add_argument("--compile", action="store_true", help="compile the forward passes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="three sizes without peers")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if args.quick:
        args.size, args.peers, args.rounds = ["tiny", "mixture", "hidden-1024"], [], 3

    machine = {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "memory GB/s": round(memory_bandwidth(args.device), 1),
    }
    print(*(f"{name}: {value}" for name, value in machine.items()), sep=", ")
    rows = [row for size in args.size for row in benchmark(size, args)]
    if args.output:
        args.output.write_text(json.dumps({**machine, "results": rows}, indent=1))


def benchmark(size: str, args: argparse.Namespace) -> list[dict]:
    """The rows of one size, which are also printed."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"model_type": "llama", **SIZES[size]})
    base = AutoModelForCausalLM.from_config(config).to(args.device, getattr(torch, args.dtype))
    models = {"base": base}
    for blocks in args.blocks:
        name = blocks if blocks == "full" else f"{blocks} blocks"
        attn_res = {"attn_res_implementation": args.implementation}
        models[name] = attnres_of(base, blocks, **attn_res)
        if args.value_read:
            models[f"{name}, read for the values"] = attnres_of(base, blocks, attn_res_value_read=True, **attn_res)
    for peer in args.peers:
        models[f"{args.blocks[0]} blocks, {peer}"] = attnres_of(
            base, args.blocks[0], (PEERS | CUDA_PEERS | EXPERIMENTS)[peer]
        )
    for model in models.values():
        if args.gradient_checkpointing:
            model.train().gradient_checkpointing_enable()
        if args.compile:
            model.forward = torch.compile(model.forward, fullgraph=True)

    options = {
        **{"size": size, "parameters": base.num_parameters(), "dtype": args.dtype},
        **{"gradient_checkpointing": args.gradient_checkpointing},
        **{"implementation": args.implementation, "compiled": args.compile},
    }
    print()
    print(*(f"{name}: {value}" for name, value in options.items()), sep=", ")
    print("\n| | tokens | | seconds | of the base's time | of its peak memory |\n|---|---|---|---|---|---|")
    rows = []
    for length in args.sequence:
        tokens = torch.randint(0, base.config.vocab_size, (1, length), device=args.device)
        for name in args.measure:
            for row in measure(name, models, tokens, args.rounds):
                rows.append({**options, **row})
                print(
                    f"| {name} | {length} | {row['variant']} | {statistics.median(row['seconds']):.3g} | "
                    f"{row['ratio']:.3f} ({row['min']:.3f} to {row['max']:.3f}) | {row['memory_ratio']:.3f} |",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    main()
