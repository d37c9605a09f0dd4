"""The safety net of a run: checkpoints that nobody asked for, so that a sudden end costs little, and which are kept.

A checkpoint is written at the switch from offline to online, before `every_s` seconds of training could be lost, after
the evaluation that was the best so far, and at the end.
"""

from __future__ import annotations

import logging
import math
import posixpath
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray import tune
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.tune.experiment import Trial
from ray.tune.result import SHOULD_CHECKPOINT, TRAINING_ITERATION
from ray.tune.schedulers import TrialScheduler

from rllib_calql.common import metrics as keys
from rllib_calql.common.evaluations import mark_of_evaluation
from rllib_calql.experiments.best_checkpoint import (
    Best,
    BestMetric,
    best_of,
    parse_keep_best,
    read_best,
    write_best,
)
from rllib_calql.experiments.reading.errors import ExperimentError, refuse_unknown
from rllib_calql.experiments.run_state import remove_checkpoint

logger = logging.getLogger(__name__)

SAFETY_KEYS = ("checkpoint_config", "checkpoint_every_s", "keep_best")  # Of an experiment file.
_CHECKPOINT_KEYS = ("checkpoint_frequency", "checkpoint_at_end", "num_to_keep")
_EVERY_S = 600.0
_FIRST_S = 30.0  # Of training, by which the first checkpoint is written; a run dies most often when it is new.
_NUM_NEWEST = 2  # One may turn out to be damaged.
_NUM_RECENT = 20  # Iterations by which the length of the next one is judged.
_MARGIN = 1.1  # By which the next iteration may be longer than those.


@dataclass(frozen=True)
class SafetyNet:
    """Which checkpoints a run writes, and which of them it keeps.

    Attributes:
        every_s: Seconds of training that a sudden end may cost; infinite for no such checkpoints and none at the
            switch. None for ten minutes, or for infinity where `checkpoint_frequency` is 0, "none in between".
        keep_best: By what the best checkpoint is chosen; None to keep none.
        frequency: Iterations between checkpoints that the file asks for; 0 for none, None if it says nothing.
        at_end: Whether there is one at the end.
        num_to_keep: Newest checkpoints that are kept, and the best. None for the newest two, the switch, the best, and
            those that `frequency` asks for.
    """

    every_s: float | None = None
    keep_best: BestMetric | None = field(default_factory=BestMetric)
    frequency: int | None = None
    at_end: bool = True
    num_to_keep: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], every_s: float | None, keep_best: BestMetric | None) -> SafetyNet:
        """The net of an experiment with these settings; `config` is its `checkpoint_config`."""
        return cls(
            every_s=every_s,
            keep_best=keep_best,
            frequency=config.get("checkpoint_frequency"),
            at_end=config.get("checkpoint_at_end") is not False,
            num_to_keep=config.get("num_to_keep"),
        )

    @property
    def seconds(self) -> float:
        """`every_s` with its default."""
        if self.every_s is None:
            return math.inf if self.frequency == 0 else _EVERY_S
        return self.every_s

    @property
    def first_s(self) -> float:
        """Seconds of training by which there is a first checkpoint."""
        return min(_FIRST_S, self.seconds) if math.isfinite(self.seconds) else math.inf

    def tune_config(self) -> tune.CheckpointConfig:
        """What Tune does of it. It knows no checkpoint that outlives newer ones, so removing them is not up to Tune."""
        return tune.CheckpointConfig(checkpoint_frequency=self.frequency or 0, checkpoint_at_end=self.at_end)

    def kept(self, results: list[tuple[str, Mapping[str, Any]]], best: str | None, offline_updates: int) -> set[str]:
        """Which checkpoints of a trial are kept.

        Args:
            results: Each checkpoint and the result it belongs to, the newest last.
            best: The best of them.
            offline_updates: Updates before the switch.
        """
        names = [name for name, _ in results]
        kept = set(names[-(self.num_to_keep or _NUM_NEWEST) :]) | ({best} if best is not None else set())
        if self.num_to_keep is not None:
            return kept
        for name, result in results:
            is_asked_for = self.frequency and result.get(TRAINING_ITERATION, 0) % self.frequency == 0
            if is_asked_for or is_switch(result, offline_updates):
                kept.add(name)
        return kept


def safety_settings(entry: Mapping[str, Any], config: AlgorithmConfig, name: str) -> dict[str, Any]:
    """`checkpoint_config`, `checkpoint_every_s` and `keep_best` of an experiment, checked.

    Args:
        entry: An experiment of a YAML file, or the variables of a Python file.
        config: The experiment's config.
        name: The experiment's name.

    Raises:
        ExperimentError: Naming the key, and what to do.
    """
    given = entry.get("checkpoint_config")
    given = {} if given is None else given
    where = f"`checkpoint_config` of experiment '{name}'"
    refuse_unknown(given, _CHECKPOINT_KEYS, where)
    _check_whole(given.get("checkpoint_frequency"), 0, f"`checkpoint_frequency` in {where}", "0 for none in between")
    _check_whole(given.get("num_to_keep"), 1, f"`num_to_keep` in {where}", "or null for the default")
    at_end = given.get("checkpoint_at_end")
    if at_end is not None and not isinstance(at_end, bool):
        raise ExperimentError(f"`checkpoint_at_end` in {where} must be true or false, got {at_end!r}.")
    return {
        "checkpoint_config": dict(given),
        "checkpoint_every_s": _parse_seconds(entry.get("checkpoint_every_s"), name),
        "keep_best": parse_keep_best(entry.get("keep_best"), config, name),
    }


def _check_whole(value: Any, least: int, where: str, special: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ExperimentError(f"{where} must be a whole number >= {least} ({special}), got {value!r}.")


def _parse_seconds(value: Any, name: str) -> float | None:
    if value is None or value is False:
        return math.inf if value is False else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ExperimentError(
            f"`checkpoint_every_s` of experiment '{name}' must be seconds > 0, or false for no such checkpoints; got "
            f"{value!r}."
        )
    return float(value)


def is_switch(result: Mapping[str, Any], offline_updates: int) -> bool:
    """Whether a result is the last one of the offline phase."""
    is_offline = result.get(keys.PHASE) == keys.OFFLINE
    return is_offline and result.get(keys.NUM_OFFLINE_UPDATES_LIFETIME, 0) >= offline_updates


@dataclass
class _Timing:
    """When a trial did what, in seconds of the clock.

    Attributes:
        saved: When the iteration of the last checkpoint ended, or training began.
        begun: When the current iteration began.
        result: When the last iteration ended.
        save_s: What the last checkpoint took.
        limit_s: Seconds of training that may be lost.
        iterations_s: How long the last iterations took.
    """

    saved: float
    begun: float
    result: float
    limit_s: float
    save_s: float = 0.0
    iterations_s: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_RECENT))


class SafetyNetCallback(tune.Callback):
    """Asks Tune for the checkpoints of a `SafetyNet`, says which is the best, and removes those that are not kept.

    It has to come after `KeepResumable`, which marks checkpoints as whole.

    Args:
        net: Which checkpoints.
        scheduler: Tune's; population based training goes on from checkpoints that it has chosen earlier.
        announce: Called with what the user should know at once.
        on_saved: Called after every checkpoint.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        net: SafetyNet,
        scheduler: TrialScheduler | None = None,
        *,
        announce: Callable[[str], None] = logger.warning,
        on_saved: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._net = net
        self._scheduler = scheduler
        self._announce = announce
        self._on_saved = on_saved
        self._clock = clock
        self._timings: dict[str, _Timing] = {}
        self._best: dict[str, Best] = {}
        self._counted: dict[str, tuple[int, int]] = {}  # Results with the metric, and up to which iteration.
        self._marks: dict[str, tuple[Any, ...] | None] = {}  # Of the evaluation in the last result.
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[type[SafetyNetCallback], tuple[SafetyNet]]:
        """Tune pickles callbacks with the experiment; a fresh one has the same meaning."""
        return SafetyNetCallback, (self._net,)

    def best_of(self, trial: Trial) -> Best | None:
        """The trial's best checkpoint, also of one that had ended before the run was resumed."""
        if trial.trial_id in self._best or self._net.keep_best is None or trial.storage.trial_dir_name is None:
            return self._best.get(trial.trial_id)
        best = read_best(trial.storage.storage_filesystem, trial.storage.trial_fs_path)
        return best if best is not None and best.by == self._net.keep_best else None

    def describe_best(self, trial: Trial) -> str | None:
        """What the best checkpoint is, and its path; None if there is none."""
        best = self.best_of(trial)
        path = None if best is None else posixpath.join(trial.storage.trial_fs_path, best.checkpoint)
        return None if best is None else f"{best.describe()}: {path}"

    # --- When ---------------------------------------------------------------------------------------------------------

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Training begins, or goes on from a checkpoint."""
        now = self._clock()
        limit_s = self._net.seconds if trial.checkpoint else self._net.first_s
        self._timings[trial.trial_id] = _Timing(saved=now, begun=now, result=now, limit_s=limit_s)
        if self._net.keep_best is not None and trial.trial_id not in self._best and trial.checkpoint:
            self._recall_best(trial, self._net.keep_best)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Asks for a checkpoint of this result if it is due."""
        now = self._clock()
        if trial.trial_id not in self._timings:
            self.on_trial_start(iteration, trials, trial)
        timing = self._timings[trial.trial_id]
        timing.iterations_s.append(now - timing.begun)
        timing.begun = timing.result = now
        is_better = self._judge(trial, result)
        next_end = now - timing.saved + _MARGIN * max(timing.iterations_s) + timing.save_s
        is_due = next_end >= timing.limit_s or (
            math.isfinite(self._net.seconds) and is_switch(result, trial.config.get("offline_updates") or 0)
        )
        is_wanted = is_better or (is_due and (self._net.at_end or not result.get("done")))
        # One that the scheduler has asked for is of this result, too.
        if is_wanted and not trial.is_saving:
            result[SHOULD_CHECKPOINT] = True

    # --- Which --------------------------------------------------------------------------------------------------------

    def on_checkpoint(
        self, iteration: int, trials: list[Trial], trial: Trial, checkpoint: tune.Checkpoint, **info: Any
    ) -> None:
        """Notes a whole checkpoint, and that it is the best one if it is."""
        now = self._clock()
        if timing := self._timings.get(trial.trial_id):
            timing.saved, timing.begun, timing.save_s = timing.result, now, now - timing.result
            timing.limit_s = self._net.seconds
            self._warn_of_slow_saves(timing.save_s)
        if self._net.keep_best is not None and self._is_own(trial, checkpoint.path):
            self._note_best(trial, self._net.keep_best, posixpath.basename(checkpoint.path))
        self._on_saved()

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Removes the trial's checkpoints that are not kept."""
        manager = trial.run_metadata.checkpoint_manager
        own = [result for result in manager._checkpoint_results if self._is_own(trial, result.checkpoint.path)]
        best = self._best.get(trial.trial_id)
        kept = self._net.kept(
            [(result.checkpoint.path, result.metrics) for result in own],
            None if best is None else posixpath.join(trial.storage.trial_fs_path, best.checkpoint),
            trial.config.get("offline_updates") or 0,
        )
        kept |= self._in_use(trials)
        removed = [result for result in own if result.checkpoint.path not in kept]
        if not removed:
            return
        manager._checkpoint_results = [result for result in manager._checkpoint_results if result not in removed]
        trial.run_metadata.invalidate_cache()
        trial.invalidate_json_state()
        for result in removed:
            remove_checkpoint(result.checkpoint.filesystem, result.checkpoint.path)

    def _judge(self, trial: Trial, result: dict[str, Any]) -> bool:
        """Counts a result with the metric. Returns whether it is the best one so far."""
        by = self._net.keep_best
        if by is None:
            return False
        if (problem := by.missing(result)) and problem not in self._said:
            self._said.add(problem)
            self._announce(f"{problem} No checkpoint is kept as the best one.")
        score = by.score(result)
        if score is None:
            return False
        mark = mark_of_evaluation(result, by.metric)
        is_repeated = by.is_of_evaluation and mark is not None and mark == self._marks.get(trial.trial_id)
        self._marks[trial.trial_id] = mark
        number, counted_to = self._counted.get(trial.trial_id, (0, 0))
        now_at = int(result.get(TRAINING_ITERATION, 0))
        if now_at > counted_to and not is_repeated:
            self._counted[trial.trial_id] = (number + 1, now_at)
        best = self._best.get(trial.trial_id)
        return best is None or score > best.score

    def _note_best(self, trial: Trial, by: BestMetric, checkpoint: str) -> None:
        former, (number, counted_to) = self._best.get(trial.trial_id), self._counted.get(trial.trial_id, (0, 0))
        best, score = former, by.score(trial.last_result)
        if score is not None and (best is None or score > best.score):
            best = Best.of_result(trial.last_result, by, checkpoint, number)
        if best is not None:
            self._keep_best(trial, best.counted(number, counted_to))

    def _recall_best(self, trial: Trial, by: BestMetric) -> None:
        """After a resume: as the file says, and by the results of the checkpoints that are there."""
        filesystem, folder = trial.storage.storage_filesystem, trial.storage.trial_fs_path
        manager = trial.run_metadata.checkpoint_manager
        known = [*manager._checkpoint_results]
        if (latest := manager.latest_checkpoint_result) is not None and latest not in known:
            known.append(latest)
        results = [
            (posixpath.basename(result.checkpoint.path), result.metrics)
            for result in sorted(known, key=lambda result: result.metrics.get(TRAINING_ITERATION, 0))
            if self._is_own(trial, result.checkpoint.path)
        ]
        best = best_of(results, by, read_best(filesystem, folder))
        if best is not None:
            self._counted[trial.trial_id] = (best.num_evaluations, best.counted_to)
            self._keep_best(trial, best)

    def _keep_best(self, trial: Trial, best: Best) -> None:
        try:
            write_best(trial.storage.storage_filesystem, trial.storage.trial_fs_path, best)
        except OSError as error:  # The former one stays.
            logger.warning("The best checkpoint of '%s' could not be noted: %s", trial, error)
            return
        self._best[trial.trial_id] = best

    def _in_use(self, trials: list[Trial]) -> set[str]:
        """Checkpoints that trials go on from: the latest of each, and those of other trials that PBT may copy."""
        used = [trial.checkpoint for trial in trials]
        states = getattr(self._scheduler, "_trial_state", None) or {}
        used += [getattr(state, "last_checkpoint", None) for state in states.values()]
        # One that is still being written has no path, and is the newest of its trial.
        return {path for checkpoint in used if (path := getattr(checkpoint, "path", None)) is not None}

    def _is_own(self, trial: Trial, checkpoint: str) -> bool:
        """Whether a checkpoint is in the trial's folder. PBT gives a trial those of others."""
        return posixpath.dirname(checkpoint) == str(trial.storage.trial_fs_path).rstrip("/")

    def _warn_of_slow_saves(self, save_s: float) -> None:
        if save_s > self._net.seconds / 10 and "slow" not in self._said and math.isfinite(self._net.seconds):
            self._said.add("slow")
            self._announce(
                f"Writing a checkpoint took {save_s:.0f} s, more than a tenth of `checkpoint_every_s` "
                f"({self._net.seconds:g}); raise that, or use a faster `--storage-path`."
            )
