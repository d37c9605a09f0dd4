"""Pictures of a study. Matplotlib is imported on use, and its global state (pyplot) is left alone."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rllib_calql.study.evaluations import Evaluation
from rllib_calql.study.statistics import Interval, curve_interval, on_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; then the same with another line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("solid", "dashed", "dotted")
_NUM_POINTS = 41
_MAX_NAME = 48  # Characters of a task or an algorithm.
_OFFLINE_SHARE = 0.6  # Width of the offline panel, the online one being 1.

Trials = Mapping[str, Mapping[str, Sequence[Sequence[Evaluation]]]]  # Task -> algorithm -> trials.


def curves(trials: Trials, quantity: str, label: str) -> bytes:
    """PNG of a quantity over both phases, a row per task: mean over seeds with its interval.

    Args:
        trials: Of all tasks.
        quantity: "score" or a column of `Evaluation`.
        label: Of the vertical axis.
    """
    figure = _figure(10.0, 0.9 + 2.9 * len(trials))
    panels = figure.subplots(
        len(trials), 2, squeeze=False, sharey="row", gridspec_kw={"width_ratios": [_OFFLINE_SHARE, 1.0]}
    )
    handles: dict[str, Any] = {}
    for (task, algorithms), (offline, online) in zip(trials.items(), panels, strict=True):
        for axes, is_online in ((offline, False), (online, True)):
            for number, (algorithm, its) in enumerate(algorithms.items()):
                line = _curve(axes, its, number, quantity, online=is_online)
                if line is not None:
                    handles.setdefault(algorithm, line)
            axes.grid(alpha=0.3)
        offline.set_ylabel(label)
        offline.set_title(f"{_shown(task)}: offline", fontsize=10, parse_math=False)
        online.set_title(f"{_shown(task)}: online", fontsize=10, parse_math=False)
        offline.set_xlabel("gradient updates")
        online.set_xlabel("env steps since the switch")
    legend = figure.legend(
        # Matplotlib leaves names out that begin with `_`, so they are written in afterwards.
        handles.values(),
        [" "] * len(handles),
        loc="outside upper center",
        ncols=min(4, max(1, len(handles))),
    )
    for text, name in zip(legend.get_texts(), handles, strict=True):
        text.set_parse_math(False)
        text.set_text(_shown(name))
    return _png(figure)


def _curve(axes: Axes, trials: Sequence[Sequence[Evaluation]], number: int, quantity: str, *, online: bool) -> Any:
    """One algorithm's line and band, None if it has nothing to show in this phase."""
    last = max((one.num_online_env_steps if online else one.num_offline_updates) for t in trials for one in t)
    if last == 0:
        return None
    grid = np.linspace(0.0, last, _NUM_POINTS)
    per_seed = [on_grid(trial, grid, online=online, quantity=quantity) for trial in trials]
    known = np.isfinite(np.stack(per_seed)).all(axis=0)
    if not known.any():
        return None
    middle, low, high = curve_interval([values[known] for values in per_seed])
    colour = COLOURS[number % len(COLOURS)]
    (line,) = axes.plot(grid[known], middle, color=colour, linestyle=_DASHES[number // len(COLOURS) % len(_DASHES)])
    axes.fill_between(grid[known], low, high, color=colour, alpha=0.15, linewidth=0.0)
    return line


def forest(intervals: Mapping[str, Mapping[str, Interval]], label: str) -> bytes:
    """PNG of one statistic, a panel per task, a row per algorithm: point and interval.

    Args:
        intervals: Task -> algorithm -> statistic.
        label: Of the horizontal axis.
    """
    num_rows = max(len(its) for its in intervals.values())
    figure = _figure(2.2 + 3.4 * len(intervals), 1.1 + 0.36 * num_rows)
    panels = figure.subplots(1, len(intervals), squeeze=False)[0]
    for (task, its), axes in zip(intervals.items(), panels, strict=True):
        for number, one in enumerate(its.values()):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot([one.low, one.high], [number, number], color=colour, linewidth=2.0)
            axes.plot([one.value], [number], marker="o", color=colour)
            axes.annotate(
                f"{one.value:.2f}", (one.value, number), xytext=(0, 6), textcoords="offset points", fontsize=8
            )
        axes.set_yticks(range(len(its)), [_shown(name) for name in its], parse_math=False)
        axes.set_ylim(len(its) - 0.4, -0.7)
        axes.set_xlabel(label)
        axes.set_title(_shown(task), fontsize=10, parse_math=False)
        axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def _shown(name: str) -> str:
    """A name on one line, its middle left out if it is long. A `$` in it is no formula: `parse_math` is off."""
    line = " ".join(name.split())
    half = _MAX_NAME // 2
    return line if len(line) <= _MAX_NAME else f"{line[:half]}…{line[-half:]}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # A name in a script that the font does not have.
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
