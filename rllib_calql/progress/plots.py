"""The picture of a run, or of several: what evaluations gave, over updates and env steps, and how values behaved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rllib_calql.progress.drawing import line_style, new_figure, png, shown_name, write_names
from rllib_calql.progress.runs import Point, TrialRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OFFLINE_SHARE = 0.4  # Of the horizontal axis, where there are both phases.
_MAX_NAMED = 8  # Curves in a legend.
_QUANTITIES = (  # Attribute of `Point`, and the label of its panel.
    ("success_rate", "success rate"),
    ("episode_return", "return of evaluations"),
    ("calibration_gap", "calibration gap\nQ - return of the data"),
    ("td_loss", "TD loss"),
    ("held_out_td_loss", "TD loss of\nheld-out episodes"),
    ("value_by_data", "value by data\n(fitted Q evaluation)"),
)


@dataclass(frozen=True)
class _Scale:
    """The horizontal axis: updates up to the switch, then env steps.

    Attributes:
        updates: Of the trial with the most.
        env_steps: Of the trial with the most.
    """

    updates: int
    env_steps: int

    @property
    def switch(self) -> float:
        """Where the switch lies, from 0 to 1."""
        if not self.updates or not self.env_steps:
            return 1.0 if self.updates else 0.0
        return _OFFLINE_SHARE

    def of(self, point: Point) -> float:
        """Where a result lies."""
        if point.num_env_steps and self.env_steps:
            return self.switch + (1.0 - self.switch) * point.num_env_steps / self.env_steps
        return self.switch * point.num_offline_updates / self.updates if self.updates else 0.0

    def ticks(self) -> tuple[list[float], list[str]]:
        """Places and numbers, none at the switch, where two would meet."""
        from matplotlib.ticker import MaxNLocator

        places, texts = [], []
        for total, begin, end, num in (
            (self.updates, 0.0, self.switch, 4),
            (self.env_steps, self.switch, 1.0, 6),
        ):
            for value in MaxNLocator(num, integer=True).tick_values(0, total) if total else ():
                is_at_switch = value < 0.04 * total if begin > 0.0 else (end < 1.0 and value > 0.92 * total)
                if value <= total and not is_at_switch:
                    places.append(begin + (end - begin) * value / total)
                    texts.append(f"{value:,.0f}")
        return places, texts


def draw(trials: Mapping[str, TrialRecord], title: str) -> bytes:
    """PNG with a panel per quantity that any trial knows.

    Args:
        trials: By the names in the legend.
        title: Above all panels.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If no trial has a result.
    """
    from rllib_calql.datasets.report.plots import require_matplotlib

    require_matplotlib()
    points = [point for trial in trials.values() for point in trial.points]
    if not points:
        raise ValueError("No trial has a result yet.")
    scale = _Scale(max(p.num_offline_updates for p in points), max(p.num_env_steps for p in points))
    has_evaluations = any(trial.known("episode_return") for trial in trials.values())
    panels = [
        ("training_return", "return of training episodes")
        if quantity == "episode_return" and not has_evaluations
        else (quantity, label)
        for quantity, label in _QUANTITIES
    ]
    panels = [(quantity, label) for quantity, label in panels if any(t.known(quantity) for t in trials.values())]
    panels = panels or [("time_s", "seconds of training")]
    figure = new_figure(9.5, 1.0 + 2.3 * len(panels))
    if len(trials) > _MAX_NAMED:
        title = f"{title}: {len(trials)} trials"
    figure.suptitle(title, parse_math=False, fontsize=11)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (quantity, label) in zip(all_axes, panels, strict=True):
        for number, trial in enumerate(trials.values()):
            _draw_trial(axes, trial, quantity, scale, line_style(number))
        _finish(axes, quantity, label, list(trials.values()), scale)
    _label_phases(all_axes[-1], scale)
    if 1 < len(trials) <= _MAX_NAMED:
        lines = all_axes[0].get_lines()[: len(trials)]
        legend = figure.legend(lines, [" "] * len(lines), loc="outside lower center", ncols=2, fontsize=9)
        write_names(legend, map(shown_name, trials))
    return png(figure)


def _draw_trial(axes: Axes, trial: TrialRecord, quantity: str, scale: _Scale, style: Mapping[str, Any]) -> None:
    known = _curve(trial, quantity, scale)
    is_evaluation = quantity in ("success_rate", "episode_return", "held_out_td_loss", "value_by_data")
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if is_evaluation or len(known) < 3 else {}
    (line,) = axes.plot([x for x, _ in known], [y for _, y in known], linewidth=1.6, **marker, **style)
    if quantity == "value_by_data" and known:
        low, high = (_curve(trial, end, scale) for end in ("value_low", "value_high"))
        color = line.get_color()
        axes.fill_between([x for x, _ in low], [y for _, y in low], [y for _, y in high], color=color, alpha=0.15)


def _curve(trial: TrialRecord, quantity: str, scale: _Scale) -> list[tuple[float, float]]:
    """Places and values; a gap (NaN) where a trial went online before the longest offline phase ended."""
    known = [(point, value) for point in trial.points if (value := getattr(point, quantity)) is not None]
    curve: list[tuple[float, float]] = []
    for number, (point, value) in enumerate(known):
        goes_online = number > 0 and point.num_env_steps > 0 and not known[number - 1][0].num_env_steps
        if goes_online and point.num_offline_updates < scale.updates:
            curve.append((math.nan, math.nan))
        curve.append((scale.of(point), value))
    return curve


def _finish(axes: Axes, quantity: str, label: str, trials: Sequence[TrialRecord], scale: _Scale) -> None:
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(-0.01, 1.01)
    axes.set_xticks(*scale.ticks())
    values = [value for trial in trials for value in trial.known(quantity)]
    if quantity == "success_rate":
        axes.set_ylim(-0.04, 1.04)
    elif quantity.endswith("td_loss") and min(values) > 0.0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.set_ylabel(f"{label} (log scale)")
    elif quantity == "calibration_gap":
        axes.axhline(0.0, color="black", linewidth=0.8)
    if quantity in ("episode_return", "training_return"):
        _mark_data(axes, trials)
    if 0.0 < scale.switch < 1.0:
        axes.axvline(scale.switch, color="#666666", linewidth=1.0, linestyle="dashed")
        if quantity == "episode_return" and len(trials) == 1:
            _mark_dip(axes, trials[0], scale)


def _mark_data(axes: Axes, trials: Sequence[TrialRecord]) -> None:
    for value in sorted({trial.data_return for trial in trials if trial.data_return is not None}):
        axes.axhline(value, color="#666666", linewidth=1.2, linestyle="dotted")
        axes.annotate(
            f"mean return of the data {value:.4g}",
            (0.005, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=8.5,
            color="#444444",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1.0},
        )


def _mark_dip(axes: Axes, trial: TrialRecord, scale: _Scale) -> None:
    online = [point for point in trial.points if point.episode_return is not None and point.num_env_steps]
    if not trial.dip or not online:
        return
    worst = min(online, key=lambda point: point.episode_return or 0.0)
    value = worst.episode_return or 0.0
    axes.annotate("", (scale.of(worst), value), (scale.of(worst), value - trial.dip), arrowprops={"arrowstyle": "->"})
    axes.annotate(
        f"dip {trial.dip:.4g}",
        (scale.of(worst), value - trial.dip),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8.5,
    )


def _label_phases(axes: Axes, scale: _Scale) -> None:
    if scale.switch in (0.0, 1.0):
        axes.set_xlabel("gradient updates on the data" if scale.switch else "env steps")
        return
    for begin, end, text in ((0.0, scale.switch, "gradient updates on the data"), (scale.switch, 1.0, "env steps")):
        axes.annotate(
            text,
            ((begin + end) / 2, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -32),
            textcoords="offset points",
            ha="center",
        )
    axes.annotate(
        "switch",
        (scale.switch, 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, -14),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
        color="#444444",
    )
