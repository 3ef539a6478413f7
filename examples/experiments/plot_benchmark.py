"""The cost of AttnRes by number of blocks and by sequence length, as a picture.

cd examples/experiments
python benchmark.py --measure prefill "training step" --peers --blocks 2 4 8 16 full --output blocks.json
python benchmark.py --measure prefill "training step" --peers --sequence 128 512 2048 --output sequences.json
python plot_benchmark.py blocks.json sequences.json figures/benchmark.png
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


MARKERS = {"prefill": "o", "decode": "s", "training step": "^"}


def draw(axes: plt.Axes, rows: list[dict], label: str) -> None:
    """One line for each measurement: the median ratio to the base, with the min and max of the rounds."""
    places = list(dict.fromkeys(row[label] for row in rows))
    for measurement, marker in MARKERS.items():
        points = [row for row in rows if row["measurement"] == measurement]
        if not points:
            continue
        ratios = [row["ratio"] for row in points]
        spread = [[r["ratio"] - r["min"] for r in points], [r["max"] - r["ratio"] for r in points]]
        x = [places.index(row[label]) for row in points]
        axes.errorbar(x, ratios, spread, marker=marker, capsize=3, label=measurement)
    axes.set_xticks(range(len(places)), places)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", type=Path, help="figures for several `--blocks`")
    parser.add_argument("sequences", type=Path, help="figures for several `--sequence`")
    parser.add_argument("output", type=Path, help="picture to write")
    args = parser.parse_args()

    _, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axes, file, label in ((left, args.blocks, "variant"), (right, args.sequences, "sequence")):
        rows = [row for row in json.loads(file.read_text())["results"] if row["variant"] != "base"]
        draw(axes, rows, label)
    left.set(ylabel="time / the base's", title="number of blocks (512 tokens)")
    right.set(title="number of tokens (8 blocks)")
    left.legend()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
