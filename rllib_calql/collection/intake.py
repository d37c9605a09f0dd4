"""`EpisodeIntake`: episodes that come from outside, read as offline data are and stored as those of env runners are."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from rllib_calql.collection.storing import EpisodeKeeper
from rllib_calql.common.encoding import encoded_space, observation_dtype
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.common.returns import reward_settings, tail_discounts
from rllib_calql.common.spaces import check_action_space, check_observation_space
from rllib_calql.datasets.episodes.columns import IS_INTERVENTION
from rllib_calql.datasets.episodes.reader import EpisodeBlock, EpisodeReader
from rllib_calql.datasets.readers.opening import open_input
from rllib_calql.policy.step_values import checked_flag
from rllib_calql.store.ingestion import Conversion
from rllib_calql.store.offline_data import check_spaces
from rllib_calql.store.offline_table import EpisodeColumns
from rllib_calql.store.returns_connector import TAIL_DISCOUNT, AddReturnsToGo

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

Array = npt.NDArray[Any]
logger = logging.getLogger(__name__)

KINDS_OF_ACTIONS = ("environment", "module")
_TAKEN = "episodes_taken"
_MOST_NAMED = 3


@dataclass(frozen=True)
class ReadEpisode:
    """One whole episode, checked and ready to be stored.

    Attributes:
        name: What messages call it.
        id_: Its id in the data; None where they have none and it is known by its content.
        digest: Of its content.
        rows: Columns as `OnlineRing.append` takes them.
        episode_return: Sum of the rewards as recorded.
        is_terminated: Whether it ended by termination.
    """

    name: str
    id_: str | None
    digest: str
    rows: Mapping[str, Array]
    episode_return: float
    is_terminated: bool

    def __len__(self) -> int:
        """Env steps."""
        return len(self.rows[Columns.REWARDS])


@dataclass(frozen=True)
class AddedEpisodes:
    """What a call of `CalQL.add_episodes` has added.

    Attributes:
        num_episodes: Episodes added.
        num_env_steps: Env steps in them.
        return_mean: Mean of their returns, undiscounted, in recorded rewards; NaN without an episode.
        updates_owed: Gradient updates that they ask for: `updates_per_env_step` for each env step after the warm-up.
        intervention_share: Share of their env steps in which a person acted, in [0, 1]; None if they do not say.
        num_skipped: Episodes that were there before and were left out, with `skip_known`.
    """

    num_episodes: int
    num_env_steps: int
    return_mean: float
    updates_owed: float
    intervention_share: float | None
    num_skipped: int


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_episodes(
    episodes: Any,
    config: CalQLConfig,
    *,
    observation_space: gym.Space[Any],
    action_space: gym.spaces.Box,
    action_space_of_data: str | None = None,
) -> list[ReadEpisode]:
    """Reads all episodes and checks them by the rules of offline data; nothing is stored.

    Args:
        episodes: As `input_`: a path, a URI, an RLlib episode, or a list of these.
        config: Says how incomplete data are read, what rewards become and how many steps fit.
        observation_space: The environment's, before flattening.
        action_space: The environment's.
        action_space_of_data: "environment" or "module", what actions are where the data do not say; None for the
            config's.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ImportError: If the format needs a package that is missing.
        TypeError: If `episodes` is nothing that can be read.
        ValueError: Naming the episode that is broken, unfinished, of other spaces or units, or too long.
    """
    if config._env_to_module_connector is not None:
        raise ValueError(
            "`add_episodes` cannot take episodes of a config with `env_to_module_connector`, through which they would "
            "not pass; do what it does in the environment, and in what writes the episodes."
        )
    if action_space_of_data not in (None, *KINDS_OF_ACTIONS):
        raise ValueError(
            f"`action_space_of_data` must be one of {', '.join(map(repr, KINDS_OF_ACTIONS))}, or None for the "
            f"config's, got {action_space_of_data!r}."
        )
    if isinstance(episodes, (list, tuple)) and not episodes:
        return []
    check_observation_space(observation_space, "The observation space")
    check_action_space(action_space, "The action space")
    conversion = Conversion(
        observation_space=observation_space,
        action_space=action_space,
        connector=AddReturnsToGo(reward_settings(config)),
        actions_without_metadata=action_space_of_data or config.action_space_of_data,
        reference_column=None,  # Online rows have their returns, as those of env runners.
        obs_dtype=observation_dtype(encoded_space(observation_space)),
    )
    with _called_episodes():
        # The file system of the offline data need not be that of the logs; a URI says its own.
        readers = open_input(episodes, replace(config.read_options, columns=frozenset(), filesystem=None))
        for reader in readers:
            check_spaces(reader.info, observation_space, action_space)
        read = [
            episode
            for reader in readers
            for block in reader.blocks()
            for episode in _episodes_of(reader, block, conversion.columns(reader, block), conversion)
        ]
        for reader in readers:
            for remark, count in reader.remarks.items():
                logger.warning("%s: %d %s.", reader.info.name, count, remark)
    for episode in read:
        if len(episode) > config.online_capacity:
            raise ValueError(
                f"{episode.name} has {len(episode)} steps, more than `online_capacity`, {config.online_capacity}; "
                "raise the capacity, or cut the episode."
            )
    return read


def _episodes_of(
    reader: EpisodeReader, block: EpisodeBlock, columns: EpisodeColumns, conversion: Conversion
) -> Iterator[ReadEpisode]:
    settings = conversion.connector.settings
    stops = np.cumsum(columns.lengths).tolist()
    for number, stop in enumerate(stops):
        start = stop - int(columns.lengths[number])
        mine = slice(start, stop)
        observations = columns.observations[mine].astype(conversion.obs_dtype)
        last = columns.final_observations[number : number + 1].astype(conversion.obs_dtype)
        terminateds = np.zeros(stop - start, dtype=np.float32)
        terminateds[-1] = float(columns.terminateds[number])
        rows = {
            Columns.OBS: observations,
            Columns.NEXT_OBS: np.concatenate([observations[1:], last]),
            Columns.ACTIONS: columns.actions[mine],
            Columns.REWARDS: columns.rewards[mine],
            Columns.TERMINATEDS: terminateds,
            Columns.RETURNS_TO_GO: columns.returns_to_go[mine],
        }
        if settings.truncation == "bootstrap":
            weights = tail_discounts(stop - start, settings.gamma)
            rows[TAIL_DISCOUNT] = weights if columns.has_tail[number] else np.zeros_like(weights)
        if (marks := block.extra_model_outputs.get(IS_INTERVENTION)) is not None:
            rows[IS_INTERVENTION] = np.asarray(marks[mine]).reshape(-1) != 0
        recorded = np.asarray(block.rewards[mine], dtype=np.float64)
        yield ReadEpisode(
            name=f"Episode {block.ids[number]!r} of {reader.info.name!r} ({block.where(start)})",
            id_=block.ids[number] if reader.records_ids and _is_name(block.ids[number]) else None,
            digest=_digest(rows, recorded),
            rows=rows,
            episode_return=float(recorded.sum()),
            is_terminated=bool(columns.terminateds[number]),
        )


def _is_name(id_: str) -> bool:
    """Whether an id tells an episode from those of other files, as numbers do not that count from 0 in every file."""
    return any(character.isalpha() for character in id_)


def _digest(rows: Mapping[str, Array], recorded: Array) -> str:
    """Of what an episode holds, whatever file it stands in."""
    digest = hashlib.blake2b(digest_size=16)
    names = (Columns.OBS, Columns.NEXT_OBS, Columns.ACTIONS, Columns.TERMINATEDS)
    for array in (*(rows[name] for name in names), recorded):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextmanager
def _called_episodes() -> Iterator[None]:
    """Lets what readers say of `input_` be said of the episodes."""
    try:
        yield
    except (FileNotFoundError, ImportError, TypeError, ValueError) as err:
        if "`input_`" not in str(err):
            raise
        raise type(err)(str(err).replace("`input_`", "`episodes`")) from err


# --- Storing ----------------------------------------------------------------------------------------------------------


class EpisodeIntake:
    """Stores episodes from outside, each once over the lifetime of a run.

    An episode is known by its id where the data have ids with letters in them, as RLlib's episodes have, and else by
    its content, so that a file may be renamed, moved or given again.

    Args:
        config: The algorithm's config.
        keeper: Stores the rows.
        lifetime: Counts env steps, and the updates that they owe.
        observation_space: The environment's, before flattening.
        action_space: The environment's.

    Attributes:
        taken: Episodes that have been added over the lifetime.
    """

    def __init__(
        self,
        config: CalQLConfig,
        keeper: EpisodeKeeper,
        lifetime: Lifetime,
        *,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._lifetime = lifetime
        self._observation_space = observation_space
        self._action_space = action_space
        self.taken = TakenEpisodes()

    def add(self, episodes: Any, *, skip_known: bool = False, action_space_of_data: str | None = None) -> AddedEpisodes:
        """Adds all episodes or none, see `CalQL.add_episodes`; `ReadEpisode`s are taken as they are."""
        skip_known = checked_flag("skip_known", skip_known)
        if not (isinstance(episodes, list) and episodes and all(isinstance(one, ReadEpisode) for one in episodes)):
            episodes = read_episodes(
                episodes,
                self._config,
                observation_space=self._observation_space,
                action_space=self._action_space,
                action_space_of_data=action_space_of_data,
            )
        new, known = self.taken.divided(episodes)
        if known and not skip_known:
            names = "; ".join(episode.name for episode in known[:_MOST_NAMED])
            more = f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
            raise ValueError(
                f"{len(known)} of {len(episodes)} episodes have been added before: {names}{more}. Nothing was added; "
                "leave them out, or pass `skip_known=True`."
            )
        owed = self._lifetime.updates_owed
        for episode in new:
            self._keeper.keep_rows(episode.rows, is_terminated=episode.is_terminated)
            self._lifetime.count_env_steps_taken(len(episode))
            self.taken.note(episode)
        marks = [episode.rows[IS_INTERVENTION] for episode in new if IS_INTERVENTION in episode.rows]
        num_env_steps = sum(map(len, new))
        return AddedEpisodes(
            num_episodes=len(new),
            num_env_steps=num_env_steps,
            return_mean=float(np.mean([episode.episode_return for episode in new])) if new else math.nan,
            updates_owed=self._lifetime.updates_owed - owed,
            intervention_share=sum(int(mark.sum()) for mark in marks) / num_env_steps if marks else None,
            num_skipped=len(known),
        )

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {_TAKEN: self.taken.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint; nothing is in one of an earlier version."""
        self.taken = taken_in(state)


class TakenEpisodes:
    """Which episodes have been added.

    Args:
        digests: Of contents, by id where there is one, else by themselves.
    """

    def __init__(self, digests: Mapping[str, str] | None = None) -> None:
        self._digests = dict(digests or {})

    def __len__(self) -> int:
        return len(self._digests)

    def divided(self, episodes: Sequence[ReadEpisode]) -> tuple[list[ReadEpisode], list[ReadEpisode]]:
        """Those that are new, and those that were added before or occur twice, both in order.

        Raises:
            ValueError: If an id has come before with another content.
        """
        new, known, now = [], [], TakenEpisodes(self._digests)
        for episode in episodes:
            before = now._digests.get(_key(episode))
            if before is None:
                new.append(episode)
                now.note(episode)
            elif before == episode.digest:
                known.append(episode)
            else:
                raise ValueError(
                    f"{episode.name} has the id of an episode that was added before, and other content. Nothing was "
                    "added; give it an id of its own, or leave the column of ids out."
                )
        return new, known

    def note(self, episode: ReadEpisode) -> None:
        """Takes an episode in."""
        self._digests[_key(episode)] = episode.digest

    def get_state(self) -> dict[str, str]:
        """For the checkpoint."""
        return dict(self._digests)


def taken_in(state: Mapping[str, Any]) -> TakenEpisodes:
    """Which episodes had been added when a checkpoint was written.

    Args:
        state: That of the collection in it.
    """
    return TakenEpisodes(state.get(_TAKEN))


def _key(episode: ReadEpisode) -> str:
    return episode.digest if episode.id_ is None else f"id {episode.id_}"
