"""`stop` of an experiment: which metrics its results can have, and that some end comes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, HyperBandScheduler, TrialScheduler

from rllib_calql.collection.callbacks import OWN_CALLBACKS
from rllib_calql.common import metrics as keys
from rllib_calql.common.references import PENALTY
from rllib_calql.config import CalQLConfig
from rllib_calql.learning.diagnostics import ACTOR_METRICS, REFERENCE_METRICS, conservative_metrics, metric_names
from rllib_calql.settings.offline_evaluation import FQE

_ENV_STEPS, _ENV_STEPS_OF_RUNNERS = "num_env_steps_sampled_lifetime", "env_runners/num_env_steps_sampled_lifetime"
# Of Tune and RLlib, at the top level of every result.
_TOP_LEVEL = (
    *("training_iteration", "time_total_s", "time_this_iter_s", "time_since_restore", "iterations_since_restore"),
    *("timestamp", _ENV_STEPS, "num_training_step_calls_per_iteration"),
)
# Of RLlib's env runners, below `env_runners` and `evaluation/env_runners`; those of one agent with its name.
_OF_ENV_RUNNERS = (
    *("episode_return_mean", "episode_return_min", "episode_return_max"),
    *("episode_len_mean", "episode_len_min", "episode_len_max", "episode_duration_sec_mean"),
    *("num_env_steps_sampled", "num_env_steps_sampled_lifetime", "num_episodes", "num_episodes_lifetime"),
    *("env_reset_timer", "env_step_timer", "rlmodule_inference_timer", "sample", "time_between_sampling"),
    *("env_to_module_sum_episodes_length_in", "env_to_module_sum_episodes_length_out", "weights_seq_no"),
    "num_env_step_failures_lifetime",
)
_OF_AGENTS = ("agent_episode_return_mean", "num_agent_steps_sampled", "num_agent_steps_sampled_lifetime")
_OF_MODULES = ("module_episode_return_mean", "num_module_steps_sampled", "num_module_steps_sampled_lifetime")
_OF_GROUPS = ("num_healthy_workers", "num_remote_worker_restarts", "num_env_runners_dropped_lifetime")
_OF_ALL_LEARNERS = (
    *("num_env_steps_trained", "num_env_steps_trained_lifetime"),
    *("num_module_steps_trained", "num_module_steps_trained_lifetime"),
)
# RLlib's, of the learner's one module, beside what the learner itself reports.
_REFERENCE_RATE = "reference_learning_rate"
_OF_LEARNER = (
    *("policy_learning_rate", "critic_learning_rate", "alpha_learning_rate", "alpha_prime_learning_rate"),
    _REFERENCE_RATE,
    *("num_module_steps_trained", "num_module_steps_trained_lifetime", "module_train_batch_size_mean"),
    "weights_seq_no",
)
_REGIME = (f"{keys.FINE_TUNING}/{keys.REGIME_POLICY}", f"{keys.FINE_TUNING}/{keys.REGIME_DATA}")
_OWN_TOP_LEVEL = (
    *(keys.NUM_OFFLINE_UPDATES_LIFETIME, keys.NUM_ONLINE_UPDATES_LIFETIME, keys.NUM_ONLINE_ENV_STEPS_LIFETIME),
    *(keys.NUM_ONLINE_EPISODES_LIFETIME, keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME),
    *(keys.UPDATES_PER_S, keys.Q_OUT_OF_RANGE),
    *(f"{keys.STORE}/{name}" for name in (keys.NUM_OFFLINE_TRANSITIONS, keys.NUM_ONLINE_TRANSITIONS)),
    f"{keys.STORE}/{keys.OFFLINE_RETURN_MEAN}",
    *(f"{keys.FINE_TUNING}/{name}" for name in (keys.DIP, keys.REGRET)),
    *_REGIME,
    *(f"{keys.COLLECTION}/{name}" for name in (keys.NUM_ENV_STEPS_BEHIND, keys.LEARNER_BUSY_SHARE, keys.NUM_CLIENTS)),
    *(f"{keys.COLLECTION}/{key}" for key in (keys.NUM_DISCARDED_EPISODES_LIFETIME, keys.INTERVENTION_SHARE)),
    f"{keys.COLLECTION}/{keys.NUM_INTERVENTION_ENV_STEPS_LIFETIME}",
    f"{keys.COLLECTION}/{keys.NUM_REPLACED_ACTIONS_LIFETIME}",
    *(f"{keys.COLLECTION}/{key}" for key in (keys.NUM_HEALTHY_ENV_RUNNERS, keys.NUM_ENV_RUNNER_FAILURES_LIFETIME)),
)
_OF_FQE = tuple(
    f"evaluation/{keys.FQE}/{name}"
    for name in (
        *(keys.VALUE, keys.VALUE_LOW, keys.VALUE_HIGH, keys.BEHAVIOUR_RETURN, keys.SHARE_OFF_DATA),
        *(keys.FQE_TD_ERROR, keys.FQE_TD_ERROR_TRAINING),
    )
)
_OF_HELD_OUT = (
    f"{keys.STORE}/{keys.NUM_HELD_OUT_TRANSITIONS}",
    *(f"evaluation/{keys.HELD_OUT}/{name}" for name in (keys.TD_LOSS, keys.TD_LOSS_TRAINING, keys.GAP, keys.Q_DATA)),
    *(f"evaluation/{keys.HELD_OUT}/{name}" for name in (keys.CALIBRATION_GAP, keys.LOG_PROB, keys.ACTION_DISTANCE)),
    f"evaluation/{keys.HELD_OUT}/{keys.REFERENCE_LOSS}",
)
# Any metric below these: timers of whatever a pipeline consists of, and what users log.
_FREE = ("custom_metrics/", "timers/", "perf/", "env_runner_group/")
_FREE_OF_RUNNERS = (
    "env_to_module_connector/",
    "module_to_env_connector/",
    "num_env_steps_sampled_lifetime_throughput/",
)
# Of RLlib's old API stack.
_OLD_STACK = ("timesteps_total", "episodes_total", "num_env_steps_sampled", "num_env_steps_trained")
_NOT_NUMBERS = (
    f"evaluation/{keys.FQE}/{keys.FQE_WARNINGS}",
    *(keys.PHASE, keys.OFFLINE_DATA, keys.OFFLINE_DATA_WARNINGS, keys.Q_WARNING, keys.SUCCESS_WARNING),
    *(f"{keys.FINE_TUNING}/{name}" for name in (keys.REGIME, keys.REGIME_QUANTITY)),
    *(keys.PRETRAINED_WARNING, keys.OVERFITTING, "date", "hostname", "node_ip", "trial_id", "done", "pid"),
)
# What people write -> what is meant, where it is not merely misspelt.
_MEANT = {
    **dict.fromkeys(("num_online_steps", "online_env_steps", "online_steps"), keys.NUM_ONLINE_ENV_STEPS_LIFETIME),
    **dict.fromkeys(
        ("timesteps_total", "num_env_steps_sampled", "env_steps", "num_env_steps", "timesteps"), _ENV_STEPS
    ),
    **dict.fromkeys(("time_budget", "time_budget_s", "time_s", "time", "seconds"), "time_total_s"),
    **dict.fromkeys(("iterations", "num_iterations", "training_iterations"), "training_iteration"),
    **dict.fromkeys(("episodes_total", "num_episodes", "episodes"), "env_runners/num_episodes_lifetime"),
    **dict.fromkeys(("episode_reward_mean", "episode_return_mean", "return"), "env_runners/episode_return_mean"),
    "offline_updates": keys.NUM_OFFLINE_UPDATES_LIFETIME,
    "num_env_steps_trained_lifetime": "learners/__all_modules__/num_env_steps_trained_lifetime",
}
_ONLY_ONLINE = (
    *("env_runners/", "evaluation/env_runners/", f"{keys.FINE_TUNING}/"),
    *(_ENV_STEPS, keys.NUM_ONLINE_UPDATES_LIFETIME, keys.NUM_ONLINE_ENV_STEPS_LIFETIME),
    keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME,
    *(keys.NUM_ONLINE_EPISODES_LIFETIME, f"{keys.STORE}/{keys.NUM_ONLINE_TRANSITIONS}", f"{keys.COLLECTION}/"),
    f"learners/default_policy/{keys.CALIBRATION_GAP_ONLINE}",
)
_ONLY_WITH_DATA = (
    *(keys.NUM_OFFLINE_UPDATES_LIFETIME, f"{keys.STORE}/{keys.NUM_OFFLINE_TRANSITIONS}"),
    f"{keys.STORE}/{keys.OFFLINE_RETURN_MEAN}",
    *_REGIME,
    *(f"learners/default_policy/{keys.CALIBRATION_GAP_OFFLINE}", "evaluation/env_runners/normalized_score"),
)
_CLOSE = 0.85  # Likeness of words above which one is the other misspelt.


@dataclass(frozen=True)
class ResultMetrics:
    """The metrics that the results of an experiment can have.

    Attributes:
        known: Paths ("/" between levels) of numbers.
        free: Beginnings of paths that anything may follow.
        has_own: Whether the user's own classes may report what nobody here knows.
    """

    known: frozenset[str]
    free: tuple[str, ...]
    has_own: bool

    def fault_of(self, metric: str, consequence: str = "it would never end the run") -> str | None:
        """What is wrong with a metric's name, and what that leads to; None if results can have it."""
        if metric in self.known or any(metric.startswith(start) and metric != start for start in self.free):
            return None
        if metric in _NOT_NUMBERS:
            return f"`{metric}` is no number that could be compared"
        likely = self._meant_by(metric)
        is_misspelt = bool(difflib.get_close_matches(metric, self.known, n=1, cutoff=_CLOSE))
        if self.has_own and not is_misspelt and metric not in _MEANT:
            return None
        meant = f"; did you mean {' or '.join(f'`{name}`' for name in likely)}?" if likely else "."
        return (
            f"Unknown metric `{metric}`{meant} Results have no such number, so {consequence}. Metrics of your own may "
            "stand below `custom_metrics/`, or anywhere if `callbacks_class` or another class of yours is set"
        )

    def _meant_by(self, metric: str) -> list[str]:
        if _MEANT.get(metric) in self.known:
            return [_MEANT[metric]]
        if same_end := sorted(name for name in self.known if name.endswith(f"/{metric}")):
            return sorted(same_end, key=lambda name: not name.startswith("evaluation/"))[:2]
        if close := difflib.get_close_matches(metric, sorted(self.known), n=2):
            return close
        ends = {name.rpartition("/")[2]: name for name in sorted(self.known)}
        return [ends[end] for end in difflib.get_close_matches(metric.rpartition("/")[2], ends, n=2)]


def metrics_of(config: AlgorithmConfig) -> ResultMetrics:
    """The metrics that results of an algorithm with this config can have, whatever it is set to."""
    is_calql = isinstance(config, CalQLConfig)
    of_runners = [*_OF_ENV_RUNNERS, *(f"{name}/default_agent" for name in _OF_AGENTS)]
    of_runners += [f"{name}/default_policy" for name in _OF_MODULES]
    free_of_runners = list(_FREE_OF_RUNNERS)
    known = {*_TOP_LEVEL, *(f"learners/__all_modules__/{name}" for name in _OF_ALL_LEARNERS)}
    known |= {f"{group}/{name}" for group in ("fault_tolerance", "evaluation") for name in _OF_GROUPS}
    free = [*_FREE]
    if isinstance(config, CalQLConfig):
        of_runners += [keys.SUCCESS_RATE, keys.EPISODE_RETURN_STD]
        names = {*metric_names(num_critics=_largest(config.num_critics)), *_OF_LEARNER}
        known |= {*_OWN_TOP_LEVEL, *_OF_HELD_OUT, *_OF_FQE}
        known |= {f"learners/default_policy/{name}" for name in names}
        known.add(f"evaluation/env_runners/{keys.NORMALIZED_SCORE}")
        if config.log_gradients:
            free.append("learners/default_policy/")
    else:
        free += ["learners/", "replay_buffer/"]
        free_of_runners += [f"{name}/" for name in (*_OF_AGENTS, *_OF_MODULES)]
    if not config.enable_env_runner_and_connector_v2:
        known |= set(_OLD_STACK)
        free += ["info/", "counters/", "sampler_results/", "env_runners/"]
    known |= {f"{place}{name}" for place in ("env_runners/", "evaluation/env_runners/") for name in of_runners}
    free += [f"{place}{name}" for place in ("env_runners/", "evaluation/env_runners/") for name in free_of_runners]
    return ResultMetrics(frozenset(known), tuple(free), has_own=_has_own_classes(config, is_calql=is_calql))


def why_absent(metric: str, config: AlgorithmConfig) -> str | None:
    """Why a metric that results can have is in none of this experiment; None if it is.

    Args:
        metric: Path, "/" between levels.
        config: Without search spaces.
    """
    if metric in _OF_FQE and isinstance(config, CalQLConfig):
        if config.offline_evaluation_type == FQE:
            return None
        return "nothing fits values to the data; set `offline_evaluation_interval` and `offline_evaluation_type: fqe`"
    is_judged_offline = metric in _OF_HELD_OUT and getattr(config, "offline_evaluation_type", None) == keys.HELD_OUT
    is_evaluated = config.evaluation_interval or is_judged_offline
    if metric.startswith(("evaluation/", f"{keys.FINE_TUNING}/")) and not is_evaluated:
        return "nothing is evaluated; set `evaluation_interval`"
    if not isinstance(config, CalQLConfig):
        return None
    if not config.is_online and metric.startswith(_ONLY_ONLINE):
        return "there is no environment; set `env`"
    if not config.is_offline and metric in _ONLY_WITH_DATA:
        return "there are no offline data; set `input_`"
    if metric in _OF_HELD_OUT and not config.validation_fraction:
        return "nothing is held out; set `validation_fraction`"
    if metric in _REGIME and not config.num_offline_updates and config.pretrained is None:
        return "nothing is learned before the switch; raise `offline_updates`"
    name = metric.removeprefix("learners/default_policy/")
    if name.startswith(keys.ALPHA_PRIME) and not config.lagrangian:
        return "there is no multiplier; set `lagrangian: true`"
    is_conservative = config.is_conservative(online=config.is_online)
    of_term = {
        *conservative_metrics(num_critics=_largest(config.num_critics)),
        f"evaluation/{keys.HELD_OUT}/{keys.GAP}",
    }
    if not is_conservative and name in of_term:
        return "after the switch there is no conservative term; set `conservative_online: true`"
    if (reason := _why_absent_of_reference(name, config)) is not None:
        return reason
    if name in ACTOR_METRICS and max(config.period_of_actor(online=online) for online in (False, True)) > 1:
        return "results without a step of the actor lack it; set `actor_update_period: 1`"
    if name in (keys.CLIPPED_OFFLINE, keys.CLIPPED_ONLINE) and not config.normalize_observations:
        return "observations are not normalised; set `normalize_observations: true`"
    of_runners = (keys.NUM_HEALTHY_ENV_RUNNERS, keys.NUM_ENV_RUNNER_FAILURES_LIFETIME, keys.LEARNER_BUSY_SHARE)
    if metric in [f"{keys.COLLECTION}/{key}" for key in of_runners] and not config.num_env_runners:
        return "there are no remote env runners; set `num_env_runners`"
    if metric == f"{keys.COLLECTION}/{keys.NUM_CLIENTS}" and not config.has_clients:
        return "episodes do not come from clients; set `external_port`"
    if metric == f"{keys.COLLECTION}/{keys.LEARNER_BUSY_SHARE}" and not config.sample_async:
        return "collecting and updating take turns; set `sample_async: true`"
    if name != metric and name not in {*metric_names(num_critics=config.num_critics), *_OF_LEARNER}:
        beyond = name in metric_names(num_critics=100)
        return f"there are no more than {config.num_critics} critics; raise `num_critics`" if beyond else None
    return None


def _why_absent_of_reference(name: str, config: CalQLConfig) -> str | None:
    """The same of what is reported of a learner's reference value."""
    if name in {*REFERENCE_METRICS, _REFERENCE_RATE} and not config.has_reference_network:
        return "no reference value is learned; set `reference_value: learned`"
    is_used = config.uses_reference_network(online=config.is_online)
    if config.has_reference_network and not is_used and name in {*REFERENCE_METRICS, keys.REFERENCE_VALUE_MEAN}:
        where = "calibrate_online" if config.conservative_online else "conservative_online"
        return f"after the switch nothing bounds Q; set `{where}: true`"
    of_settings = (
        (keys.BOUND_RATE_UNIFORM_OF_CRITIC, config.bound_uniform_actions, "bound_uniform_actions: true"),
        (keys.CALIBRATION_PENALTY_OF_CRITIC, config.calibration_form == PENALTY, "calibration_form: penalty"),
    )
    for template, is_on, setting in of_settings:
        if not is_on and name in {template.format(c=c + 1) for c in range(_largest(config.num_critics))}:
            return f"it is of another calibration; set `{setting}`"
    return None


def _largest(num_critics: Any) -> int:
    """Names of critics that some trial may have; `why_absent` looks at each trial."""
    return 100 if not isinstance(num_critics, int) else max(num_critics, 2)


def _has_own_classes(config: AlgorithmConfig, *, is_calql: bool) -> bool:
    """Whether classes or functions of the user take part, which may report anything."""
    callbacks = config.callbacks_class
    listed: Iterable[Any] = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    if any(callback is not RLlibCallback and callback not in OWN_CALLBACKS for callback in listed if callback):
        return True
    if any(value for name, value in vars(config).items() if name.startswith("callbacks_on_")):
        return True
    names = ("custom_evaluation_function", "_env_to_module_connector", "_module_to_env_connector", "_learner_connector")
    if any(getattr(config, name, None) is not None for name in (*names, "_learner_class", "env_runner_cls")):
        return True
    homes = ("rllib_calql.",) if is_calql else ("ray.rllib.",)
    return not (config.algo_class is not None and config.algo_class.__module__.startswith(homes))


# Metrics that grow as long as a trial interacts with its environment.
_GROWING = (
    *("training_iteration", "iterations_since_restore", "time_total_s", "time_since_restore", "timestamp"),
    *("num_env_steps_sampled_lifetime", keys.NUM_ONLINE_ENV_STEPS_LIFETIME, keys.NUM_ONLINE_EPISODES_LIFETIME),
    *(keys.NUM_ONLINE_UPDATES_LIFETIME, keys.NUM_OFFLINE_UPDATES_LIFETIME, "timesteps_total", "episodes_total"),
    *("num_env_steps_sampled", "num_env_steps_trained", keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME),
)
# The same anywhere below these places.
_GROWING_PLACES = ("env_runners", "evaluation", "learners")
_GROWING_BELOW = (
    *("num_env_steps_sampled_lifetime", "num_episodes_lifetime", "num_agent_steps_sampled_lifetime"),
    *("num_module_steps_sampled_lifetime", "num_env_steps_trained_lifetime", "num_module_steps_trained_lifetime"),
    keys.NUM_UPDATES_LIFETIME,
)
_STORED = f"{keys.STORE}/{keys.NUM_ONLINE_TRANSITIONS}"


def parse_stop(
    stop: Any,
    name: str,
    config: AlgorithmConfig,
    examples: Sequence[AlgorithmConfig],
    scheduler: TrialScheduler | None = None,
) -> dict[str, float]:
    """Checks `stop` of an experiment.

    Args:
        stop: Metric -> value, nested mappings or paths with "/"; `{}` for no end; None if it is not there.
        name: Of the experiment.
        config: Its config; values may be search spaces.
        examples: What trials may get, without search spaces.
        scheduler: May end trials as well.

    Returns:
        Metric path -> value at which a trial ends.

    Raises:
        ValueError: If results have no such metric, or an experiment with an environment would never end.
    """
    flat = _flattened(stop if stop is not None else {}, name)
    metrics = metrics_of(config)
    for metric, value in flat.items():
        if fault := metrics.fault_of(metric):
            raise ValueError(f"`stop` of experiment '{name}': {fault}.")
        for example in examples:
            if reason := why_absent(metric, example):
                raise ValueError(
                    f"`stop` of experiment '{name}': `{metric}` never appears, because {reason}, or drop it."
                )
        if _is_growing(metric) and value <= 0:
            raise ValueError(
                f"`stop` of experiment '{name}': `{metric}` must be above 0, got {value!r}, which would end the run at "
                "its first result."
            )
    if stop is None or flat:
        for example in examples:
            _check_end(flat, name, example, scheduler)
    return flat


def check_judged_by(metric: str, config: AlgorithmConfig, examples: Iterable[AlgorithmConfig]) -> None:
    """Checks a metric by which trials or checkpoints are compared, or their progress is told.

    Args:
        metric: Path, "/" between levels.
        config: Of the experiment; values may be search spaces.
        examples: What trials may get, without search spaces.

    Raises:
        ValueError: If results have no such number.
    """
    if fault := metrics_of(config).fault_of(metric, "nothing would be judged by it"):
        raise ValueError(f"{fault}.")
    for example in examples:
        if reason := why_absent(metric, example):
            raise ValueError(f"`{metric}` never appears, because {reason}, or name another one.")


def _flattened(stop: Any, name: str) -> dict[str, float]:
    if not isinstance(stop, dict):
        raise ValueError(f"`stop` of experiment '{name}' must map metrics to numbers, got {stop!r}.")
    flat: dict[str, float] = {}
    for key, value in stop.items():
        inner = (
            {f"{key}/{path}": number for path, number in _flattened(value, name).items()} if _is_level(value) else {}
        )
        if not inner:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
                raise ValueError(f"`stop` of experiment '{name}': `{key}` must be a number, got {value!r}.")
            inner = {str(key): value}
        if twice := flat.keys() & inner.keys():
            raise ValueError(f"`stop` of experiment '{name}' has `{min(twice)}` twice; drop one.")
        flat |= inner
    return flat


def _is_level(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _is_growing(metric: str) -> bool:
    levels = metric.split("/")
    return metric in _GROWING or (levels[0] in _GROWING_PLACES and bool(set(_GROWING_BELOW) & set(levels[-2:])))


def _check_end(stop: Mapping[str, float], name: str, config: AlgorithmConfig, scheduler: TrialScheduler | None) -> None:
    """Refuses an experiment that would interact with its environment for ever, and does not say so."""
    has_environment = config.env is not None or getattr(config, "external_port", None) is not None
    if (
        not has_environment
        or _ends_by_scheduler(scheduler)
        or getattr(config, "max_online_env_steps", None) is not None
    ):
        return
    if any(_is_growing(metric) and _is_reached_in_time(metric, value, config) for metric, value in stop.items()):
        return
    if _STORED in stop and isinstance(config, CalQLConfig) and stop[_STORED] <= config.online_capacity:
        return
    is_calql = isinstance(config, CalQLConfig)
    env_steps = keys.NUM_ONLINE_ENV_STEPS_LIFETIME if is_calql else "num_env_steps_sampled_lifetime"
    setting = ", or `max_online_env_steps: 2000` in `config`" if is_calql else ""
    beyond = ""
    if is_calql and keys.NUM_OFFLINE_UPDATES_LIFETIME in stop:
        beyond = (
            f" `{keys.NUM_OFFLINE_UPDATES_LIFETIME}` does not grow above `offline_updates`, which is "
            f"{config.num_offline_updates}."
        )
    what = f"only ends at {', '.join(f'`{metric}`' for metric in stop)}, which may never come" if stop else "has no end"
    raise ValueError(
        f"Experiment '{name}' has an environment and {what}, so it may interact with it for ever.{beyond} Set a bound, "
        f"for example `stop: {{{env_steps}: 2000}}` or `stop: {{time_total_s: 3600}}` (in seconds){setting}. To go on "
        "until somebody stops it, say so with `stop: {}`, or `time_total_s: .inf` beside other metrics."
    )


def _is_reached_in_time(metric: str, value: float, config: AlgorithmConfig) -> bool:
    """Whether a growing metric gets there. Infinity says that it need not, which is as explicit as `stop: {}`."""
    if metric != keys.NUM_OFFLINE_UPDATES_LIFETIME or not isinstance(config, CalQLConfig):
        return True
    return value <= config.num_offline_updates or math.isinf(value)


def _ends_by_scheduler(scheduler: TrialScheduler | None) -> bool:
    """Whether a scheduler ends every trial after a time: Hyperband does, at its `max_t`."""
    if isinstance(scheduler, (AsyncHyperBandScheduler, HyperBandScheduler)):
        return bool(getattr(scheduler, "_stop_last_trials", True))
    return False
