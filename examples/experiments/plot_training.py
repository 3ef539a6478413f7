"""Learning curves and sweeps of compare_training.py, as a picture and a Markdown table.

    python examples/experiments/plot_training.py losses.jsonl --output losses.png
    python examples/experiments/plot_training.py losses.jsonl --output losses.png --arms-by arm block_size

Each arm is shown at its best setting: among the settings with the most seeds, the one with the lowest mean final loss.
"""

import argparse
import json
from collections import defaultdict
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


# Colors of Okabe and Ito, distinct for color-blind readers. Markers for prints in gray.
COLORS = ["black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = "os^Dv*P"

RATES = ("learning_rate", "attn_res_learning_rate")
ATTN_RES = ("type", "block_size", "temperature")
# Arms that are compared may differ in these fields
OWN = (*RATES, *ATTN_RES, "optim", "parameters")
# Fields of a row that are not settings
MEASURED = ("seed", "losses", "seconds")


def read(files: list[Path], arms_by: list[str]) -> dict[str, dict[tuple, dict[int, list[dict]]]]:
    """The points of each curve, by arm, setting and seed. A later run replaces an earlier run of the same setting."""
    arms = defaultdict(lambda: defaultdict(dict))
    for row in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        if row.get("temperature") is None:
            # A model without Attention Residuals has none of their settings
            row = {name: value for name, value in row.items() if name not in ATTN_RES}
        arm = " ".join(str(row[name]) for name in arms_by if name in row)
        # Sorted, since scripts write their fields in different orders
        setting = tuple(sorted((name, value) for name, value in row.items() if name not in (*MEASURED, *arms_by)))
        arms[arm][setting][row["seed"]] = row["losses"]
    return arms


def final(runs: dict[int, list[dict]], seeds) -> float:
    return float(np.mean([runs[seed][-1]["loss"] for seed in seeds]))


def common_seeds(arm: str, settings: dict[tuple, dict]) -> set[int]:
    seeds = set.intersection(*map(set, settings.values()))
    if not seeds:
        raise ValueError(f"The settings of arm {arm!r} have no seed in common and cannot be compared.")
    return seeds


def best(arm: str, settings: dict[tuple, dict]) -> tuple:
    """The best of the settings with the most seeds: a sweep has one seed, and its best settings then get more."""
    most = max(map(len, settings.values()))
    finalists = {setting: runs for setting, runs in settings.items() if len(runs) == most}
    seeds = common_seeds(arm, finalists)
    losses = {setting: final(runs, seeds) for setting, runs in finalists.items()}
    # A diverged run ends with NaN
    return min(losses, key=lambda setting: np.nan_to_num(losses[setting], nan=np.inf))


def check_conditions(settings: dict[str, tuple]) -> None:
    for name in {name for setting in settings.values() for name, _ in setting} - {*OWN}:
        values = {arm: dict(setting).get(name) for arm, setting in settings.items()}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"At their best the arms differ in {name!r}, so they cannot be compared: {values}. Put such runs into "
                f"separate files, or make the field part of the arm's name: --arms-by arm {name}."
            )


def curve(runs: dict[int, list[dict]], x: str) -> tuple[np.ndarray, np.ndarray]:
    """Places (mean over seeds) and losses (seeds by places)."""
    points = list(runs.values())
    return np.mean([[p[x] for p in run] for run in points], 0), np.array([[p["loss"] for p in run] for run in points])


def draw_curves(axes: plt.Axes, chosen: dict[str, dict], x: str, styles: dict, first_step: int) -> None:
    for arm, runs in chosen.items():
        runs = {seed: [point for point in run if point["step"] >= first_step] for seed, run in runs.items()}
        places, losses = curve(runs, x)
        axes.plot(places, losses.mean(0), label=arm, markersize=4, **styles[arm])
        axes.fill_between(places, losses.min(0), losses.max(0), color=styles[arm]["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds of training" if x == "seconds" else x, ylabel="loss on held-out text")


def draw_sweep(axes: plt.Axes, arms: dict[str, dict], styles: dict) -> None:
    """The final loss by learning rate, at the best of all other settings."""
    rates = set()
    for arm, settings in arms.items():
        # If only the rate of queries and key norms was swept, this is the rate on the axis
        values = {name: {dict(s)[name] for s in settings if name in dict(s)} for name in RATES}
        rate = RATES[1] if len(values[RATES[0]]) < len(values[RATES[1]]) else RATES[0]
        seeds = common_seeds(arm, settings)
        lowest = defaultdict(lambda: np.inf)
        for setting, runs in settings.items():
            lowest[dict(setting)[rate]] = min(lowest[dict(setting)[rate]], final(runs, seeds))
        places = sorted(lowest)
        rates |= lowest.keys()
        label = f"{arm}: of queries and key norms" if rate == RATES[1] else arm
        axes.plot(places, [lowest[place] for place in places], label=label, markersize=5, **styles[arm])
    axes.set(xscale="log", xlabel="learning rate", ylabel="final loss")
    axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)], rotation=60)
    axes.minorticks_off()


def spread(values: np.ndarray) -> str:
    return f"{np.mean(values):.4f} ({np.min(values):.4f} to {np.max(values):.4f})"


def table(arms: dict[str, dict], settings: dict[str, tuple]) -> str:
    """Differences are to the arm `base` with the same seed, at the same step and at the same wall time."""
    columns = ["arm", "at its best", "final loss", "minus the base's", "the same at the base's wall time"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    bases = arms["base"][settings["base"]] if "base" in arms else {}
    for arm, setting in settings.items():
        # The rates, and the other fields of which the arm has more than one value
        others = [n for n, _ in setting if n not in RATES and len({dict(s).get(n) for s in arms[arm]}) > 1]
        varied = [(n, dict(setting)[n]) for n in (*RATES, *others) if n in dict(setting)]
        runs = arms[arm][setting]
        differences, at_equal_time = [], []
        for seed in sorted(set(runs) & set(bases)) if arm != "base" else []:
            run, end = runs[seed], bases[seed][-1]
            differences.append(run[-1]["loss"] - end["loss"])
            if "seconds" in run[-1] and "seconds" in end:
                seconds, losses = ([point[name] for point in run] for name in ("seconds", "loss"))
                at_equal_time.append(np.interp(end["seconds"], seconds, losses) - end["loss"])
        cells = [arm, ", ".join(f"{name} {value:g}" if name in RATES else f"{name} {value}" for name, value in varied)]
        cells.append(spread([run[-1]["loss"] for run in runs.values()]))
        cells += [spread(values) if values else "" for values in (differences, at_equal_time)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="files of JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--arms-by", nargs="+", default=["arm"], help="fields that name an arm (default: arm)")
    parser.add_argument("--first-step", type=int, default=0, help="first step of the curves in the picture")
    args = parser.parse_args()

    arms = read(args.files, args.arms_by)
    settings = {arm: best(arm, arms[arm]) for arm in arms}
    check_conditions(settings)
    chosen = {arm: arms[arm][setting] for arm, setting in settings.items()}
    styles = {arm: {"color": c, "marker": m} for arm, c, m in zip(arms, cycle(COLORS), cycle(MARKERS))}
    timed = all("seconds" in point for runs in chosen.values() for run in runs.values() for point in run)
    figure, panels = plt.subplots(1, 2 + timed, figsize=(4.5 * (2 + timed), 4.5), layout="constrained")
    for axes, x in zip(panels, ["step", "seconds"][: 1 + timed]):
        draw_curves(axes, chosen, x, styles, args.first_step)
    draw_sweep(panels[-1], arms, styles)
    for axes in panels:
        axes.grid(alpha=0.3)
        # Below the axes, so that it hides no curve
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)
    print(table(arms, settings))


if __name__ == "__main__":
    main()
