"""Runs compared: one table, as text, JSON and HTML, and one picture."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rllib_calql.progress import pages, plots
from rllib_calql.progress.budget import format_budget, format_duration, limits_of
from rllib_calql.progress.runs import RunRecord, TrialRecord

PAGE, PICTURE = "progress.html", "progress.png"  # In the folder of a run.
COMPARISON_PAGE, COMPARISON_PICTURE = "comparison.html", "comparison.png"  # Of several runs.
_SIGN = "Written by rllib-calql from what the trials have logged."  # In every page.
# What only the run itself knows, and what it has used of its budget.
_OF_THE_RUN = re.compile(r"<p>Budget: .*?</p>(?:\n<table>.*?</table>)?|<h2>Settings</h2>.*?</table>", re.DOTALL)
_QUANTITIES = (
    ("success_rate", "success"),
    ("normalized_score", "score"),
    ("episode_return", "return"),
    ("training_return", "training return"),
)
_MAX_SHOWN = 400  # Characters of a setting.
_VALUES_BY_DATA = (
    ("value_by_data", "value by data"),
    ("value_low", "value by data, low"),
    ("value_high", "value by data, high"),
)


def named_trials(runs: Sequence[RunRecord]) -> dict[str, TrialRecord]:
    """All trials by a name that tells them apart: the run's where it has one trial, else both."""
    names = [run.name for run in runs]
    found: dict[str, TrialRecord] = {}
    for run in runs:
        called = run.name if names.count(run.name) == 1 else run.path
        for trial in run.trials:
            name = called if len(run.trials) == 1 else (trial.name if len(runs) == 1 else f"{called}: {trial.name}")
            found[name if name not in found else f"{name} ({len(found) + 1})"] = trial
    return found


def rows(trials: Mapping[str, TrialRecord]) -> list[dict[str, Any]]:
    """What the table says of each trial; None stands for what is not known."""
    return [
        {
            "run": name,
            "status": trial.status,
            **{
                f"{which} {label}": value
                for quantity, label in _QUANTITIES
                for which, value in (
                    ("final", next(iter(reversed(trial.known(quantity))), None)),
                    ("best", max(trial.known(quantity), default=None)),
                )
            },
            "final held-out TD loss": next(iter(reversed(trial.known("held_out_td_loss"))), None),
            "best held-out TD loss": min(trial.known("held_out_td_loss"), default=None),
            **{
                f"final {label}": next(iter(reversed(trial.known(quantity))), None)
                for quantity, label in _VALUES_BY_DATA
            },
            "dip": trial.dip,
            "regret": trial.regret,
            "data return": trial.data_return,
            "regime": trial.regime,
            "offline updates": trial.points[-1].num_offline_updates if trial.points else 0,
            "env steps": trial.points[-1].num_env_steps if trial.points else 0,
            "time s": trial.points[-1].time_s if trial.points else 0.0,
        }
        for name, trial in trials.items()
    ]


def as_json(trials: Mapping[str, TrialRecord]) -> str:
    """The table for programs."""
    return json.dumps(rows(trials), indent=1)


def cells(trials: Mapping[str, TrialRecord]) -> tuple[list[str], list[list[str]]]:
    """The table for people: headings and rows, without columns that nobody knows."""
    table = rows(trials)
    is_evaluated = any(row["final return"] is not None for row in table)
    names = [
        name
        for name in (table[0] if table else {})
        if any(row[name] is not None for row in table) and not (is_evaluated and "training" in name)
    ]
    return ["time" if name == "time s" else name for name in names], [
        [_shown(name, row[name]) for name in names] for row in table
    ]


def as_text(trials: Mapping[str, TrialRecord]) -> str:
    """The table for terminals. With one trial it stands upright."""
    headings, table = cells(trials)
    if len(table) == 1:
        width = max(map(len, headings))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in zip(headings, table[0], strict=True))
    widths = [max(map(len, column)) for column in zip(headings, *table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [headings, *table]
    )


def page(
    title: str,
    trials: Mapping[str, TrialRecord],
    picture: bytes | None,
    *,
    settings: Mapping[str, str] | None = None,
    stop: Mapping[str, float] | None = None,
    former: str = "",
) -> str:
    """The page on a run, or on several.

    Args:
        title: Its heading.
        trials: By name.
        picture: PNG; None without Matplotlib.
        settings: What the user has set, as text; None if that is not known.
        stop: The budget; None if that is not known.
        former: A page of the same run, made by the run itself: its budget and settings are taken over.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{_SIGN}</p>"]
    if stop is not None:
        limits = "; ".join(f"{metric}: {limit:,.10g}" for metric, limit in stop.items())
        parts.append(f"<p>Budget: {html.escape(limits) or 'none in <code>stop</code>'}.</p>")
        used = [
            [name, text]
            for name, trial in trials.items()
            if (text := format_budget(trial.last_result, limits_of(stop, trial.settings))) is not None
        ]
        if used:
            parts.append(pages.table(("trial", "used"), used))
    parts.append("<h2>Trials</h2>" + pages.table(*cells(trials)))
    if picture is not None:
        parts.append("<h2>Curves</h2>" + pages.image("Curves", picture))
    if settings is not None:
        parts.append("<h2>Settings</h2><p>What the experiment sets; all others have their defaults.</p>")
        parts.append(pages.table(("setting", "value"), [[k, v[:_MAX_SHOWN]] for k, v in sorted(settings.items())]))
    parts += _OF_THE_RUN.findall(former)
    differing = _differing(trials)
    if differing:
        parts.append("<h2>Settings that differ</h2>")
        table = [[setting, *values] for setting, values in differing.items()]
        parts.append(pages.table(("setting", *trials), table))
    return pages.page(title, parts)


def draw(trials: Mapping[str, TrialRecord], title: str) -> bytes:
    """The picture, see `plots.draw`."""
    return plots.draw(trials, title)


def is_own_page(content: str) -> bool:
    """Whether this module has written a page."""
    return _SIGN in content


def _differing(trials: Mapping[str, TrialRecord]) -> dict[str, list[str]]:
    """Settings that are not the same in all trials, by value."""
    if len(trials) < 2:
        return {}
    names = sorted({name for trial in trials.values() for name in trial.settings})
    found = {}
    for name in names:
        values = [json.dumps(trial.settings.get(name), default=str) for trial in trials.values()]
        if len(set(values)) > 1:
            found[name] = [value[:_MAX_SHOWN] for value in values]
    return found


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name == "time s":
        return format_duration(value)
    if name.endswith("loss"):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
