"""Pictures of what a data set holds. Matplotlib is imported on use, and its global state (pyplot) is left alone."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllib_calql.datasets.report.summary import DatasetReport, Distribution, format_number

_MAX_BINS = 50
_MIN_BINS = 10
_MAX_WHOLE = 1e9  # Larger whole numbers are binned like any others.
_MAX_TITLE = 90  # Characters.
_LOG_FROM = 100  # Ratio of the fullest to the emptiest bar beyond which small bars vanish on a linear axis.


def require_matplotlib() -> None:
    """Raises an ImportError that names the remedy if Matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as err:
        raise ImportError('Plots need the `matplotlib` package: pip install "rllib-calql[plots]"') from err


def plot_report(report: DatasetReport, file: str | os.PathLike[str]) -> None:
    """Draws histograms of the episodes' returns and lengths side by side into a PNG file.

    Bars are counted on a logarithmic axis where a linear one would hide the small ones.

    Args:
        report: Built with `keep_distributions=True`.
        file: The file to write; an existing one is replaced.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If the report holds no distributions.
        OSError: If the file cannot be written.
    """
    if report.returns is None or report.lengths is None:
        raise ValueError(
            "The report holds no returns and lengths to plot; build it by `ReportBuilder(keep_distributions=True)`."
        )
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.4), dpi=120, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    name = ", ".join(report.names)
    name = name if len(name) <= _MAX_TITLE else f"...{name[-_MAX_TITLE:]}"
    counts = f"{_counted(report.num_episodes, 'episode')}, {_counted(report.num_transitions, 'transition')}"
    # A `$` in a path is no formula.
    figure.suptitle(f"{name}\n{counts}" if name else counts, parse_math=False, fontsize=11)
    left, right = figure.subplots(1, 2)
    edges = histogram_bins(report.returns)
    return_label = "undiscounted return [reward units of the environment]"
    _histogram(left, report.returns, edges, report.return_distribution, return_label)
    edges = histogram_bins(report.lengths)
    _histogram(right, report.lengths, edges[edges > 0], report.length_distribution, "episode length [steps]")
    with open(file, "wb") as opened:
        canvas.print_png(opened)


def histogram_bins(values: NDArray[Any]) -> NDArray[np.float64]:
    """Edges of at most 50 bins of equal width that hold all values.

    Whole numbers lie in the middle between edges, each alone or with equally many neighbours, so that bars do not
    alternate where the values have no gaps. A single bar never fills the axis.
    """
    low, high = float(values.min()), float(values.max())
    if max(-low, high) < _MAX_WHOLE and bool((values == np.rint(values)).all()):
        margin = max(0, _MIN_BINS - int(high - low)) // 2
        low, num_values = low - margin, int(high - low) + 1 + 2 * margin
        width = -(-num_values // _MAX_BINS)
        num_bins = -(-num_values // width)
        return low - 0.5 + width * np.arange(num_bins + 1, dtype=np.float64)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-300):  # Narrower bins would be at the limits of float64.
        wide = max(0.05 * size, 1e-300)
        return np.linspace(low - wide, high + wide, _MIN_BINS + 2)
    return np.linspace(low, high, _MAX_BINS + 1)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _histogram(
    axes: Any, values: NDArray[Any], edges: NDArray[np.float64], distribution: Distribution, label: str
) -> None:
    from matplotlib.ticker import MaxNLocator

    counts, _ = np.histogram(values, edges)
    is_log = counts.max() > _LOG_FROM * counts[counts > 0].min()
    axes.stairs(counts, edges, fill=True, color="tab:blue", alpha=0.75)
    median, mean = distribution.median, distribution.mean
    axes.axvline(median, color="black", linewidth=1.2, label=f"median {format_number(median)}")
    axes.axvline(mean, color="tab:red", linewidth=1.2, linestyle="--", label=f"mean {format_number(mean)}")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=9)
    if is_log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.5)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=bool(edges[1] - edges[0] >= 1)))
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-4, 6))
    axes.set_xlabel(label)
    axes.set_ylabel("episodes per bar (log scale)" if is_log else "episodes per bar")
    axes.spines[["top", "right"]].set_visible(False)
