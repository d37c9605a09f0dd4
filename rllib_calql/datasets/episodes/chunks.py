"""Episodes that arrive one by one, whole or in chunks: joined, and gathered into blocks of some megabytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import tree
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.common.encoding import flatten_observations
from rllib_calql.datasets.episodes.boundaries import RowBlock
from rllib_calql.datasets.episodes.reader import Nested, ReadOptions
from rllib_calql.datasets.episodes.step_infos import columns_of_infos, complete_columns

_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Chunk:
    """T steps of one episode.

    Attributes:
        id_: Of the episode.
        observations: [T + 1, ...], possibly nested.
        actions: [T, ...], possibly nested.
        rewards: [T]
        terminateds: [T]
        truncateds: [T]
        where: Says where a step was read.
        extra_model_outputs: Further columns of numbers, [T, ...] each.
    """

    id_: str
    observations: Nested
    actions: Nested
    rewards: NDArray[Any]
    terminateds: NDArray[np.bool_]
    truncateds: NDArray[np.bool_]
    where: Callable[[int], str]
    extra_model_outputs: dict[str, NDArray[Any]] = field(default_factory=dict)


def gather(episodes: Iterable[Sequence[Chunk]], *, unfinished_remedy: str) -> Iterator[RowBlock]:
    """Yields the rows of episodes in blocks of some megabytes.

    Args:
        episodes: The chunks of each episode, in order. That their ends meet is for the block's check to find out.
        unfinished_remedy: What to do about an episode that ends neither terminated nor truncated.

    Raises:
        ValueError: If columns of an episode differ in length, or episodes in the shape or type of their rows.
    """
    held: list[Sequence[Chunk]] = []
    num_bytes = 0
    layouts: dict[str, tuple[Any, str]] = {}
    for chunks in episodes:
        for chunk in chunks:
            num_bytes += _check_layout(chunk, layouts)
        # A block has one set of extra columns.
        if held and _extras_of(held[-1]) != _extras_of(chunks):
            yield _row_block(held, unfinished_remedy)
            held, num_bytes = [], 0
        held.append(chunks)
        if num_bytes >= _BLOCK_BYTES:
            yield _row_block(held, unfinished_remedy)
            held, num_bytes = [], 0
    if held:
        yield _row_block(held, unfinished_remedy)


def join_chunks(chunks: Iterable[tuple[SingleAgentEpisode, str]], options: ReadOptions) -> Iterator[list[Chunk]]:
    """Yields the chunks of each RLlib episode when its last one has come; unfinished episodes follow at the end.

    Args:
        chunks: Episodes or parts of them, as sampled, and where each was read.
        options: Says which further columns are wanted.

    Raises:
        ValueError: If an id occurs again after its episode ended, a chunk is missing, or an end is no boolean.
    """
    unfinished: dict[str, tuple[int, list[Chunk]]] = {}
    finished: dict[str, str] = {}
    for episode, where in chunks:
        id_ = str(episode.id_)
        _check_ends(episode, where)
        if id_ in finished:
            raise ValueError(
                f"Episode {id_!r} goes on after its end, or occurs twice: it ended in {finished[id_]}, and is there "
                f"again in {where}; give every episode its own id."
            )
        expected_t, joined = unfinished.setdefault(id_, (episode.t_started, []))
        if episode.t_started != expected_t:
            raise ValueError(
                f"Rows of episode {id_!r} are out of order or missing: its chunk in {where} starts at time "
                f"step {episode.t_started}, expected {expected_t}."
            )
        if len(episode):
            joined.append(_chunk_of(episode, where, options))
        if episode.is_done:
            finished[id_] = where
            del unfinished[id_]
            if joined:
                yield _with_equal_columns(joined)
        else:
            unfinished[id_] = (episode.t, joined)
    yield from (_with_equal_columns(joined) for _, joined in unfinished.values() if joined)


def _with_equal_columns(chunks: list[Chunk]) -> list[Chunk]:
    complete_columns([(len(chunk.rewards), chunk.extra_model_outputs) for chunk in chunks])
    return chunks


def extra_columns_of(episode: SingleAgentEpisode, options: ReadOptions) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """Returns the wanted columns of numbers beside observations, actions and rewards, and the names of the others."""
    extras, ignored = {}, []
    for name in episode.extra_model_outputs:
        if options.wants(name):
            values = episode.get_extra_model_outputs(name, slice(0, len(episode)))
            array = None if isinstance(values, (dict, tuple)) else _array_or_none(values)
            if array is not None and len(array) == len(episode):
                extras[name] = array
                continue
        ignored.append(name)
    return extras, ignored


def observation_space_of(episode: SingleAgentEpisode) -> gym.Space[Any] | None:
    """The recorded observation space, unless a connector changed the observations without changing it.

    Numbers may be of another type than the space's, or a little out of its bounds, and flattened ones still are what
    the space flattens to.
    """
    space: gym.Space[Any] | None = episode.observation_space
    if space is None:
        return None
    one = _with_axis_of_time(episode.get_observations(0))
    try:
        flatten_observations(space, one)
    except (ValueError, TypeError, IndexError, KeyError):
        return None
    return space


def _with_axis_of_time(observation: Any) -> Nested:
    """One observation as a stretch of one; lists of numbers are arrays."""
    if isinstance(observation, Mapping):
        return {key: _with_axis_of_time(part) for key, part in observation.items()}
    if isinstance(observation, tuple):
        return tuple(_with_axis_of_time(part) for part in observation)
    return np.asarray(observation)[None]


def _check_ends(episode: SingleAgentEpisode, where: str) -> None:
    # RLlib takes every value for its truth, "False" and 0.5 among them.
    for name in ("is_terminated", "is_truncated"):
        value = getattr(episode, name)
        if np.asarray(value).shape or np.asarray(value).dtype.kind not in "biuf" or value not in (0, 1):
            raise ValueError(
                f"`{name}` of episode {str(episode.id_)!r} ({where}) must be True or False, got {value!r}; repair it."
            )


def _array_or_none(values: Any) -> NDArray[Any] | None:
    if isinstance(values, list) and values and isinstance(values[0], (dict, tuple)):
        return None
    try:
        array = np.asarray(values)
    except ValueError:  # Rows of different shapes.
        return None
    return array if array.dtype.kind in "fiub" else None


def _chunk_of(episode: SingleAgentEpisode, where: str, options: ReadOptions) -> Chunk:
    num_steps = len(episode)
    ends = np.zeros((2, num_steps), dtype=bool)
    ends[:, -1] = episode.is_terminated, episode.is_truncated
    id_ = str(episode.id_)
    rewards = _stacked(episode.get_rewards(slice(0, num_steps)), Columns.REWARDS, id_, where)
    if not episode.is_numpy and isinstance(rewards, np.ndarray) and rewards.dtype.kind in "iub":
        # Python's 0 and 0.5 are of two types only by accident.
        rewards = rewards.astype(np.float64)
    actions = _stacked(episode.get_actions(slice(0, num_steps)), Columns.ACTIONS, id_, where)
    extras = extra_columns_of(episode, options)[0]
    if isinstance(actions, np.ndarray):
        extras |= columns_of_infos(
            episode.get_infos(), num_steps, actions.shape[1:], lambda t: f"Episode {id_!r}, step {t} of {where}"
        )
    return Chunk(
        id_=id_,
        observations=_stacked(episode.get_observations(slice(0, num_steps + 1)), Columns.OBS, id_, where),
        actions=actions,
        rewards=rewards,
        terminateds=ends[0],
        truncateds=ends[1],
        where=lambda step: f"step {step} of {where}",
        extra_model_outputs=extras,
    )


def _stacked(values: Any, column: str, id_: str, where: str) -> Nested:
    """Arrays as they are; a list with one entry per step becomes arrays."""
    if not isinstance(values, list):
        return values
    try:
        if values and isinstance(values[0], (dict, tuple)):
            return _stacked_parts(values)
        return np.asarray(values)
    except (ValueError, TypeError) as err:
        raise ValueError(
            f"`{column}` of episode {id_!r} ({where}) differs in shape or structure between steps ({err}); every step "
            "must have the same."
        ) from err


def _stacked_parts(values: Sequence[Any]) -> Nested:
    """Parts of dicts and tuples stacked, one entry per step. Lists are no structure but numbers, as in JSON."""
    first = values[0]
    if isinstance(first, Mapping):
        if any(not isinstance(value, Mapping) or value.keys() != first.keys() for value in values):
            raise ValueError(f"not every step has the parts {sorted(map(str, first))}")
        return {key: _stacked_parts([value[key] for value in values]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked_parts(entries) for entries in zip(*values, strict=True))
    return np.stack([np.asarray(value) for value in values])


def _check_layout(chunk: Chunk, layouts: dict[str, tuple[Any, str]]) -> int:
    """Compares a chunk with the first ones, and returns the bytes of its rows."""
    num_steps = len(chunk.rewards)
    columns: dict[str, Nested] = {
        Columns.OBS: chunk.observations,
        Columns.ACTIONS: chunk.actions,
        Columns.REWARDS: chunk.rewards,
        **chunk.extra_model_outputs,
    }
    num_bytes = 0
    for name, values in columns.items():
        expected_rows = num_steps + 1 if name == Columns.OBS else num_steps
        layout = []
        for path, array in [((), values)] if isinstance(values, np.ndarray) else tree.flatten_with_path(values):
            if array.ndim == 0 or len(array) != expected_rows:
                rule = "one observation more than rewards" if name == Columns.OBS else "as many as rewards"
                count = len(array) if array.ndim else "no"
                what = "observations" if name == Columns.OBS else f"`{name}`"
                raise ValueError(
                    f"Episode {chunk.id_!r} ({chunk.where(0)}) has {num_steps} rewards and {count} {what}; there must "
                    f"be {rule}."
                )
            num_bytes += array.nbytes
            layout.append((path, array.dtype, array.shape[1:]))
        expected, first_id = layouts.setdefault(name, (layout, chunk.id_))
        if layout != expected:
            raise ValueError(
                f"`{name}` holds {_describe(layout)} in episode {chunk.id_!r} ({chunk.where(0)}) and "
                f"{_describe(expected)} in episode {first_id!r}; every episode must have the same types and shapes."
            )
    return num_bytes


def _extras_of(chunks: Sequence[Chunk]) -> list[str]:
    """Names of the extra columns that all chunks have."""
    return [name for name in chunks[0].extra_model_outputs if all(name in c.extra_model_outputs for c in chunks)]


def _describe(layout: list[tuple[tuple[Any, ...], Any, tuple[int, ...]]]) -> str:
    return ", ".join(
        f"{'/'.join(map(str, path))}{': ' if path else ''}{dtype} of shape {shape}" for path, dtype, shape in layout
    )


def _row_block(episodes: list[Sequence[Chunk]], unfinished_remedy: str) -> RowBlock:
    chunks = [chunk for parts in episodes for chunk in parts]
    stops = np.cumsum([len(chunk.rewards) for chunk in chunks])

    def joined(parts: list[Nested], rows: slice) -> Nested:
        if isinstance(parts[0], np.ndarray):
            return np.concatenate([part[rows] for part in parts])
        return tree.map_structure(lambda *arrays: np.concatenate([array[rows] for array in arrays]), *parts)

    def where(row: int) -> str:
        number = int(np.searchsorted(stops, row, side="right"))
        return chunks[number].where(row - int(stops[number]) + len(chunks[number].rewards))

    every = slice(None)
    return RowBlock(
        ids=[parts[0].id_ for parts in episodes],
        lengths=np.array([sum(len(chunk.rewards) for chunk in parts) for parts in episodes], dtype=np.int64),
        observations=joined([chunk.observations for chunk in chunks], slice(None, -1)),
        next_observations=joined([chunk.observations for chunk in chunks], slice(1, None)),
        actions=joined([chunk.actions for chunk in chunks], every),
        rewards=joined([chunk.rewards for chunk in chunks], every),
        terminateds=joined([chunk.terminateds for chunk in chunks], every),
        truncateds=joined([chunk.truncateds for chunk in chunks], every),
        extra_model_outputs={
            name: joined([chunk.extra_model_outputs[name] for chunk in chunks], every) for name in _extras_of(chunks)
        },
        where=where,
        unfinished_remedy=unfinished_remedy,
    )
