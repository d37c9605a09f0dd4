"""The report on a study: tables and plots in one HTML page that needs nothing beside it."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rllib_calql.progress import pages
from rllib_calql.study import plots
from rllib_calql.study.evaluations import (
    EVALUATIONS_FILE,
    PICTURE_FILES,
    REPORT_FILE,
    STUDY_FILE,
    SUMMARY_FILE,
    Evaluation,
    read_results,
    write_whole,
)
from rllib_calql.study.statistics import CONFIDENCE, Fate, Interval, fate_of, interquartile_mean, interval, mean

_METHOD = (
    f"In brackets: {CONFIDENCE:.0%} percentile bootstrap over seeds, stratified by task (Agarwal et al. 2021). IQM: "
    "interquartile mean. Score: success rate, or the normalised score / 100 where the environment reports no success."
)  # In every page, so that one can be told from another program's.
_MARKDOWN_SIGNS = re.compile(r"([\\`*_{}\[\]#|~$])")
_PICTURES = {
    "learning_curves.png": (
        "Learning curves",
        "Score of the greedy policy, mean over seeds, with the interval of that mean; linear between evaluations.",
    ),
    "regret.png": ("Cumulative regret online", "1 - mean score over the env steps since the switch: less is better."),
    "dip.png": ("Dip at the switch", "Score at the switch minus the lowest score after it: less is better."),
    "calibration_gap.png": (
        "Calibration gap",
        "Mean of Q(s, a) minus the reference value on offline rows. Far below zero, values are too low to compare with "
        "real returns.",
    ),
    "bound_rate.png": (
        "Calibrated share",
        "Share of the policy's sampled actions whose Q lies below the reference value: for these calibration stops the "
        "push-down (where it is on).",
    ),
}


def group(evaluations: Iterable[Evaluation]) -> dict[str, dict[str, list[list[Evaluation]]]]:
    """Task -> algorithm -> trials, each in order of time; tasks and algorithms in order of appearance."""
    found: dict[str, dict[str, dict[int, list[Evaluation]]]] = {}
    for one in evaluations:
        found.setdefault(one.task, {}).setdefault(one.algorithm, {}).setdefault(one.seed, []).append(one)
    return {
        task: {
            algorithm: [
                sorted(its[seed], key=lambda one: (one.num_online_env_steps, one.num_offline_updates))
                for seed in sorted(its)
            ]
            for algorithm, its in algorithms.items()
        }
        for task, algorithms in found.items()
    }


def write_report(results: Sequence[Path], folder: Path) -> Path:
    """Writes the page, and beside it its plots as PNG files and its tables as Markdown.

    Args:
        results: Folders with the results of one study each; their tasks are joined.
        folder: Where to; made if it does not exist.

    Returns:
        The page.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If a folder holds no results.
        FileExistsError: If files would be replaced that are no report's.
    """
    from rllib_calql.datasets.report.plots import require_matplotlib

    require_matplotlib()
    read = [read_results(path) for path in results]
    trials = group(one for evaluations, _ in read for one in evaluations)
    _refuse_foreign(folder)
    if not trials:
        raise ValueError(f"No trial in {', '.join(map(str, results))} has finished yet.")
    fates = {
        task: {algorithm: [fate_of(trial) for trial in its] for algorithm, its in algorithms.items()}
        for task, algorithms in trials.items()
    }
    pictures = {
        "learning_curves.png": plots.curves(trials, "score", "score"),
        "calibration_gap.png": plots.curves(trials, "calibration_gap", "Q - reference value"),
        "bound_rate.png": plots.curves(trials, "bound_rate", "share of actions"),
    }
    for name, attribute, label in (
        ("regret.png", "regret", "cumulative regret"),
        ("dip.png", "dip", "dip of the score"),
    ):
        intervals = _intervals(fates, attribute)
        if intervals:
            pictures[name] = plots.forest(intervals, label)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        write_whole(folder / name, content)
    tables = {task: summary_rows(its) for task, its in fates.items()}
    write_whole(folder / SUMMARY_FILE, _markdown(tables).encode())
    page = folder / REPORT_FILE
    write_whole(page, _page(trials, fates, tables, pictures, [study for _, study in read]).encode())
    return page


def _refuse_foreign(folder: Path) -> None:
    """A folder of results is a study's, and so are the files of a report beside a page of ours."""
    page = folder / REPORT_FILE
    is_ours = (folder / EVALUATIONS_FILE).is_file() and (folder / STUDY_FILE).is_file()
    if page.is_file() and not is_ours:
        is_ours = _METHOD in page.read_text(encoding="utf-8", errors="replace")
    for name in [] if is_ours else (REPORT_FILE, SUMMARY_FILE, *PICTURE_FILES):
        if os.path.lexists(folder / name):
            raise FileExistsError(
                f"'{folder / name}' is of no report of a study; move it away, or give another `--output`."
            )


def _intervals(fates: Mapping[str, Mapping[str, list[Fate]]], attribute: str) -> dict[str, dict[str, Interval]]:
    """Task -> algorithm -> mean over seeds of a quantity that all trials of both have."""
    found: dict[str, dict[str, Interval]] = {}
    for task, algorithms in fates.items():
        for algorithm, its in algorithms.items():
            values = [getattr(fate, attribute) for fate in its]
            if all(value is not None for value in values):
                found.setdefault(task, {})[algorithm] = interval([values], mean)
    return found


def summary_rows(fates: Mapping[str, list[Fate]]) -> list[list[str]]:
    """A line per algorithm of one task, as in the page's table."""
    rows = []
    for algorithm, its in fates.items():
        recovered = [fate.recovered_after for fate in its if fate.recovered_after is not None]
        never = sum(math.isinf(after) for after in recovered)
        steps = "-"
        if recovered:
            finite = [after for after in recovered if math.isfinite(after)]
            steps = f"{sum(finite) / len(finite):,.0f}" if finite else "-"
            steps += f" ({never} of {len(recovered)} never)" if never else ""
        rows.append(
            [
                algorithm,
                str(len(its)),
                _shown([[fate.at_switch for fate in its]]),
                _shown([[fate.final for fate in its]]),
                _shown([[fate.final for fate in its]], mean),
                _shown([[fate.regret for fate in its]], mean),
                _shown([[fate.dip for fate in its]], mean),
                steps,
            ]
        )
    return rows


_HEADINGS = (
    "algorithm",
    "seeds",
    "score at the switch (IQM)",
    "final score (IQM)",
    "final score (mean)",
    "regret (mean)",
    "dip (mean)",
    "env steps to recover (mean)",
)


def _shown(strata: Sequence[Sequence[float | None]], statistic: Any = interquartile_mean) -> str:
    """A statistic over the seeds of one task or of several, and its bounds; a dash unless all trials have a value."""
    known = [[value for value in values if value is not None] for values in strata]
    if not all(known) or any(len(all_) > len(some) for all_, some in zip(strata, known, strict=True)):
        return "-"
    one = interval(known, statistic)
    bounds = "" if math.isnan(one.low) else f" [{one.low:.2f}, {one.high:.2f}]"
    return f"{one.value:.2f}{bounds}"


def _markdown(tables: Mapping[str, Sequence[Sequence[str]]]) -> str:
    parts = []
    for task, table in tables.items():
        named = [[_as_markdown(row[0]), *row[1:]] for row in table]
        rows = [_HEADINGS, ["---"] * len(_HEADINGS), *named]
        parts.append("\n".join([f"### {_as_markdown(task)}", "", *("| " + " | ".join(row) + " |" for row in rows)]))
    return "\n\n".join(parts) + "\n"


def _as_markdown(name: str) -> str:
    """A name on one line, whose signs mean nothing to Markdown or HTML."""
    return html.escape(_MARKDOWN_SIGNS.sub(r"\\\1", " ".join(name.split())), quote=False)


def _over_all_tasks(fates: Mapping[str, Mapping[str, list[Fate]]]) -> str:
    """Aggregate over tasks of the algorithms that ran on all of them, the seeds drawn anew task by task."""
    names = [name for name in next(iter(fates.values())) if all(name in its for its in fates.values())]
    rows = []
    for name in names:
        strata = [its[name] for its in fates.values()]
        final = _shown([[fate.final for fate in its] for its in strata])
        rows.append([name, final, _shown([[fate.regret for fate in its] for its in strata], mean)])
    return pages.table(("algorithm", "final score (IQM)", "regret (mean)"), rows)


def _page(
    trials: plots.Trials,
    fates: Mapping[str, Mapping[str, list[Fate]]],
    tables: Mapping[str, Sequence[Sequence[str]]],
    pictures: Mapping[str, bytes],
    studies: Sequence[Mapping[str, Any]],
) -> str:
    names = ", ".join(str(study["name"]) for study in studies)
    parts = [
        f"<h1>{html.escape(names)}</h1>",
        f"<p>{_METHOD}</p>",
    ]
    for task, table in tables.items():
        episodes = {one.num_episodes for its in trials[task].values() for trial in its for one in trial}
        parts.append(f"<h2>{html.escape(task)}</h2>")
        parts.append(f"<p>{' or '.join(map(str, sorted(episodes)))} episodes per evaluation.</p>")
        parts.append(pages.table(_HEADINGS, table))
    if len(fates) > 1:
        parts.append("<h2>Over all tasks</h2>" + _over_all_tasks(fates))
    for name, (title, text) in _PICTURES.items():
        if name in pictures:
            image = pages.image(title, pictures[name])
            parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{image}")
    parts.append("<h2>Settings and versions</h2>")
    parts += [f"<pre>{html.escape(json.dumps(study, indent=1))}</pre>" for study in studies]
    return pages.page(names, parts)
