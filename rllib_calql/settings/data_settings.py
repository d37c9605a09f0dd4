"""`DataSettings`: where the offline data come from, and how rewards and returns are computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ray.rllib.algorithms.algorithm_config import NotProvided
from ray.rllib.algorithms.cql.cql import CQLConfig
from ray.rllib.utils.annotations import override

from rllib_calql.settings.input_settings import checked_input

if TYPE_CHECKING:
    from typing_extensions import Self

PathLike = str | os.PathLike[str]


class DataSettings(CQLConfig):
    """Holds the settings of `.offline_data(...)`, each default with its provenance, see `CalQLSettings`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)

        self.reward_scale = 1.0
        self.reward_bias = 0.0
        self.failure_reward: float | None = None
        self.truncation = "none"  # Authors.
        self.action_space_of_data = "environment"
        self.normalize_observations = False  # Authors.
        self.observation_clip: float | None = 10.0  # Stable-Baselines3's `VecNormalize`, `clip_obs`.
        self.use_recorded_returns = False
        self.unfinished_episodes = "error"
        self.missing_final_observation = "drop_step"
        self.max_episode_steps_in_data: int | None = None
        self.observation_jump_tolerance = 1e-6  # CORL's, there an absolute norm.
        self.store_memory_limit: int | None = None
        self.cache_dir: str | None = None
        self.share_offline_data = True
        self.validation_fraction = 0.0
        self.validation_seed = 0

    @override(CQLConfig)
    def offline_data(
        self,
        *,
        input_: PathLike | Sequence[PathLike] | Any = NotProvided,
        reward_scale: float = NotProvided,
        reward_bias: float = NotProvided,
        failure_reward: float | None = NotProvided,
        truncation: Literal["none", "steady", "bootstrap"] = NotProvided,
        action_space_of_data: Literal["environment", "module"] = NotProvided,
        normalize_observations: bool = NotProvided,
        observation_clip: float | None = NotProvided,
        use_recorded_returns: bool = NotProvided,
        unfinished_episodes: Literal["error", "truncate", "drop"] = NotProvided,
        missing_final_observation: Literal["drop_step", "repeat"] = NotProvided,
        max_episode_steps_in_data: int | None = NotProvided,
        observation_jump_tolerance: float = NotProvided,
        store_memory_limit: int | None = NotProvided,
        cache_dir: PathLike | None = NotProvided,
        share_offline_data: bool = NotProvided,
        validation_fraction: float = NotProvided,
        validation_seed: int = NotProvided,
        **kwargs: Any,
    ) -> Self:
        """Sets where the data come from and how rewards and returns are computed.

        Where the defaults are from is told in `rllib_calql/settings/SETTINGS.md`.

        Args:
            input_: One or more of: "minari:<dataset id>"; a file, folder or URI ("s3://...", "gs://...") of Parquet
                rows, D4RL-style HDF5, NumPy .npz, CSV, LeRobot, robomimic or what RLlib recorded; a column map
                (".yaml") that names its data; a `ray.data.Dataset` of rows; a list of `SingleAgentEpisode`.
            reward_scale: Factor on every reward, offline and online.
            reward_bias: Added after scaling. Reported returns stay in the environment's units.
            failure_reward: In a sparse-reward task, the reward (environment units) of every step of a failed episode;
                such an episode counts as failing for ever.
            truncation: What follows the last step of an episode that was cut: nothing ("none"), its last reward for
                ever ("steady"), or the learner's value estimate of the last observation ("bootstrap").
            action_space_of_data: Whether actions in data without metadata are in the environment's units or in the
                module's [-1, 1].
            normalize_observations: Whether observations are normalised by the offline data's mean and deviation. What
                is nearly constant in the data, to float32, has its mean subtracted only.
            observation_clip: With `normalize_observations`, the largest size of a normalised observation, in standard
                deviations; larger ones are clipped, in training, collection and evaluation alike. None or infinity:
                they are not.
            use_recorded_returns: Whether the data's own column `returns_to_go`, in units of training rewards, is used
                as it is instead of computing returns.
            unfinished_episodes: What becomes of an episode that ends neither terminated nor truncated: "error",
                "truncate" (it counts as cut at its last row) or "drop".
            missing_final_observation: Where a format stores no observation after an episode's last step and the
                episode was cut: "drop_step" (the last row only gives that observation) or "repeat" the last one.
            max_episode_steps_in_data: In rows without episode ids, the steps after which an episode ends at the latest.
            observation_jump_tolerance: In rows without episode ids, an episode ends where an observation differs by
                more than this, relative to max(1, |obs|), from the next observation of the row before.
            store_memory_limit: Bytes of memory for offline transitions; more of them go to memory-mapped files in
                `cache_dir`. None: half of the machine's memory.
            cache_dir: Folder of these files. None: `rllib_calql` in the user's cache folder.
            share_offline_data: Whether the trials of Ray Tune share one copy of the offline transitions per node, in
                Ray's object store.
            validation_fraction: Share of the episodes, at least 0 and below 1, that training never sees: whole
                episodes, `round(share * episodes)` of them. Every evaluation says how critics and policy do on them,
                also without an environment.
            validation_seed: Draws these episodes, and nothing else does: runs that differ in `seed` hold out the same.
            **kwargs: RLlib's own settings (`input_filesystem`, `input_filesystem_kwargs`).

        Returns:
            This config.
        """
        if input_ is not NotProvided:
            filesystem = kwargs.get("input_filesystem", self.input_filesystem)
            kwargs["input_"] = checked_input(input_, is_local=filesystem is None)
        if cache_dir is not NotProvided and cache_dir is not None:
            cache_dir = os.fspath(cache_dir)
            # Tune runs each trial in a folder of its own, where a relative one would never be found again.
            cache_dir = os.path.abspath(cache_dir) if cache_dir and not cache_dir.startswith("~") else cache_dir
        super().offline_data(**kwargs)
        self._set_provided(
            reward_scale=reward_scale,
            reward_bias=reward_bias,
            failure_reward=failure_reward,
            truncation=truncation,
            action_space_of_data=action_space_of_data,
            normalize_observations=normalize_observations,
            observation_clip=observation_clip,
            use_recorded_returns=use_recorded_returns,
            unfinished_episodes=unfinished_episodes,
            missing_final_observation=missing_final_observation,
            max_episode_steps_in_data=max_episode_steps_in_data,
            observation_jump_tolerance=observation_jump_tolerance,
            store_memory_limit=store_memory_limit,
            cache_dir=cache_dir,
            share_offline_data=share_offline_data,
            validation_fraction=validation_fraction,
            validation_seed=validation_seed,
        )
        return self

    def _set_provided(self, **settings: Any) -> None:
        for name, value in settings.items():
            if value is not NotProvided:
                setattr(self, name, value)
