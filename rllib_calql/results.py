"""What a result of `train()` says besides what RLlib puts into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EPISODE_RETURN_MEAN, EVALUATION_RESULTS, LEARNER_RESULTS
from ray.tune.result import DONE

from rllib_calql.common import metrics as keys
from rllib_calql.evaluation.evaluating import known_results
from rllib_calql.learning.diagnostics import without_what_is_not_evaluated

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig
    from rllib_calql.parts import Parts
    from rllib_calql.store.offline_data import CalQLOfflineData


def completed_result(
    results: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    parts: Parts,
    config: CalQLConfig,
    *,
    phase: str,
    is_done: bool,
    offline_data: CalQLOfflineData | None,
) -> dict[str, Any]:
    """RLlib's result, completed so that schedulers and loggers find the same keys in both phases.

    Args:
        results: RLlib's.
        evaluation: RLlib's results of an evaluation in this iteration, if there was one; the history takes it in.
        parts: The algorithm's.
        config: The algorithm's.
        phase: What this iteration's updates belong to.
        is_done: Whether there is nothing left to train; Tune then ends the trial.
        offline_data: Where the report on the data is; None without.
    """
    completed = {**results, keys.PHASE: phase, **parts.lifetime.counters()}
    if is_done:
        completed[DONE] = True
    completed[keys.Q_OUT_OF_RANGE] = parts.divergence.out_of_range
    if parts.divergence.warning is not None:
        completed[keys.Q_WARNING] = parts.divergence.warning
    if parts.held_out is not None and parts.held_out.overfitting is not None:
        completed[keys.OVERFITTING] = parts.held_out.overfitting
    if parts.success_key.warning is not None:
        completed[keys.SUCCESS_WARNING] = parts.success_key.warning
    if parts.pretrained.remark is not None:
        completed[keys.PRETRAINED_WARNING] = parts.pretrained.remark
    completed[keys.COLLECTION] = {
        **results.get(keys.COLLECTION, {}),
        keys.NUM_ENV_STEPS_BEHIND: parts.lifetime.num_env_steps_behind,
        **parts.keeper.results(),
        **parts.collection.results(),
    }
    completed[keys.STORE] = {
        keys.NUM_OFFLINE_TRANSITIONS: parts.store.num_offline,
        keys.NUM_ONLINE_TRANSITIONS: parts.store.num_online,
    }
    if parts.store.split is not None:
        completed[keys.STORE][keys.NUM_HELD_OUT_TRANSITIONS] = parts.store.split.num_held_out_rows
    if offline_data is not None and offline_data.report is not None:
        completed[keys.OFFLINE_DATA] = offline_data.report.headline
        completed[keys.STORE][keys.OFFLINE_RETURN_MEAN] = offline_data.report.return_distribution.mean
        if offline_data.warnings:
            completed[keys.OFFLINE_DATA_WARNINGS] = "\n".join(offline_data.warnings)
    if (speed := parts.updater.take_speed()) is not None:
        completed[keys.UPDATES_PER_S] = speed
    learner_results = results.get(LEARNER_RESULTS) or {}
    if DEFAULT_MODULE_ID in learner_results:
        reported = without_what_is_not_evaluated(
            learner_results[DEFAULT_MODULE_ID], config, online=phase == keys.ONLINE
        )
        completed[LEARNER_RESULTS] = {**learner_results, DEFAULT_MODULE_ID: reported}
    runner_results = known_results(results.get(ENV_RUNNER_RESULTS) or {})
    # Tune's schedulers stop a trial whose result lacks their metric.
    runner_results.setdefault(EPISODE_RETURN_MEAN, float("nan"))
    completed[ENV_RUNNER_RESULTS] = runner_results
    repeated = results.get(EVALUATION_RESULTS)  # RLlib's own version of the last evaluation, if there was none now.
    if isinstance(repeated, Mapping) and isinstance(repeated.get(ENV_RUNNER_RESULTS), Mapping):
        completed[EVALUATION_RESULTS] = {**repeated, ENV_RUNNER_RESULTS: known_results(repeated[ENV_RUNNER_RESULTS])}
    for name, judge in ((keys.FQE, parts.offline_evaluation), (keys.HELD_OUT, parts.held_out)):
        if judge is not None and judge.latest is not None:  # Repeated as well, for schedulers.
            last = completed.get(EVALUATION_RESULTS) or {}
            completed[EVALUATION_RESULTS] = {**last, name: dict(judge.latest)}
    evaluated = (evaluation or {}).get(EVALUATION_RESULTS, {}).get(ENV_RUNNER_RESULTS)
    if evaluated and EPISODE_RETURN_MEAN in evaluated:
        parts.history.add(evaluated, online=phase == keys.ONLINE)
    fine_tuning: dict[str, Any] = dict(parts.history.summary())
    if parts.lifetime.phase == keys.ONLINE:
        fine_tuning |= parts.history.regime()
    if fine_tuning:
        completed[keys.FINE_TUNING] = fine_tuning
    return completed
