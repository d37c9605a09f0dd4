"""Runs one trial of a study, evaluates it by its schedule, and goes on where it was killed."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EPISODE_RETURN_MEAN, LEARNER_RESULTS

from rllib_calql.algorithm import CalQL
from rllib_calql.checkpoints.reading import damage_of
from rllib_calql.common import metrics as keys
from rllib_calql.study.evaluations import Evaluation, evaluation_of, read_json, write_json
from rllib_calql.study.plan import Trial
from rllib_calql.system.file_lock import held_lock

logger = logging.getLogger(__name__)

FINISHED_FILE = "evaluations.json"
_LOCK_FILE = ".rllib_calql_trial.lock"
_SECONDS_BETWEEN_CHECKPOINTS = 60.0


def finished_evaluations(folder: Path) -> tuple[str, list[Evaluation]] | None:
    """Fingerprint and evaluations of a finished trial, or None.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / FINISHED_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        fingerprint, rows = content["fingerprint"], [evaluation_of(row) for row in content["evaluations"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged, or not of a trial: {type(error).__name__}: {error}.") from error
    if not isinstance(fingerprint, str):
        raise ValueError(f"'{path}' is damaged, or not of a trial: its `fingerprint` is {fingerprint!r}.")
    return fingerprint, rows


def run_trial(
    trial: Trial,
    folder: Path,
    announce: Callable[[Evaluation], None],
    is_stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Trains and evaluates; the folder then holds `FINISHED_FILE`.

    Args:
        trial: What to run.
        folder: Of this trial. A checkpoint in it, of the same settings, is continued.
        announce: Called with each new evaluation.
        is_stopped: Asked again and again; True: the trial writes a checkpoint and returns.

    Returns:
        Whether it ran to its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A process of a command that was killed may go on for a moment.
    with held_lock(folder / _LOCK_FILE, wait=True):
        return not is_stopped() and _run(trial, folder, announce, is_stopped)


def _run(trial: Trial, folder: Path, announce: Callable[[Evaluation], None], is_stopped: Callable[[], bool]) -> bool:
    algo, rows, seconds_before = _restored(trial, folder) or (trial.config.build(), [], 0.0)
    begin = saved_at = time.monotonic()
    try:
        learner_results: Mapping[str, Any] = {}
        while True:
            if not rows or _is_due(algo, rows[-1], trial):
                seconds = seconds_before + time.monotonic() - begin
                rows.append(_evaluate(algo, trial, learner_results, seconds))
                announce(rows[-1])
                if time.monotonic() - saved_at > _SECONDS_BETWEEN_CHECKPOINTS:
                    _save(algo, rows, trial, folder)
                    saved_at = time.monotonic()
            if algo.phase == keys.ONLINE and algo.num_online_env_steps >= trial.schedule.num_env_steps:
                break
            if is_stopped():
                _save(algo, rows, trial, folder)
                return False
            result = algo.train()
            learner_results = result.get(LEARNER_RESULTS, {}).get("default_policy", learner_results)
    finally:
        algo.stop()
        with suppress(OSError):
            os.rmdir(algo.logdir)  # Ray's, in `~/ray_results`, and empty.
    _write_evaluations(rows, trial, folder)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return True


def _is_due(algo: CalQL, last: Evaluation, trial: Trial) -> bool:
    schedule = trial.schedule
    if algo.num_online_env_steps > last.num_online_env_steps:
        every = schedule.every_env_steps
        is_end = algo.num_online_env_steps >= schedule.num_env_steps
        return is_end or algo.num_online_env_steps // every > last.num_online_env_steps // every
    if algo.num_offline_updates > last.num_offline_updates:
        every = schedule.every_offline_updates
        is_switch = algo.phase == keys.ONLINE
        return is_switch or algo.num_offline_updates // every > last.num_offline_updates // every
    return False


def _evaluate(algo: CalQL, trial: Trial, learner_results: Mapping[str, Any], seconds: float) -> Evaluation:
    found = algo.evaluate()[ENV_RUNNER_RESULTS]
    num_critics = trial.config.num_critics

    def reported(*names: str) -> float | None:
        """Mean of what the learner reported under these names, None if it reported nothing of it."""
        values = [float(learner_results[name]) for name in names if name in learner_results]
        return sum(values) / len(values) if values else None

    def of_critics(*templates: str) -> float | None:
        return reported(*(template.format(c=c + 1) for template in templates for c in range(num_critics)))

    gap = reported(keys.CALIBRATION_GAP_OFFLINE)
    return Evaluation(
        task=trial.task,
        algorithm=trial.algorithm,
        seed=trial.seed,
        num_offline_updates=algo.num_offline_updates,
        num_online_updates=algo.num_online_updates,
        num_online_env_steps=algo.num_online_env_steps,
        num_episodes=trial.schedule.evaluation_episodes,
        return_mean=float(found[EPISODE_RETURN_MEAN]),
        success_rate=_optional(found.get(keys.SUCCESS_RATE)),
        normalized_score=_optional(found.get(keys.NORMALIZED_SCORE)),
        calibration_gap=reported(keys.CALIBRATION_GAP) if gap is None else gap,
        bound_rate=of_critics(keys.BOUND_RATE_CURRENT_OF_CRITIC, keys.BOUND_RATE_NEXT_OF_CRITIC),
        q_data=of_critics(keys.Q_DATA_OF_CRITIC),
        reference_value=reported(keys.REFERENCE_VALUE_MEAN),
        time_s=seconds,
    )


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _write_evaluations(rows: list[Evaluation], trial: Trial, folder: Path) -> None:
    """What `finished_evaluations` reads."""
    content = {"fingerprint": trial.fingerprint, "evaluations": [dataclasses.asdict(row) for row in rows]}
    write_json(folder / FINISHED_FILE, content)


def checkpoints(folder: Path) -> tuple[Path, Path]:
    """The trial's checkpoint, and the one that is being written."""
    return folder / "checkpoint", folder / "checkpoint.partial"


def _save(algo: CalQL, rows: list[Evaluation], trial: Trial, folder: Path) -> None:
    """Replaces the checkpoint. The evaluations are written last, so a folder that has them is whole."""
    final, partial = checkpoints(folder)
    shutil.rmtree(partial, ignore_errors=True)
    algo.save_to_path(str(partial))
    _write_evaluations(rows, trial, partial)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def _restored(trial: Trial, folder: Path) -> tuple[CalQL, list[Evaluation], float] | None:
    for checkpoint in checkpoints(folder):
        saved = finished_evaluations(checkpoint)
        if saved is not None and saved[0] == trial.fingerprint:
            if damage := damage_of(checkpoint):
                logger.warning("%s The trial '%s' does not go on from it.", damage, trial.name)
                continue
            return CalQL.from_checkpoint(checkpoint), saved[1], saved[1][-1].time_s
    return None
