"""What is told of a trial from its results: a line of progress, and a summary at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rllib_calql.common import metrics as keys
from rllib_calql.progress.advice import advice_of
from rllib_calql.progress.budget import format_duration

STARTING = "starting"  # The phase of a trial without a result.
_RUNNERS = "env_runners"
_RETURN = "episode_return_mean"
_ENV_STEPS = "num_env_steps_sampled_lifetime"
_ITERATIONS = "training_iteration"


@dataclass(frozen=True)
class Totals:
    """Where a trial ends, as far as it is known.

    Attributes:
        offline_updates: Gradient updates before the switch.
        stop: Metric -> value at which the trial ends.
    """

    offline_updates: int | None = None
    stop: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ValueByData:
    """The value of fitted Q evaluation with its 95 % interval, and how many findings make it doubtful."""

    mean: float
    low: float
    high: float
    num_warnings: int

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> ValueByData | None:
        """The one in a result; None if there is none."""
        fitted = (result.get("evaluation") or {}).get(keys.FQE)
        mean, low, high = (_number(fitted, name) for name in (keys.VALUE, keys.VALUE_LOW, keys.VALUE_HIGH))
        if mean is None or low is None or high is None:
            return None
        return cls(mean, low, high, len(str((fitted or {}).get(keys.FQE_WARNINGS, "")).splitlines()))

    def __str__(self) -> str:
        """For people."""
        doubts = "" if not self.num_warnings else f", {self.num_warnings} warning{'s' * (self.num_warnings > 1)}"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]{doubts}"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; None stands for what the environment or the data do not tell."""

    episode_return: float | None = None
    success_rate: float | None = None
    normalized_score: float | None = None
    held_out_td_loss: float | None = None
    value_by_data: ValueByData | None = None


@dataclass(frozen=True)
class TrialProgress:
    """What is known of one trial after some of its results.

    Attributes:
        label: The trial's name.
        phase: "offline", "online", or "training" for algorithms without phases.
        done: Updates, env steps or iterations so far in this phase.
        total: The same at the end of the phase, if known.
        unit: What `done` counts.
        per_s: `done` per second since the phase began or since the run was resumed in it.
        last: Last evaluation.
        best: Best evaluation return, success rate, normalised score and held-out TD loss so far, each on its own.
        training_return: Mean return of recent training episodes.
        dip: Worst evaluation since the switch minus the evaluation at the switch.
        overfitting: That the critics overfit, as a sentence; None if they do not.
        advice: What policy and data at the switch speak for, as a sentence.
        wall_s: Seconds of training.
        phase_start: `done` and `wall_s` from which `per_s` is measured.
        activity: What it is doing, for people; empty if that is not known.
    """

    label: str
    phase: str = STARTING
    done: int = 0
    total: int | None = None
    unit: str = ""
    per_s: float | None = None
    last: Evaluation = Evaluation()
    best: Evaluation = Evaluation()
    training_return: float | None = None
    dip: float | None = None
    overfitting: str | None = None
    advice: str | None = None
    wall_s: float = 0.0
    phase_start: tuple[int, float] = (0, 0.0)
    activity: str = ""


def observe(progress: TrialProgress, result: Mapping[str, Any], totals: Totals) -> TrialProgress:
    """Progress after one more result."""
    phase, done, total, unit = _position(result, totals)
    wall_s = float(result.get("time_total_s", 0.0))
    start = progress.phase_start
    if phase != progress.phase:
        # A run resumed in the middle of a phase is measured from its first result on.
        is_begin = progress.phase != STARTING or result.get(_ITERATIONS, 1) == 1
        start = (0, progress.wall_s) if is_begin else (done, wall_s)
    elapsed_s = wall_s - start[1]
    last = _evaluation(result, progress.last)
    return replace(
        progress,
        phase=phase,
        done=done,
        total=total,
        unit=unit,
        per_s=(done - start[0]) / elapsed_s if elapsed_s > 0 and done > start[0] else None,
        last=last,
        best=Evaluation(
            episode_return=_larger(progress.best.episode_return, last.episode_return),
            success_rate=_larger(progress.best.success_rate, last.success_rate),
            normalized_score=_larger(progress.best.normalized_score, last.normalized_score),
            held_out_td_loss=_smaller(progress.best.held_out_td_loss, last.held_out_td_loss),
        ),
        training_return=_number(result.get(_RUNNERS), _RETURN),
        dip=_first(_number(result.get(keys.FINE_TUNING), keys.DIP), progress.dip),
        overfitting=result.get(keys.OVERFITTING),
        advice=advice_of(result) or progress.advice,
        wall_s=wall_s,
        phase_start=start,
        activity="",
    )


def overlaid(progress: TrialProgress, counters: Mapping[str, int], totals: Totals) -> TrialProgress:
    """Progress inside an iteration.

    Args:
        progress: After the last result.
        counters: Metric of a result -> what the trial has counted by now, perhaps in the phase before.
        totals: Where the trial ends.
    """
    order = (STARTING, keys.OFFLINE, keys.ONLINE)
    # The later phase first, since what was counted before it stays.
    metrics = {keys.ONLINE: keys.NUM_ONLINE_ENV_STEPS_LIFETIME, keys.OFFLINE: keys.NUM_OFFLINE_UPDATES_LIFETIME}
    for phase, metric in metrics.items():
        if metric in counters and order.index(phase) >= order.index(progress.phase):
            _, done, total, unit = _position({keys.PHASE: phase, metric: counters[metric]}, totals)
            if phase == progress.phase:
                return replace(progress, done=max(done, progress.done))
            return replace(progress, phase=phase, done=done, total=total, unit=unit, per_s=None)
    return progress


def format_line(progress: TrialProgress) -> str:
    """One line, for example `CalQL_a  offline  3,000/5,000 updates  212/s  ETA 0:09  return 31.20  success 0.62`."""
    parts = [progress.label, progress.phase]
    if progress.unit:
        total = f"/{progress.total:,}" if progress.total is not None else ""
        parts.append(f"{progress.done:,}{total} {progress.unit}")
    if progress.per_s:
        parts.append(f"{progress.per_s:.0f}/s" if progress.per_s >= 10 else f"{progress.per_s:.2g}/s")
        if progress.total is not None:
            parts.append(f"ETA {format_duration(max(0, progress.total - progress.done) / progress.per_s)}")
    if progress.last.episode_return is not None:
        parts.append(f"return {progress.last.episode_return:.2f}")
    elif progress.training_return is not None:
        parts.append(f"training return {progress.training_return:.2f}")
    if progress.last.success_rate is not None:
        parts.append(f"success {progress.last.success_rate:.2f}")
    if progress.last.held_out_td_loss is not None:
        parts.append(f"held-out TD loss {progress.last.held_out_td_loss:.4g}")
    if progress.last.value_by_data is not None:
        parts.append(f"value by data {progress.last.value_by_data}")
    if progress.activity:
        parts.append(progress.activity)
    return "  ".join(parts)


def format_summary(
    progress: TrialProgress,
    status: str,
    checkpoint: str | None,
    *,
    best_checkpoint: str | None = None,
    budget: str | None = None,
    already_ended: str | None = None,
) -> str:
    """The lines printed for a trial at the end of the run.

    Args:
        progress: What is known of the trial.
        status: "ended" or "failed".
        checkpoint: Where its last one is.
        best_checkpoint: What is to be said of its best one, if there is one.
        budget: What it has used of its budget, if it has one.
        already_ended: Why it had ended before the run was resumed, so that nothing was done; None if it has run.
    """
    if already_ended is None:
        lines = [f"{progress.label}: {status} after {format_duration(progress.wall_s)}"]
    else:
        lines = [
            f"{progress.label}: had already {status} before, after {format_duration(progress.wall_s)}; nothing was run",
            f"  {'because':<18} {already_ended}",
            f"  {'to go on':<18} raise what it ended at in the experiment's file, then `--resume` again",
        ]
    if budget is not None:
        lines.append(f"  {'budget':<18} {budget}")
    last, best = progress.last, progress.best
    rows: list[tuple[str, float | None, float | None]] = [
        ("evaluation return", last.episode_return, best.episode_return),
        ("success rate", last.success_rate, best.success_rate),
        ("normalised score", last.normalized_score, best.normalized_score),
    ]
    lines += [f"  {name:<18} final {final:.2f}, best {top:.2f}" for name, final, top in rows if final is not None]
    if last.episode_return is None and progress.training_return is not None:
        lines.append(f"  {'training return':<18} final {progress.training_return:.2f}")
    if last.held_out_td_loss is not None and best.held_out_td_loss is not None:
        lines.append(f"  {'held-out TD loss':<18} final {last.held_out_td_loss:.4g}, best {best.held_out_td_loss:.4g}")
    if last.value_by_data is not None:
        lines.append(f"  {'value by data':<18} final {last.value_by_data}")
    if progress.overfitting is not None:
        lines.append(f"  {'overfitting':<18} {progress.overfitting}")
    if progress.dip is not None:
        lines.append(f"  {'dip at the switch':<18} {progress.dip:.2f}")
    if progress.advice is not None:
        lines.append(f"  {'regime':<18} {progress.advice}")
    lines.append(f"  {'checkpoint':<18} {checkpoint or 'none'}")
    if best_checkpoint is not None:
        lines.append(f"  {'best checkpoint':<18} {best_checkpoint}")
    return "\n".join(lines)


def _position(result: Mapping[str, Any], totals: Totals) -> tuple[str, int, int | None, str]:
    phase = result.get(keys.PHASE)
    if phase == keys.OFFLINE:
        return phase, int(result.get(keys.NUM_OFFLINE_UPDATES_LIFETIME, 0)), totals.offline_updates, "updates"
    if phase == keys.ONLINE:
        metric, unit = keys.NUM_ONLINE_ENV_STEPS_LIFETIME, "env steps"
    elif _ITERATIONS in totals.stop or _ENV_STEPS not in result:
        phase, metric, unit = "training", _ITERATIONS, "iterations"
    else:
        phase, metric, unit = "training", _ENV_STEPS, "env steps"
    total = totals.stop.get(metric)
    return phase, int(result.get(metric, 0)), None if total is None else int(total), unit


def _evaluation(result: Mapping[str, Any], previous: Evaluation) -> Evaluation:
    evaluation = result.get("evaluation") or {}
    runners = evaluation.get(_RUNNERS)
    episode_return = _number(runners, _RETURN)
    td_loss = _first(_number(evaluation.get(keys.HELD_OUT), keys.TD_LOSS), previous.held_out_td_loss)
    value = ValueByData.of(result) or previous.value_by_data
    if episode_return is None:
        return replace(previous, held_out_td_loss=td_loss, value_by_data=value)
    return Evaluation(
        held_out_td_loss=td_loss,
        value_by_data=value,
        episode_return=episode_return,
        success_rate=_number(runners, keys.SUCCESS_RATE),
        normalized_score=_number(runners, keys.NORMALIZED_SCORE),
    )


def _number(values: Mapping[str, Any] | None, key: str) -> float | None:
    value = (values or {}).get(key)
    return None if value is None or math.isnan(value) else float(value)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _smaller(a: float | None, b: float | None) -> float | None:
    return min((value for value in (a, b) if value is not None), default=None)


def _larger(a: float | None, b: float | None) -> float | None:
    return max((value for value in (a, b) if value is not None), default=None)
