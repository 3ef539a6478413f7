"""
The runs that are too long for every day: each by its name, or all of them. The figures in README.md here come from it.

python tests/soak.py all
python tests/soak.py rounds --count 1000
"""

import argparse
import gc
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "experiments"))

import conftest
import safetensors
import test_crash_safety as crash_safety
import test_fuzz
import torch
import transformers
from test_conversion import file_bytes, tensor_hashes
from test_crash_safety import linked
from test_precision import TYPES, drifts
from text import default_files
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_attnres import AttnResConfig, AttnResForCausalLM
from modeling_attnres.conversion import retrofit, revert, verify
from modeling_attnres.conversion.verify import TOLERANCE


def memory():
    """Resident memory of this process in MB."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def open_files():
    return len(os.listdir("/proc/self/fd"))


def crash(count):
    """Kills at each boundary and at `count` random moments, a source that vanishes or shrinks, runs at once."""
    totals = Counter()
    layouts = {"shards": {"sharded": True}, "one file": {}}
    for layout, base in layouts.items():
        for operation in (retrofit, linked, revert):
            with tempfile.TemporaryDirectory() as folder:
                work = crash_safety.Work(Path(folder) / "work", operation, **base)
                counts = Counter({"killed at a boundary": crash_safety.kill_at_every_boundary(work)})
                kills = count // 6
                finished = crash_safety.kill_at_random_moments(work, kills, seed=len(totals))
                counts["killed at a random moment"] = kills
                if operation is not linked:
                    # A linked output shrinks with its source

                    def vanish(work=work):
                        shutil.rmtree(work.source)

                    def cut(work=work):
                        for shard in work.source.glob("*.safetensors"):
                            os.truncate(shard, shard.stat().st_size - 8)

                    counts["source vanished"] = crash_safety.fault_at_every_boundary(
                        work, vanish, crash_safety.VANISHED
                    )
                    counts["source cut short"] = crash_safety.fault_at_every_boundary(work, cut, ("ValueError",))
                for _ in range(count // 50):
                    answers = [answer.split(":")[0] for answer in crash_safety.race(work, runs=3)]
                    assert answers.count("'won'") == 1 and {*answers} <= {"'won'", "FileExistsError", "OSError"}, (
                        answers
                    )
                    assert work.check()
                counts["three at once"] = count // 50
                print(f"{operation.__name__}, {layout}: {dict(counts)}; killed after the end: {finished}", flush=True)
                totals += counts
    print("faults injected:", dict(totals), "all:", sum(totals.values()))


def fuzz(count):
    for target in test_fuzz.TARGETS:
        start = time.perf_counter()
        outcomes = test_fuzz.fuzz(target, count)
        seconds = time.perf_counter() - start
        print(f"{target.__name__}: {sum(outcomes.values())} cases, {outcomes}, {seconds:.0f} s", flush=True)


def coverage(count):
    """The parsers for `count` seconds, guided by coverage; needs the extra `[fuzz]`."""
    fuzzer = Path(__file__).with_name("fuzz_coverage.py")
    subprocess.run([sys.executable, fuzzer, f"-max_total_time={count}"], check=True)


def save_random_base(folder, choose):
    """A tiny base of any family, dtype and layout, with or without tied embeddings. Returns its number of layers."""
    family = choose.choice(list(conftest.FAMILIES))
    # Where the family's tiny configuration lists its layers, their number is fixed
    layers = 5 if "layer_types" in conftest.FAMILIES[family] else choose.randint(2, 7)
    base = conftest.tiny_base(
        family,
        num_hidden_layers=layers,
        intermediate_size=choose.choice([16, 48, 80]),
        vocab_size=choose.randint(20, 200),
        tie_word_embeddings=choose.choice([True, False]),
    )
    if choose.random() < 0.2:
        base = base.model
    base.to(choose.choice([torch.float32, torch.bfloat16, torch.float16]))
    base.save_pretrained(folder, max_shard_size=choose.choice(["5KB", "20KB", "100KB", "1GB"]))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "tokenizer_config.json").write_text("{}")
    return layers


def one_round(work, choose):
    layers = save_random_base(work / "base", choose)
    before = file_bytes(work / "base")
    options = {
        "attn_res_type": choose.choice(["block", "full"]),
        "attn_res_block_size": choose.choice([None, choose.randint(1, layers)]),
        "link": choose.random() < 0.5,
    }
    output = retrofit(work / "base", work / "attnres", **options)
    result = verify(work / "base", output)
    # `verify` allows a third of it. float32 itself leaves more in a few random Qwen3-Next, the base's own error too
    assert result.relative_difference < 3 * TOLERANCE, result
    architecture = json.loads((output / "config.json").read_text())["architectures"]
    if choose.random() < 0.3 and architecture == ["AttnResForCausalLM"]:
        # Saved anew by transformers: other shards, and no files of the base's
        AutoModelForCausalLM.from_pretrained(output).save_pretrained(work / "saved", max_shard_size="50KB")
        revert(work / "saved", work / "of_saved")
        # Some tensors are loaded in float32 and saved so
        AutoModelForCausalLM.from_pretrained(work / "base").save_pretrained(work / "base_saved")
        assert tensor_hashes(work / "of_saved") == tensor_hashes(work / "base_saved")
    revert(output, work / "reverted")
    assert file_bytes(work / "reverted") == before == file_bytes(work / "base")
    assert {path.name for path in work.iterdir()} - {"saved", "of_saved", "base_saved"} == {
        "base",
        "attnres",
        "reverted",
    }
    for path in work.iterdir():
        shutil.rmtree(path)


def rounds(count, seed=0):
    """Retrofit, load, verify, revert, over random small configurations."""
    failures, start = 0, time.perf_counter()
    temporary = set(os.listdir(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            try:
                one_round(Path(folder), random.Random(f"{seed} {number}"))
            except Exception as error:  # noqa: BLE001  counted, and told with the number that makes it again
                failures += 1
                print(f"round {number} failed: {type(error).__name__}: {error}", flush=True)
                for path in Path(folder).iterdir():
                    shutil.rmtree(path)
            if number % max(count // 10, 1) == 0:
                seconds = time.perf_counter() - start
                print(f"{number} rounds, {memory():.0f} MB, {open_files()} open files, {seconds:.0f} s", flush=True)
        left = os.listdir(folder)
    new = set(os.listdir(tempfile.gettempdir())) - temporary
    print(f"failures: {failures}; left in the work folder: {left}; new in the temporary folder: {sorted(new)}")
    assert not failures


def training(count):
    """Trains on the standard library's sources, byte by byte, for `count` steps each way, and watches the memory."""
    content = b"".join(Path(file).read_bytes() for file in default_files())
    text = torch.frombuffer(bytearray(content[:2_000_000]), dtype=torch.uint8).long()
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    for attn_res_type, checkpointing in [("block", False), ("full", True)]:
        torch.manual_seed(0)
        config = AttnResConfig(attn_res_type=attn_res_type, vocab_size=256, num_key_value_heads=4, **shape)
        model = AttnResForCausalLM(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses, memories, start = [], [], time.perf_counter()
        for step in range(1, count + 1):
            begins = torch.randint(len(text) - 128, (8,)).tolist()
            batch = torch.stack([text[begin : begin + 128] for begin in begins])
            loss = model(batch, labels=batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % max(count // 10, 1) == 0:
                memories.append(memory())
        first, last = sum(losses[:20]) / 20, sum(losses[-20:]) / 20
        print(
            f"{attn_res_type}{', gradient checkpointing' if checkpointing else ''}: {count} steps, loss {first:.2f} to "
            f"{last:.2f}, {time.perf_counter() - start:.0f} s, MB after each tenth: {[round(m) for m in memories]}",
            flush=True,
        )
        assert last < first and memories[-1] < memories[1] + 20


def precision(count):
    """The README's table. `count` texts each."""
    columns = ["base", *(name + queries for name in TYPES for queries in ("", ", random queries"))]
    print("| dtype, layers |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    for dtype in (torch.bfloat16, torch.float16):
        for layers in (16, 48, 96):
            measured = drifts(layers, dtype, count)
            values = " | ".join(f"{measured[column]:.1e}" for column in columns)
            print(f"| {str(dtype).removeprefix('torch.')}, {layers} | {values} |", flush=True)


# Each with its own count
RUNS = {crash: 240, fuzz: 2000, coverage: 600, rounds: 1000, training: 1000, precision: 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=["all", *(run.__name__ for run in RUNS)])
    parser.add_argument("--count", type=int, help="in place of the run's own")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    versions = [f"{package.__name__} {package.__version__}" for package in (torch, transformers, safetensors)]
    print(platform.machine(), f"Python {platform.python_version()}", *versions, sep=", ", flush=True)
    for run, count in RUNS.items():
        if arguments.run in ("all", run.__name__):
            print(f"\n{run.__name__}: {arguments.count or count}", flush=True)
            run(arguments.count or count)


if __name__ == "__main__":
    main()
