"""`CalQLOfflineData`: from `input_` to the store's offline columns, by way of whole episodes and `AddReturnsToGo`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from ray.rllib.offline.offline_data import OfflineData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.annotations import override

from rllib_calql.common.encoding import flat_size
from rllib_calql.common.spaces import (
    check_action_space,
    description_of,
    difference_of,
    is_flat,
    reordering,
)
from rllib_calql.datasets.episodes.reader import REPEATED, DatasetInfo, EpisodeReader, ReadOptions
from rllib_calql.datasets.readers.opening import open_input
from rllib_calql.datasets.report.comparison import findings_on_spaces
from rllib_calql.datasets.report.report import DatasetReport
from rllib_calql.store.ingestion import Conversion
from rllib_calql.store.loading import Sharing, Spaces, StorageSettings, load_parts, load_table
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.resolution import check_resolution, remark_on_rewards
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.shared_data import SharedTables, SharingSettings, is_in_actor
from rllib_calql.store.split import split_episodes
from rllib_calql.store.table_cache import default_cache_dir

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

_NOT_HELD_OUT = " that is not held out"
logger = logging.getLogger(__name__)


class CalQLOfflineData(OfflineData):
    """Reads `config.input_` into a `TransitionStore`, or has trials of Ray Tune share one reading.

    RLlib's own pipeline is not used: it turns every row into an episode of one step, which has no return-to-go, and
    serves the same rows in the same order in every epoch.

    Args:
        config: The algorithm's config.

    Attributes:
        sharing_settings: When and for how long data are shared, if the config wants it.

    Raises:
        FileNotFoundError: If an input does not exist; the message names close matches.
        ValueError: If inputs disagree on spaces, or no spaces are known.
    """

    def __init__(self, config: CalQLConfig) -> None:
        # RLlib's constructor would start reading with Ray Data; only what `Algorithm.setup` sets is declared here.
        self.config = config
        self.locality_hints: list[str] | None = None
        self.learner_handles: list[Any] | None = None
        self.module_spec: Any = None
        self.spaces: dict[str, Any] | None = None
        self.store: TransitionStore | None = None
        self.report: DatasetReport | None = None  # What the data hold; made by `load`.
        self.warnings: list[str] = []  # What looks wrong in the data, one finding each; a result of `train()` has them.
        self.sharing_settings = SharingSettings()
        self._shared_tables: SharedTables | None = None
        self.readers: list[EpisodeReader] = open_input(config.input_, config.read_options)

    @property
    def observation_space(self) -> gym.Space[Any] | None:
        """Observation space that the data's metadata state, or None."""
        return next((r.info.observation_space for r in self.readers if r.info.observation_space is not None), None)

    @property
    def action_space(self) -> gym.Space[Any] | None:
        """Action space that the data's metadata state, or None."""
        return next((r.info.action_space for r in self.readers if r.info.action_space is not None), None)

    @property
    def reference_scores(self) -> tuple[float, float] | None:
        """Returns of a random and of a reference policy in the data's metadata, for the normalised score."""
        return next((r.info.reference_scores for r in self.readers if r.info.reference_scores is not None), None)

    def load(
        self,
        store: TransitionStore,
        connector: AddReturnsToGo,
        *,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
    ) -> None:
        """Reads everything into `store`, and makes the `report`.

        Args:
            store: Receives the offline table.
            connector: Computes returns.
            observation_space: The environment's (or configured) observation space, before flattening.
            action_space: The environment's (or configured) action space.

        Raises:
            ValueError: If the data's spaces differ, an action is out of bounds, or there is nothing to learn from.
            OSError: If the data cannot be read, or do not fit into the cache.
        """
        check_action_space(action_space, "The action space")
        for reader in self.readers:
            check_spaces(reader.info, observation_space, action_space)
        conversion = Conversion(
            observation_space=observation_space,
            action_space=action_space,
            connector=connector,
            actions_without_metadata=self.config.action_space_of_data,
            reference_column=self.config.reference_column,
            obs_dtype=store.obs_dtype,
        )
        compared = observation_space, self._compared_action_space(action_space)
        loaded = load_table(
            self.readers,
            conversion.columns,
            StorageSettings(
                memory_limit=self.config.memory_limit_of_store,
                cache_dir=Path(self.config.cache_dir).expanduser() if self.config.cache_dir else default_cache_dir(),
                gamma=connector.settings.gamma,
                key_parts=[conversion.key_parts, self.config.read_options.key_parts],
            ),
            action_dim=flat_size(action_space),
            failure_reward=self.config.failure_reward,
            spaces=compared,
            check=self._check_report,
            sharing=self._sharing(conversion, compared),
        )
        if loaded is None:
            done = "".join(f" ({count} {what})" for reader in self.readers for what, count in reader.remarks.items())
            raise ValueError(
                f"`input_` {self.config.input_!r} holds no transition{done}; keep unfinished episodes by "
                '`unfinished_episodes="truncate"`, or record longer ones.'
            )
        store.offline, self.report = loaded
        lengths, config = store.offline.lengths, self.config
        store.split = split_episodes(lengths, fraction=config.validation_fraction, seed=config.validation_seed)
        if store.split is not None:
            held_out = store.held_out_episodes()
            self.report = replace(self.report, held_out=(len(held_out), store.split.num_held_out_rows))
            lengths = np.delete(lengths, held_out)
        self._check_target_steps(int(lengths.max()))
        check_resolution(
            self.report,
            observation_space,
            store.observation_statistics,
            is_normalized=self.config.normalize_observations,
            warn=self.warn,
        )
        for finding in findings_on_spaces(self.report, *compared):
            self.warn(finding)
        rewards = connector.settings.transform(np.array(self.report.reward_range)).tolist()
        if remark := remark_on_rewards(*rewards):
            self.warn(remark)
        self.store = store
        self._log_report(self.report)

    def warn(self, finding: str) -> None:
        """Tells the user what looks wrong in the data, in a sentence without its end."""
        self.warnings.append(finding)
        names = ", ".join(self.report.names) if self.report is not None else "offline data"
        logger.warning("%s: %s.", names, finding)

    def close(self) -> None:
        """Gives shared data back, so that they can go once no other trial uses them. `store` stays as it is."""
        if self._shared_tables is not None:
            self._shared_tables.close()

    def _compared_action_space(self, action_space: gym.spaces.Box) -> gym.spaces.Box | None:
        """Space that the data's actions are to be in; None where RLlib recorded what it clips later."""
        if any(reader.info.actions == "module" for reader in self.readers):
            return None
        is_module = self.config.action_space_of_data == "module"
        return gym.spaces.Box(-1.0, 1.0, action_space.shape) if is_module else action_space

    def _sharing(self, conversion: Conversion, compared: Spaces) -> Sharing | None:
        """How the table is shared; None where no other trial can be."""
        if not (self.config.share_offline_data and is_in_actor()):
            return None
        self._shared_tables = SharedTables(self.sharing_settings)
        load = partial(
            _load_elsewhere,
            self.config.input_,
            self.config.read_options,
            replace(conversion, _stored={}),  # What has been seen so far belongs to the readers of this process.
            self.config.failure_reward,
            compared,
        )
        obs_nbytes = conversion.obs_dtype.itemsize * flat_size(conversion.observation_space)
        row_nbytes = obs_nbytes + 4 * (flat_size(conversion.action_space) + 2)  # Reward and return are float32, too.
        return Sharing(self._shared_tables, row_nbytes, load)

    def _check_target_steps(self, longest: int) -> None:
        """Refuses targets of which no episode holds one whole."""
        if self.config.n_step > longest:
            raise ValueError(
                f"`n_step` must be at most {longest}, the steps of the longest episode in `input_` "
                f"{self.config.input_!r}{_NOT_HELD_OUT if self.config.validation_fraction else ''}; got "
                f"{self.config.n_step}. Lower it."
            )

    def _check_report(self, report: DatasetReport) -> None:
        """Refuses data that tell success from failure nowhere."""
        if (
            report.constant_reward is not None
            and report.share_terminated == 0.0
            and self.config.failure_reward is None
            and self.config.reference_column is None
        ):
            raise ValueError(
                f"Every reward in {', '.join(report.names)} is {report.constant_reward} and no episode terminates, so "
                f"nothing tells success from failure; if all of them failed, set "
                f"`failure_reward={report.constant_reward}`, else relabel the rewards."
            )

    def _log_report(self, report: DatasetReport) -> None:
        """Says what the data hold and, as warnings, what was decided about them."""
        logger.info("Offline data:\n%s", report)
        if report.share_outlying_rewards:
            logger.warning("%s: %s.", ", ".join(report.names), report.note_on_outliers)
        for remark, count in report.remarks.items():
            if remark == REPEATED and self.config.missing_final_observation != "repeat":
                continue  # After terminations only, where nothing is bootstrapped from it; the report says it.
            logger.warning("%s: %d %s.", ", ".join(report.names), count, remark)

    @override(OfflineData)
    def sample(
        self, num_samples: int, return_iterator: bool = False, num_shards: int = 1, module_state: Any = None
    ) -> MultiAgentBatch | Iterator[MultiAgentBatch]:
        """Draws offline rows that are not held out uniformly, by RLlib's signature.

        Args:
            num_samples: Rows of one batch.
            return_iterator: Whether to return an endless iterator over batches instead of one batch.
            num_shards: Accepted for RLlib's signature; every learner draws its own rows.
            module_state: Accepted for RLlib's signature.

        Returns:
            A batch, or the iterator.
        """
        return self._batches(num_samples) if return_iterator else next(self._batches(num_samples))

    def _batches(self, num_samples: int) -> Iterator[MultiAgentBatch]:
        if self.store is None:
            raise RuntimeError("The offline data have not been loaded; build the algorithm first.")
        while True:
            columns = self.store.sample(num_batches=1, batch_size=num_samples, num_offline_rows=num_samples)
            yield as_multi_agent_batch(columns)


def _load_elsewhere(
    input_: Any,
    read_options: ReadOptions,
    conversion: Conversion,
    failure_reward: float | None,
    spaces: Spaces,
    max_nbytes: int,
) -> dict[str, Any] | None:
    """Runs `load_parts` in a process that has nothing but these arguments."""
    return load_parts(
        open_input(input_, read_options),
        conversion.columns,
        max_nbytes,
        action_dim=flat_size(conversion.action_space),
        failure_reward=failure_reward,
        spaces=spaces,
    )


def with_spaces_of_data(config: CalQLConfig) -> CalQLConfig:
    """Completes a config with data and without an environment: its spaces are those set, else those of the metadata.

    Raises:
        ValueError: If neither states them.
    """
    if config.env is not None or not config.is_offline:
        return config
    if config.observation_space is not None and config.action_space is not None:
        return config
    data = CalQLOfflineData(config)
    completed: CalQLConfig = config.copy(copy_frozen=False)
    completed.observation_space = config.observation_space or data.observation_space
    completed.action_space = config.action_space or data.action_space
    missing = [name for name in ("observation_space", "action_space") if getattr(completed, name) is None]
    if missing:
        raise ValueError(
            f"There is no environment and the data do not state their {' and '.join(missing)}; set "
            "`.environment(observation_space=..., action_space=...)`, name the environment as `env`, or store the "
            "spaces with the data: `rllib dataset convert DATA minari:mine/data-v0 --action-low=... --action-high=...`."
        )
    completed.freeze()
    return completed


def as_multi_agent_batch(columns: dict[str, Any]) -> MultiAgentBatch:
    """Columns of the default module as the container that RLlib's learner group takes."""
    from ray.rllib.core import DEFAULT_MODULE_ID

    return MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(columns)}, len(next(iter(columns.values()))))


def check_spaces(info: DatasetInfo, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
    """Compares the spaces in the metadata with the environment's: structure and sizes, for actions also bounds.

    Raises:
        ValueError: Naming the data set, both spaces and what is different.
    """
    for kind, recorded, actual in (
        ("observation", info.observation_space, observation_space),
        ("action", info.action_space, action_space),
    ):
        if recorded is None:
            continue
        difference = _difference(recorded, actual, with_bounds=kind == "action")
        if difference is not None:
            raise ValueError(
                f"Dataset {info.name!r} has {kind} space {recorded}, the environment has {actual}; "
                f"use the environment the data come from, or convert the data: the former {difference}."
            )


def _difference(recorded: gym.Space[Any], actual: gym.Space[Any], *, with_bounds: bool) -> str | None:
    """What is different in the spaces, None if nothing is that matters."""
    if not with_bounds and is_flat(recorded) and recorded.shape == (flat_size(actual),):
        return None  # Recorded behind RLlib's `FlattenObservations`.
    difference = difference_of(description_of(recorded), description_of(actual))
    if difference is not None and isinstance(recorded, gym.spaces.Box) and isinstance(actual, gym.spaces.Box):
        remedy = reordering(recorded.shape, actual.shape)
        return difference if remedy is None else f"{difference}, so {remedy}"
    if (
        difference is None
        and with_bounds
        and isinstance(recorded, gym.spaces.Box)
        and isinstance(actual, gym.spaces.Box)
    ):
        is_close = np.allclose(recorded.low, actual.low) and np.allclose(recorded.high, actual.high)
        return None if is_close else "has other bounds"
    return difference
