"""Pictures of a study. Matplotlib is imported on use, and its global state (pyplot) is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rllib_calql.progress.drawing import COLOURS, line_style, new_figure, png, shown_name, write_names
from rllib_calql.study.evaluations import Evaluation
from rllib_calql.study.statistics import Interval, curve_interval, on_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_POINTS = 41
_OFFLINE_SHARE = 0.6  # Width of the offline panel, the online one being 1.

Trials = Mapping[str, Mapping[str, Sequence[Sequence[Evaluation]]]]  # Task -> algorithm -> trials.


def curves(trials: Trials, quantity: str, label: str) -> bytes:
    """PNG of a quantity over both phases, a row per task: mean over seeds with its interval.

    Args:
        trials: Of all tasks.
        quantity: "score" or a column of `Evaluation`.
        label: Of the vertical axis.
    """
    figure = new_figure(10.0, 0.9 + 2.9 * len(trials))
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
        offline.set_title(f"{shown_name(task)}: offline", fontsize=10, parse_math=False)
        online.set_title(f"{shown_name(task)}: online", fontsize=10, parse_math=False)
        offline.set_xlabel("gradient updates")
        online.set_xlabel("env steps since the switch")
    legend = figure.legend(
        handles.values(),
        [" "] * len(handles),
        loc="outside upper center",
        ncols=min(4, max(1, len(handles))),
    )
    write_names(legend, map(shown_name, handles))
    return png(figure)


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
    style = line_style(number)
    (line,) = axes.plot(grid[known], middle, **style)
    axes.fill_between(grid[known], low, high, color=style["color"], alpha=0.15, linewidth=0.0)
    return line


def forest(intervals: Mapping[str, Mapping[str, Interval]], label: str) -> bytes:
    """PNG of one statistic, a panel per task, a row per algorithm: point and interval.

    Args:
        intervals: Task -> algorithm -> statistic.
        label: Of the horizontal axis.
    """
    num_rows = max(len(its) for its in intervals.values())
    figure = new_figure(2.2 + 3.4 * len(intervals), 1.1 + 0.36 * num_rows)
    panels = figure.subplots(1, len(intervals), squeeze=False)[0]
    for (task, its), axes in zip(intervals.items(), panels, strict=True):
        for number, one in enumerate(its.values()):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot([one.low, one.high], [number, number], color=colour, linewidth=2.0)
            axes.plot([one.value], [number], marker="o", color=colour)
            axes.annotate(
                f"{one.value:.2f}", (one.value, number), xytext=(0, 6), textcoords="offset points", fontsize=8
            )
        axes.set_yticks(range(len(its)), [shown_name(name) for name in its], parse_math=False)
        axes.set_ylim(len(its) - 0.4, -0.7)
        axes.set_xlabel(label)
        axes.set_title(shown_name(task), fontsize=10, parse_math=False)
        axes.grid(axis="x", alpha=0.3)
    return png(figure)
