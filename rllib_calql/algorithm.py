"""`CalQL`: the two phases, offline pre-training and online fine-tuning, as one RLlib algorithm.

It overrides RLlib's hooks and hands on to its parts, see `parts.py`.
"""

from __future__ import annotations

import pathlib
import time
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.cql.cql import CQL
from ray.rllib.core import COMPONENT_LEARNER_GROUP
from ray.rllib.utils.annotations import override
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.metrics import EVALUATION_RESULTS

from rllib_calql.checkpoints.pretrained import check_pretrained
from rllib_calql.checkpoints.saving import STATE, built_from_checkpoint
from rllib_calql.collection.env_errors import start_failures_told, told
from rllib_calql.collection.external.runner import with_client_runners
from rllib_calql.common import metrics as keys
from rllib_calql.common.held_data import with_handles
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.config import CalQLConfig
from rllib_calql.environments.resolving import resolve_env
from rllib_calql.environments.sharing import offer, provide
from rllib_calql.evaluation.evaluating import completed_evaluation, evaluating_group, say_evaluating
from rllib_calql.evaluation.held_out import with_held_out
from rllib_calql.parts import Parts, all_spaces, build_parts, with_input
from rllib_calql.registration import register
from rllib_calql.results import completed_result
from rllib_calql.store.offline_data import with_spaces_of_data
from rllib_calql.store.replay import TransitionStore
from rllib_calql.system import activity
from rllib_calql.system.ray_resources import refuse_missing_places, refuse_unavailable

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from typing_extensions import Self

    from rllib_calql.collection.intake import AddedEpisodes

_IDLE_SECONDS = 0.01


class CalQL(CQL):
    """Calibrated conservative Q-learning (Nakamoto et al. 2023, arXiv:2303.05479) on RLlib's new API stack.

    `train()` makes `updates_per_iteration` gradient updates on offline data until `offline_updates` is reached. From
    then on each call collects whole episodes with the env runners, stores them with their returns, and makes
    `updates_per_env_step` updates for every env step stored. The phase follows from the lifetime count of offline
    updates, so it survives checkpoints and does not depend on how often `train()` was called.

    Attributes:
        config: The frozen config.
    """

    config: CalQLConfig
    _parts: Parts

    @classmethod
    @override(CQL)
    def get_default_config(cls) -> CalQLConfig:
        """The default settings."""
        return CalQLConfig()

    # --- Setting up --------------------------------------------------------------------------------------------------

    @classmethod
    @override(Algorithm)
    def default_resource_request(cls, config: Any) -> Any:
        """RLlib's, asked by Ray Tune before a trial begins; makes the trial's environment known to its process.

        Raises:
            ValueError: If Ray has been started and can never give that.
        """
        overrides = config.get("evaluation_config") or {}
        for settings in (config, overrides):
            offer(settings.get("env"))
        request: Any = super().default_resource_request(config)
        if isinstance(config, dict) and ray.is_initialized():  # Ray Tune asks with a dictionary.
            refuse_unavailable(request.bundles)
        return request

    @staticmethod
    @override(Algorithm)
    def _get_env_id_and_creator(env_specifier: Any, config: Any) -> tuple[Any, Any]:
        """RLlib's; finds more forms of a name, takes functions, and says what is wrong with a name of nothing."""
        if env_specifier is None:
            return None, lambda env_config: None
        provide(env_specifier)
        return env_specifier, resolve_env(env_specifier).creator

    @override(CQL)
    def setup(self, config: CalQLConfig) -> None:
        """Builds runners and learners, reads the offline data and checks them against the environment.

        Raises:
            ValueError: If there is neither environment nor data, or the data do not fit the environment.
            FileNotFoundError: If an input does not exist.
        """
        if self._storage is not None:  # A trial of Ray Tune.
            activity.speak_as(self._storage.trial_dir_name)
        activity.say(f"building (networks on {'gpu' if config.num_gpus_per_learner else 'cpu'})")
        has_spaces = config.observation_space is not None and config.action_space is not None
        if not (config.is_online or config.is_offline or has_spaces):
            raise ValueError("There is neither an environment nor offline data; set `.environment(...)` or `input_`.")
        if self._storage is None:  # Ray Tune restores a trial only after this, and then it needs no `pretrained`.
            check_pretrained(config.pretrained)
        config = with_client_runners(with_spaces_of_data(config))
        refuse_missing_places(config)
        # Runners and learners, and their parts of checkpoints, keep the config they are built with. Data handed over
        # in Python would be in each of them; they stay with the algorithm alone.
        self.config = with_input(config, with_handles(config.input_))
        with start_failures_told(self.config):
            super().setup(self.config)
        self.config = config = with_input(self.config, config.input_)
        self._parts = build_parts(
            config,
            all_spaces(config, self.spaces),
            env_runner_group=self.env_runner_group,
            learner_group=self.learner_group,
            offline_data=self.offline_data,
            metrics=self.metrics,
            on_rebuilt=partial(setattr, self, "learner_group"),
        )
        # Ray Tune restores a trial only after this: the networks of `pretrained` may not be needed.
        if self._storage is not None or not self._parts.pretrained.load_if_due():
            self._parts.align()

    @override(Algorithm)
    def _create_local_replay_buffer_if_necessary(self, config: Any) -> None:
        """No RLlib buffer: transitions live in `self.store`."""

    # --- Training ----------------------------------------------------------------------------------------------------

    @override(Algorithm)
    def step(self) -> dict[str, Any]:
        """One iteration, RLlib's; begins with the networks of `pretrained`, where they are still due.

        Raises:
            BudgetSpentError: If `max_online_env_steps` are spent, which the result before has said by `done`.
            RuntimeError: If the offline phase is over, and there are neither an environment nor owed updates.
        """
        self._parts.pretrained.load_if_due()
        if self.phase == keys.ONLINE:
            self._parts.collection.refuse_more(self._parts.updater)
        results: dict[str, Any] = super().step()
        return results

    @override(CQL)
    def training_step(self) -> None:
        """One iteration of the phase we are in."""
        self._phase_of_result = self.phase
        if num_left := self.lifetime.num_offline_updates_left:
            self._parts.updater.update(min(self.config.updates_per_iteration, num_left), online=False)
        elif self._is_done():
            time.sleep(_IDLE_SECONDS)  # RLlib asks again until `min_time_s_per_iteration` is over.
        else:
            self._parts.collection.step(self._parts.updater)

    def add_episodes(
        self, episodes: Any, *, skip_known: bool = False, action_space_of_data: str | None = None
    ) -> AddedEpisodes:
        """Stores episodes of the system that were made elsewhere, as if env runners had collected them.

        They are read by the rules of offline data and become online rows with their returns. Each env step after the
        warm-up owes `updates_per_env_step` updates, which `train()` or `make_owed_updates` makes, in the online phase.
        Env steps and episodes count in the lifetime counters, and for `max_online_env_steps`. No environment is needed.
        All are added or, if one is refused, none.

        Args:
            episodes: A file or folder as `input_` takes it, such as that of an `EpisodeLog`, one of RLlib's
                `SingleAgentEpisode`, or a list of these.
            skip_known: Whether episodes that were added before are left out and counted, in place of refused.
            action_space_of_data: "environment" or "module", what actions are where the data do not say, as the setting
                of this name; None for the config's.

        Returns:
            What was added.

        Raises:
            FileNotFoundError: If there is no such file or folder.
            TypeError: If `episodes` is nothing that can be read, or `skip_known` neither True nor False.
            ValueError: If an episode was added before, or naming the one that is broken, unfinished, of other spaces
                or units, or longer than `online_capacity`.
        """
        return self._parts.intake.add(episodes, skip_known=skip_known, action_space_of_data=action_space_of_data)

    def make_owed_updates(self, most: int | None = None) -> int:
        """Makes the online updates that stored env steps still owe, without taking any env step.

        A run that ends owes some where collecting and updating overlap (`sample_async`), and after `add_episodes`.

        Args:
            most: How many at most; None for all.

        Returns:
            How many were made.

        Raises:
            RuntimeError: In the offline phase, whose updates `train()` makes first.
            ValueError: If `most` is no number of updates.
        """
        self._parts.pretrained.load_if_due()
        if self.phase == keys.OFFLINE:
            raise RuntimeError(
                f"{self.lifetime.num_offline_updates_left} of `offline_updates` are left, and owed updates are of the "
                "phase after them; call `train()` until they are made, or lower `offline_updates`."
            )
        return self._parts.collection.make_owed_updates(self._parts.updater, most)

    @override(Algorithm)
    def restore_env_runners(self, env_runner_group: Any) -> list[int]:
        """Indices of env runners that came back. The collection brings back its own, without waiting for them."""
        if self._parts.collection.collects_with(env_runner_group):
            return self._parts.collection.take_recovered()
        restored: list[int] = super().restore_env_runners(env_runner_group)
        return restored

    @override(Algorithm)
    def cleanup(self) -> None:
        """Ends all workers, and lets go of offline data that are shared with other trials."""
        activity.say("ending the workers")
        self._parts.collection.stop()
        super().cleanup()
        if self.offline_data is not None:
            self.offline_data.close()

    # --- Results -----------------------------------------------------------------------------------------------------

    @override(Algorithm)
    def evaluate(self, parallel_train_future: Any = None) -> dict[str, Any]:
        """Evaluates the greedy policy by episodes, if there is an environment, and by held-out ones, if there are any.

        Raises:
            RuntimeError: Without both, or if the environment fails again and again.
        """
        evaluated: dict[str, Any] = {}
        if (group := evaluating_group(self)) is not None:
            self._parts.updater.set_weights_on(group)
            say_evaluating(self.config, is_remote=bool(group.num_remote_env_runners()))
            with told("Evaluating") if not group.num_remote_env_runners() else nullcontext():
                evaluated = super().evaluate(parallel_train_future)
            evaluated = completed_evaluation(evaluated, group, self._parts.history, self._parts.success_key)
        return with_held_out(evaluated, self._parts.held_out, algorithm=self, training=parallel_train_future)

    @classmethod
    @override(Algorithm)
    def _should_create_evaluation_env_runners(cls, eval_config: Any) -> bool:
        """RLlib's, which takes every evaluation for one of episodes."""
        return eval_config.env is not None and bool(super()._should_create_evaluation_env_runners(eval_config))

    @override(Algorithm)
    def evaluate_offline(self) -> dict[str, Any]:
        """Judges the policy by data, as `offline_evaluation_type` says; a RuntimeError if the config does not."""
        return self._parts.offline_evaluation.evaluate(self)

    @override(Algorithm)
    def _run_one_offline_evaluation(self) -> dict[str, Any]:
        """RLlib's, without its runners, which would read the data once more."""
        return {EVALUATION_RESULTS: self.evaluate_offline()}

    @classmethod
    @override(Algorithm)
    def _should_create_offline_evaluation_runners(cls, eval_config: Any) -> bool:
        return False

    @override(Algorithm)
    def _compile_iteration_results(self, *, train_results: Any, eval_results: Any) -> dict[str, Any]:
        """RLlib's result, completed."""
        return completed_result(
            super()._compile_iteration_results(train_results=train_results, eval_results=eval_results),
            eval_results,
            self._parts,
            self.config,
            phase=self._phase_of_result,
            is_done=self._is_done(),
            offline_data=self.offline_data,
        )

    def _is_done(self) -> bool:
        """Whether nothing is left to train: the offline phase is over, and there are no env steps to take."""
        return self.phase == keys.ONLINE and self._parts.collection.is_complete(self._parts.updater)

    @property
    def store(self) -> TransitionStore:
        """Offline and online transitions."""
        return self._parts.store

    @property
    def lifetime(self) -> Lifetime:
        """Counters over all processes that the run has gone on in."""
        return self._parts.lifetime

    @property
    def phase(self) -> str:
        """The phase of the next training step, "offline" or "online"."""
        return self.lifetime.phase

    @property
    def num_offline_updates(self) -> int:
        """Gradient updates of the offline phase so far."""
        return self.lifetime.num_offline_updates

    @property
    def num_online_updates(self) -> int:
        """Gradient updates of the online phase so far."""
        return self.lifetime.num_online_updates

    @property
    def num_online_env_steps(self) -> int:
        """Env steps stored so far."""
        return self.lifetime.num_online_env_steps

    @property
    def num_online_episodes(self) -> int:
        """Episodes stored so far."""
        return self.lifetime.num_online_episodes

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    @override(Algorithm)
    def save_to_path(
        self,
        path: str | pathlib.Path | None = None,
        *,
        state: dict[str, Any] | None = None,
        filesystem: FileSystem | None = None,
        use_msgpack: bool = False,
    ) -> str:
        """Writes a checkpoint that takes the place of an earlier one at `path` only once it is complete.

        On a local file system an interruption leaves the earlier checkpoint or the new one, see `replaced_folder`.
        Elsewhere nothing can be renamed or locked: a checkpoint that was interrupted, or written by two, is refused.

        Args:
            path: Folder, relative ones as well, or URI; by default a new folder for temporary files.
            state: What to write instead of the present state.
            filesystem: PyArrow file system of `path`; by default what the URI says.
            use_msgpack: Refused.

        Returns:
            The folder.

        Raises:
            ValueError: With `use_msgpack`.
            RuntimeError: If somebody else is writing to the folder, or a remote learner could not write its part.
        """
        if use_msgpack:
            raise ValueError("`use_msgpack` is True, but Cal-QL's checkpoints are pickled only; drop it.")
        folder: str = self._parts.saving.save(
            path,
            state=state,
            filesystem=filesystem,
            write=super().save_to_path,
            components=self.get_checkpointable_components,
        )
        return folder

    @override(Algorithm)
    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The config for checkpoints: that with the environment, where this algorithm trains without it."""
        kept = self.config._kept_in_checkpoints
        return ((self.config if kept is None else kept.config).get_state(),), {}

    @override(Algorithm)
    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state and ours: counters, debt of updates, online data, random state, evaluations."""
        self._parts.pretrained.load_if_due()
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(STATE, components, not_components):
            state[STATE] = self._parts.saving.get_state()
        return state

    @override(Algorithm)
    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` returned.

        Raises:
            ValueError: If networks, spaces, data, rewards or the online capacity are not those of the state.
        """
        state = dict(state)
        own = state.pop(STATE, None)
        if own is not None:
            self._parts.saving.check(own)
        if self.env_runner_group is None and COMPONENT_LEARNER_GROUP in state:
            self.learner_group.set_state(state.pop(COMPONENT_LEARNER_GROUP))
        super().set_state(state)
        if own is not None:
            self._parts.saving.set_state(own)

    @override(Algorithm)
    def restore_from_path(
        self, path: str | pathlib.Path, *, component: str | None = None, filesystem: Any = None, **kwargs: Any
    ) -> None:
        """Restores a checkpoint, also without env runners, and waits until runners have the weights.

        Args:
            path: Folder or URI.
            component: Restores this part only; `path` is then that part's folder.
            filesystem: PyArrow filesystem of `path`; by default what the URI says.
            **kwargs: RLlib's own.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is no checkpoint, a damaged one, or not one of this run; nothing has been changed then.
        """
        by_rllib = Checkpointable.restore_from_path if self.env_runner_group is None else Algorithm.restore_from_path
        self._parts.saving.restore(
            path, component=component, filesystem=filesystem, by_rllib=partial(by_rllib, self), **kwargs
        )

    @classmethod
    @override(Algorithm)
    def from_checkpoint(
        cls, path: Any, filesystem: FileSystem | None = None, *, config: CalQLConfig | None = None, **kwargs: Any
    ) -> Self:
        """Builds an algorithm from what `save_to_path` or Tune wrote, and restores its state.

        Args:
            path: Folder (relative ones work as well), URI, or Ray Train `Checkpoint`.
            filesystem: PyArrow filesystem of `path`; by default what the URI says.
            config: Settings to go on with, for example with other numbers of env runners or learners, or other learning
                rates; by default those of the checkpoint. Networks, spaces, data and rewards must be the same.
            **kwargs: Refused; they belong to RLlib's old API stack.

        Raises:
            FileNotFoundError: If there is no such folder, or the data are not where the config says.
            ValueError: If the folder is no checkpoint, or a damaged one, or the config does not fit it.
            TypeError: If there are other arguments, or `config` is no `CalQLConfig`.
        """
        if kwargs:
            names = ", ".join(f"`{name}`" for name in sorted(kwargs))
            raise TypeError(f"`from_checkpoint` takes `path`, `filesystem` and `config`, got {names}; drop them.")
        if config is not None and not isinstance(config, CalQLConfig):
            raise TypeError(f"`config` must be a `CalQLConfig`, got {type(config).__name__}.")
        return built_from_checkpoint(cls, path, filesystem, config=config)


# RLlib is loaded now. Its list keeps the name resolvable after `ray.shutdown()`.
import_module("ray.rllib.algorithms.registry")
register()
