# Copyright 2026 The modeling_attnres authors. Licensed under the Apache License, Version 2.0.
"""Inspections as pictures."""

from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from .inspect_checkpoint import Inspection, require_one_shape


if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = {"font.size": 8, "axes.titlesize": 9, "figure.constrained_layout.use": True, "hatch.linewidth": 0.5}
# Clear to color-blind readers, and in print by the line style
LINES = [("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#CC79A7", ":", "D")]
# Two-sided and light in the middle
COLORS = "PuOr_r"
FACTOR = "mean weight × sources (1: as in the base)"


def require_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ImportError("Pictures need the package matplotlib: `pip install matplotlib`.")


def write_pictures(inspections: list[Inspection], folder: str | Path) -> list[Path]:
    r"""
    Draws one or more inspections, of one shape, as PNG files: `weights.png`, `entropy.png`, `queries.png`, and, where
    there are numbers for them, `ablation.png` and `dilution.png` of the last.

    Args:
        inspections (`list[Inspection]`): as [`inspect_checkpoint`] gives them; several are drawn side by side.
        folder (`str` or `Path`): where to put them. It is made if it is not there.

    Returns:
        `list[Path]`: the files.

    Raises:
        `ImportError`: matplotlib is not installed.
        `ValueError`: the inspections are not of one shape.
    """
    require_matplotlib()
    require_one_shape(inspections)
    import matplotlib

    # Drawn to files, whatever else the process has on a screen
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    last = inspections[-1]
    drawings = {"weights.png": draw_weights, "entropy.png": draw_entropies, "queries.png": draw_query_norms}
    if last.loss_changes is not None:
        drawings["ablation.png"] = draw_ablation
    if last.dilution is not None:
        drawings["dilution.png"] = draw_dilution
    files = []
    for name, draw in drawings.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure()
            FigureCanvasAgg(figure)
            draw(figure, inspections)
            files.append(folder / name)
            title = f"{name}: {', '.join(i.name for i in inspections)}"
            figure.savefig(files[-1], dpi=110, metadata={"Title": title})
    return files


def draw_weights(figure, inspections: list[Inspection]) -> None:
    """Mean weight times number of sources, sublayer by source, one panel for each checkpoint, all on one scale."""
    panels = _heat_map_panels(figure, inspections[-1], len(inspections))
    norm = _factor_norm(inspections)
    for axes, inspection in zip(panels, inspections):
        image = _heat_map(axes, inspection, inspection.mean_factors, norm)
        axes.set_title(inspection.name)
    figure.colorbar(image, ax=list(panels), label=FACTOR, shrink=0.6)


def draw_ablation(figure, inspections: list[Inspection]) -> None:
    """The same, and beside it the change in loss without the source."""
    from matplotlib.colors import SymLogNorm

    last = inspections[-1]
    left, right = _heat_map_panels(figure, last, 2)
    image = _heat_map(left, last, last.mean_factors, _factor_norm([last]))
    left.set_title(FACTOR)
    figure.colorbar(image, ax=left, shrink=0.6)
    greatest = max(last.loss_changes.nan_to_num(0).abs().max().item(), 2e-3)
    # Few sources matter much and most matter little: both have to show
    image = _heat_map(right, last, last.loss_changes, SymLogNorm(linthresh=1e-3, vmin=-greatest, vmax=greatest))
    right.set_title("change in loss without the source")
    figure.colorbar(image, ax=right, shrink=0.6)
    figure.suptitle(f"{last.name}: weight and cause")


def _factor_norm(inspections: list[Inspection]):
    """Centered on 1, with a range that fits the data."""
    from matplotlib.colors import CenteredNorm

    farthest = max((i.mean_factors.nan_to_num(1) - 1).abs().max().item() for i in inspections)
    return CenteredNorm(vcenter=1, halfrange=max(farthest, 1e-3))


def draw_entropies(figure, inspections: list[Inspection]) -> None:
    """Mean entropy of each sublayer, with the range of nine tokens in ten."""
    axes = _draw_lines(figure, inspections, [inspection.entropies.mean(1) for inspection in inspections])
    for line, inspection in zip(axes.get_lines(), inspections):
        low, high = inspection.entropies.quantile(0.05, dim=1), inspection.entropies.quantile(0.95, dim=1)
        axes.fill_between(range(len(low)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_ylabel("entropy / that of equal weights")
    axes.set_title("How even the weights are (line: mean, band: 5 to 95 % of the tokens)")


def draw_query_norms(figure, inspections: list[Inspection]) -> None:
    """How far each query is from zero."""
    axes = _draw_lines(figure, inspections, [inspection.query_norms for inspection in inspections])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("norm of the query")
    axes.set_title("How far the queries are from zero")


def draw_dilution(figure, inspections: list[Inspection]) -> None:
    """What each layer leaves and the gradient that reaches it, base against AttnRes."""
    last = inspections[-1]
    figure.set_size_inches(9, 3.2)
    for axes, field, title in zip(
        figure.subplots(1, 2), ("outputs", "gradients"), ("output magnitude (root mean square)", "norm of the gradient")
    ):
        for name, dilution, (color, line, marker) in zip(
            ("base", last.name), (last.base_dilution, last.dilution), LINES
        ):
            values = getattr(dilution, field)
            axes.plot(range(len(values)), values, line, color=color, marker=marker, markersize=3, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend()


def _heat_map_panels(figure, inspection: Inspection, count: int) -> list["Axes"]:
    width = 1.6 + count * (0.9 + 0.22 * max(len(inspection.sources), 6))
    figure.set_size_inches(width, 1.4 + 0.13 * max(len(inspection.sublayers), 16))
    return list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _heat_map(axes: "Axes", inspection: Inspection, values, norm):
    image = axes.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap=COLORS, norm=norm)
    # Hatched where a sublayer does not have the source, which is not the same as a weight of zero
    axes.patch.set(facecolor="white", edgecolor="0.6", hatch="/////", linewidth=0)
    axes.set_xticks(range(len(inspection.sources)), inspection.sources, rotation=90, fontsize=7)
    axes.set_yticks(range(len(inspection.sublayers)), inspection.sublayers, fontsize=6)
    axes.set_xlabel("source")
    return image


def _draw_lines(figure, inspections: list[Inspection], values: list) -> "Axes":
    """One line for each inspection, over the sublayers."""
    sublayers = inspections[0].sublayers
    figure.set_size_inches(max(7, 2 + 0.14 * len(sublayers)), 3.6)
    axes = figure.subplots()
    for inspection, numbers, (color, line, marker) in zip(inspections, values, cycle(LINES)):
        axes.plot(numbers.tolist(), line, color=color, marker=marker, markersize=3, label=inspection.name)
    axes.set_xticks(range(len(sublayers)), sublayers, rotation=90, fontsize=6)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes
