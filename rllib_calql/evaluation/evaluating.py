"""What an evaluation by episodes gave: made complete, and asked for errors where it gave nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EPISODE_RETURN_MAX,
    EPISODE_RETURN_MEAN,
    EPISODE_RETURN_MIN,
)

from rllib_calql.collection.callbacks import EPISODES, RETURN_SQUARE_MEAN
from rllib_calql.collection.requests import evaluate_or_tell
from rllib_calql.collection.success_key import SuccessKeyWatch, infos_seen_by
from rllib_calql.common import metrics as keys
from rllib_calql.evaluation.history import EvaluationHistory
from rllib_calql.system import activity

_SECONDS_FOR_RESTART = 60.0  # Of the env runners of evaluations.


def evaluating_group(algorithm: Any) -> Any:
    """The env runners that make the episodes of an evaluation; None without an environment for it.

    Raises:
        RuntimeError: If only clients have environments, and no episodes are held out.
    """
    if not algorithm.config.has_clients:
        return algorithm.eval_env_runner_group or algorithm.env_runner_group
    if algorithm.eval_env_runner_group is None and not algorithm.config.validation_fraction:
        raise RuntimeError(
            "Clients (`external_port`) are not evaluated. Set `.environment(env=...)` and `evaluation_interval` for "
            "evaluations in an environment here, or hold episodes out by `.offline_data(validation_fraction=0.1)`."
        )
    return algorithm.eval_env_runner_group


def say_evaluating(config: Any, *, is_remote: bool) -> None:
    """Says what an evaluation does; episodes of an env runner in this process are counted as they end.

    Args:
        config: The algorithm's.
        is_remote: Whether other processes run the episodes.
    """
    duration, unit = config.evaluation_duration, config.evaluation_duration_unit
    if duration == "auto":
        activity.say("evaluating while training")
    elif is_remote or unit != EPISODES:
        activity.say(f"evaluating {duration:,} {unit}")
    else:
        activity.say(f"evaluating, episode {{done}} of {duration:,}", unit=EPISODES, done=1, total=duration)


def completed_evaluation(
    results: dict[str, Any], group: Any, history: EvaluationHistory, success_key: SuccessKeyWatch
) -> dict[str, Any]:
    """RLlib's results of an evaluation, with the normalised score where the data have reference scores.

    Args:
        results: What RLlib's `evaluate` returned.
        group: The env runners that made them.
        history: Knows the reference scores.
        success_key: Learns whether the episodes showed the key of their success.

    Raises:
        RuntimeError: If there are no results because the environment fails on remote env runners.
    """
    runner_results = results.get(ENV_RUNNER_RESULTS)
    if not runner_results and group.num_remote_env_runners():
        _check_evaluation_works(group)
    if not runner_results or EPISODE_RETURN_MEAN not in runner_results:
        return results
    runner_results = known_results(runner_results)
    if keys.SUCCESS_RATE not in runner_results and not success_key.is_over:
        success_key.include_seen(
            group.foreach_env_runner(
                infos_seen_by, local_env_runner=not group.num_remote_env_runners(), timeout_seconds=_SECONDS_FOR_RESTART
            )
        )
    score = history.normalized_score(runner_results[EPISODE_RETURN_MEAN])
    if score is not None:
        runner_results[keys.NORMALIZED_SCORE] = score
    return {**results, ENV_RUNNER_RESULTS: runner_results}


def known_results(runner_results: Mapping[str, Any]) -> dict[str, Any]:
    """With the standard deviation of the returns, and without a success rate that is unknown.

    If no episode said anything, RLlib reports NaN for that, if one did earlier.
    """
    known = dict(runner_results)
    rate = known.get(keys.SUCCESS_RATE)
    if isinstance(rate, float) and math.isnan(rate):
        del known[keys.SUCCESS_RATE]
    squares, mean = known.pop(RETURN_SQUARE_MEAN, None), known.get(EPISODE_RETURN_MEAN)
    if squares is not None and mean is not None and math.isfinite(squares):
        # The rounding of a mean would make up a spread.
        are_equal = known.get(EPISODE_RETURN_MIN) == known.get(EPISODE_RETURN_MAX)
        known[keys.EPISODE_RETURN_STD] = 0.0 if are_equal else math.sqrt(max(0.0, squares - mean * mean))
    return known


def _check_evaluation_works(group: Any) -> None:
    """Asks remote env runners without results for what they raise, which RLlib leaves in their logs.

    RLlib ends a runner that raises, and Ray starts it anew meanwhile. One that died for another reason is fine again.

    Raises:
        RuntimeError: With that.
    """
    deadline = time.monotonic() + _SECONDS_FOR_RESTART
    answers: list[Any] = []
    while not answers and (seconds_left := deadline - time.monotonic()) > 0:
        answers = group.foreach_env_runner(
            evaluate_or_tell, local_env_runner=False, healthy_only=False, timeout_seconds=seconds_left
        )
    for failure in answers:
        if failure is not None:
            raise RuntimeError(f"Evaluating failed, {failure.cause}")
