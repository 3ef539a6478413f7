"""Curves, sweep and compute multiplier of pretrain.py, as a picture and a Markdown table.

    python examples/experiments/plot_pretrain.py pretrain.jsonl --output pretrain.png

The compute multiplier is the number of tokens that the base needs for the final loss of an arm, divided by the tokens
of the arm. It comes from a least-squares fit of E + A * length**-b to the base's final losses at three lengths or more.
Its 95 % interval comes from 1,000 fits to losses with random errors of the size of the spread between seeds. Equal time
counts the seconds of a step: the base then trains on more tokens, at the loss of the fit.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from plot_training import COLORS, MARKERS, plt, spread
from pretrain import SWEEP_LENGTH


def fit(lengths, losses) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, A and b of the curve through `losses`, `(..., lengths)`. Each is an array of shape `(...)`."""
    exponents = np.linspace(0.02, 2, 199)
    powers = np.power(lengths, -exponents[:, None])
    designs = np.stack([np.ones_like(powers), powers], -1)
    # For each exponent the best E and A
    coefficients = np.einsum("bkn,...n->b...k", np.linalg.pinv(designs), losses)
    errors = np.square(np.einsum("bnk,b...k->b...n", designs, coefficients) - losses).sum(-1)
    best = errors.argmin(0)
    e, a = np.moveaxis(np.take_along_axis(coefficients, best[None, ..., None], 0)[0], -1, 0)
    return e, a, exponents[best]


def needed_length(curve: tuple[np.ndarray, np.ndarray, np.ndarray], loss: np.ndarray) -> np.ndarray:
    """The length at which the curve has this loss. Infinite if it ends above it."""
    e, a, b = curve
    with np.errstate(invalid="ignore"):
        return np.where(loss > e, ((loss - e) / a) ** (-1 / b), np.inf)


def read(file: Path) -> tuple[dict, dict]:
    """
    The rows by (width, length, arm) and seed, at the best learning rate of each arm, and the final losses of the sweep
    by arm and rate.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    smallest = min(row["width"] for row in rows)
    sweep, chosen = defaultdict(dict), defaultdict(dict)
    for row in rows:
        if (row["width"], row["seed"], row["length"]) == (smallest, 0, SWEEP_LENGTH):
            sweep[row["arm"]][row["learning_rate"]] = row["losses"][-1]["loss"]
    for row in rows:
        best = min(sweep[row["arm"]], key=sweep[row["arm"]].get)
        if np.isclose(row["learning_rate"], best * smallest / row["width"]):
            chosen[row["width"], row["length"], row["arm"]][row["seed"]] = row
    return chosen, sweep


def finals(runs: dict[int, dict]) -> np.ndarray:
    return np.array([row["losses"][-1]["loss"] for row in runs.values()])


def tokens_per_step(row: dict) -> int:
    return row["batch_size"] * row["block_length"]


def step_seconds(chosen: dict, width: int, arm: str) -> float:
    """The median over the intervals between two evaluations."""
    runs = [row for key, group in chosen.items() if key[::2] == (width, arm) for row in group.values()]
    points = [np.array([[point["step"], point["seconds"]] for point in row["losses"]]) for row in runs]
    return float(np.median(np.concatenate([np.diff(p[:, 1]) / np.diff(p[:, 0]) for p in points])))


def base_lengths(chosen: dict, width: int) -> dict[float, dict]:
    return {length: runs for (w, length, arm), runs in sorted(chosen.items()) if (w, arm) == (width, "base")}


def multiplier(chosen: dict, width: int, length: float, arm: str) -> np.ndarray | None:
    """The value, and the limits of its interval. `None` if the base has fewer than three lengths, or one seed."""
    base, runs = base_lengths(chosen, width), finals(chosen[width, length, arm])
    groups = [finals(group) for key, group in chosen.items() if key[0] == width]
    freedom = sum(len(group) - 1 for group in groups)
    if len(base) < 3 or not freedom:
        return None
    deviation = np.sqrt(sum(np.square(group - group.mean()).sum() for group in groups) / freedom)
    means = np.array([finals(group).mean() for group in base.values()])
    errors = deviation / np.sqrt([len(group) for group in base.values()])
    noise = np.random.default_rng(0).standard_normal((1001, len(means) + 1))
    noise[0] = 0
    curves = fit(list(base), means + errors * noise[:, :-1])
    draws = needed_length(curves, runs.mean() + deviation / np.sqrt(len(runs)) * noise[:, -1]) / length
    return np.array([draws[0], *np.quantile(draws[1:], [0.025, 0.975], method="nearest")])


def table(chosen: dict) -> str:
    columns = ["width", "parameters", "tokens", "arm", "learning rate", "seeds", "loss", "minus the base's"]
    columns += ["time of a step", "minus the base's at equal time", "multiplier", "multiplier at equal time"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for (width, length, arm), runs in sorted(chosen.items()):
        row = next(iter(runs.values()))
        tokens = row["losses"][-1]["step"] * tokens_per_step(row)
        cells = [width, f"{row['non_embedding'] / 1e6:.2f}M", f"{tokens / 1e6:.1f}M", arm]
        cells += [f"{row['learning_rate']:.2g}", len(runs), spread(finals(runs))]
        base = chosen.get((width, length, "base"), {})
        shared = sorted(set(runs) & set(base))
        if arm != "base" and shared:
            cells.append(spread(finals({s: runs[s] for s in shared}) - finals({s: base[s] for s in shared})))
            ratio = step_seconds(chosen, width, arm) / step_seconds(chosen, width, "base")
            cells.append(f"{ratio:.2f}")
            factors = multiplier(chosen, width, length, arm)
            if factors is not None:
                lengths = base_lengths(chosen, width)
                e, a, b = fit(list(lengths), np.array([finals(group).mean() for group in lengths.values()]))
                cells.append(f"{finals(runs).mean() - (e + a * (length * ratio) ** -b):.4f}")
                cells += ["{:.2f} ({:.2f} to {:.2f})".format(*values) for values in (factors, factors / ratio)]
        lines.append(f"| {' | '.join(map(str, cells + [''] * (len(columns) - len(cells))))} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="file of JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    args = parser.parse_args()

    chosen, sweep = read(args.file)
    styles = {arm: {"color": color, "marker": marker} for arm, color, marker in zip(sweep, COLORS, MARKERS)}
    figure, (rates, curves, ends) = plt.subplots(1, 3, figsize=(13.5, 4.5), layout="constrained")
    for arm, losses in sweep.items():
        rates.plot(*zip(*sorted(losses.items())), label=arm, markersize=5, **styles[arm])
    for (width, length, arm), runs in sorted(chosen.items()):
        row = next(iter(runs.values()))
        places = np.array([point["step"] for point in row["losses"]]) * tokens_per_step(row) / 1e6
        losses = np.mean([[point["loss"] for point in row["losses"]] for row in runs.values()], 0)
        if (width, length) == (min(chosen)[0], 1):
            curves.plot(places[2:], losses[2:], label=arm, markersize=4, **styles[arm])
        ends.errorbar(places[-1], losses[-1], np.ptp(finals(runs)) / 2, markersize=5, **styles[arm])
    for width in {width for width, _, _ in chosen}:
        base = base_lengths(chosen, width)
        if len(base) >= 3:
            row = next(iter(base[1].values()))
            e, a, b = fit(list(base), [finals(runs).mean() for runs in base.values()])
            lengths = np.linspace(min(base), max(base), 50)
            unit = row["losses"][-1]["step"] * tokens_per_step(row) / 1e6
            ends.plot(lengths * unit, e + a * lengths**-b, color="black", linewidth=0.8)
    rates.set(xscale="log", xlabel="learning rate", ylabel="final loss on held-out text", title="sweep, half length")
    curves.set(xlabel="million tokens", title=f"width {min(chosen)[0]}, 20 tokens per parameter")
    tried = sorted({rate for losses in sweep.values() for rate in losses})
    rates.set_xticks(tried, [f"{rate:g}" for rate in tried])
    rates.minorticks_off()
    ends.set(xlabel="million tokens", title="final losses, and the fit of the base")
    for axes in (rates, curves, ends):
        axes.grid(alpha=0.3)
    rates.legend(fontsize="small")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)
    print(table(chosen))


if __name__ == "__main__":
    main()
