"""One episode of a data set: found by its id or number, and what is shown of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tree
from numpy.typing import NDArray

from rllib_calql.common.encoding import flat_places, leaf_name
from rllib_calql.common.returns import RewardSettings, returns_of_episodes
from rllib_calql.datasets.episodes.columns import EXECUTED_ACTIONS, IS_INTERVENTION
from rllib_calql.datasets.episodes.reader import EpisodeBlock, EpisodeReader, Nested
from rllib_calql.system.similar_words import close_matches

_FEW = 3  # Ids at each end that are named.
_MOST_COMPARED = 10_000  # Ids in which similar ones are looked for.

Numbers = Sequence[tuple[str, NDArray[Any]]]
"""Name and values [T] of each number of observations or actions."""


@dataclass(frozen=True)
class FoundEpisode:
    """An episode, cut out of its data.

    Attributes:
        block: The episode alone, T rows.
        reader: What it was read by.
        index: Its number among all episodes of all inputs, from 0.
    """

    block: EpisodeBlock
    reader: EpisodeReader
    index: int


@dataclass(frozen=True)
class EpisodeView:
    """What is shown of an episode of T steps.

    Attributes:
        name: Of the data.
        id: Of the episode.
        index: Its number among all episodes, from 0.
        is_terminated: Whether it ended by termination; else it was cut.
        observations: The numbers that are drawn.
        images: By the name of their part, [T, height, width, channels] bytes each.
        actions: As they were asked for.
        are_module_actions: Whether `actions` are what an RLModule put out, [-1, 1] for the whole range; else they are
            in the environment's units.
        executed: What was executed in their place, in the environment's units, NaN where nothing is said; empty if the
            data do not say it.
        is_intervention: [T] Where a person chose the action; None if the data do not say it.
        rewards: [T] Of the environment.
        returns_to_go: [T] Discounted, by `settings`.
        settings: What the returns are computed by.
    """

    name: str
    id: str
    index: int
    is_terminated: bool
    observations: Numbers
    images: Mapping[str, NDArray[np.uint8]]
    actions: Numbers
    are_module_actions: bool
    executed: Numbers
    is_intervention: NDArray[np.bool_] | None
    rewards: NDArray[np.float64]
    returns_to_go: NDArray[Any]
    settings: RewardSettings

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.rewards)


def find_episode(readers: Sequence[EpisodeReader], wanted: str) -> FoundEpisode:
    """The first episode of an id; if none has it, that of the number, counted over all inputs from 0.

    Raises:
        ValueError: If there is none; with the ids that there are. As `EpisodeReader.blocks`.
    """
    number = int(wanted) if wanted.isascii() and wanted.isdecimal() else None
    of_number: FoundEpisode | None = None
    ids: list[str] = []
    for reader in readers:
        for block in reader.blocks():
            for place, id_ in enumerate(block.ids):
                if id_ == wanted:
                    return FoundEpisode(_cut(block, place), reader, len(ids))
                if number == len(ids):
                    of_number = FoundEpisode(_cut(block, place), reader, number)
                ids.append(id_)
    if of_number is not None:
        return of_number
    names = ", ".join(repr(reader.info.name) for reader in readers)
    if not ids:
        raise ValueError(f"There is no episode in {names}.")
    shown = ids if len(ids) <= 2 * _FEW else [*ids[:_FEW], "...", *ids[-_FEW:]]
    listed = ", ".join("..." if id_ == "..." else repr(id_) for id_ in shown)
    raise ValueError(
        f"There is no episode {wanted!r} in {names}.{close_matches(wanted, ids[:_MOST_COMPARED])} There are "
        f"{len(ids):,}: {listed}; name one by its id, or by its number from 0 to {len(ids) - 1}."
    )


def _cut(block: EpisodeBlock, place: int) -> EpisodeBlock:
    """One episode of a block, copied: it must not keep the block alive."""
    stop = int(np.cumsum(block.lengths)[place])
    start = stop - int(block.lengths[place])
    one = slice(place, place + 1)
    where = block.where
    return replace(
        block,
        ids=[block.ids[place]],
        lengths=block.lengths[one].copy(),
        observations=tree.map_structure(lambda array: array[start:stop].copy(), block.observations),
        final_observations=tree.map_structure(lambda array: array[one].copy(), block.final_observations),
        actions=tree.map_structure(lambda array: array[start:stop].copy(), block.actions),
        rewards=block.rewards[start:stop].copy(),
        terminateds=block.terminateds[one].copy(),
        truncateds=block.truncateds[one].copy(),
        where=lambda row: where(start + row),
        extra_model_outputs={name: array[start:stop].copy() for name, array in block.extra_model_outputs.items()},
    )


def view_of(
    found: FoundEpisode,
    settings: RewardSettings,
    *,
    last_value: float | None = None,
    dimensions: Sequence[int] | None = None,
) -> EpisodeView:
    """What is shown of an episode.

    Args:
        found: The episode.
        settings: What returns are computed by.
        last_value: Value of the last observation, for the truncation rule "bootstrap".
        dimensions: Which numbers of the observations are drawn, by their places in the flat observation; None: all.

    Raises:
        ValueError: If there is no such number in the observations.
    """
    block = found.block
    numbers, images = _parts(block.observations)
    if dimensions is not None:
        numbers = _chosen(numbers, dimensions)
    actions, _ = _parts(block.actions)
    executed = block.extra_model_outputs.get(EXECUTED_ACTIONS[0])
    marks = block.extra_model_outputs.get(IS_INTERVENTION)
    returns, _ = returns_of_episodes(
        block.rewards,
        block.lengths,
        terminateds=block.terminateds,
        settings=settings,
        last_values=None if last_value is None else np.array([last_value]),
    )
    return EpisodeView(
        name=found.reader.info.name,
        id=block.ids[0],
        index=found.index,
        is_terminated=bool(block.terminateds[0]),
        observations=numbers,
        images=images,
        actions=actions,
        are_module_actions=found.reader.info.actions == "module",
        executed=() if executed is None else _parts(executed)[0],
        is_intervention=None if marks is None else np.asarray(marks).reshape(block.num_rows, -1)[:, 0] > 0,
        rewards=np.asarray(block.rewards, dtype=np.float64),
        returns_to_go=returns,
        settings=settings,
    )


def places_of_text(text: str, name: str) -> list[int]:
    """The numbers that a text such as "0,3-5" names.

    Args:
        text: What a user wrote.
        name: What it is called in the message.

    Raises:
        ValueError: If it names none.
    """
    places: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdecimal() for end in ends) or int(ends[0]) > int(ends[1]):
            raise ValueError(f"{name} must be numbers from 0, such as 0,3-5, got {text!r}.")
        places += range(int(ends[0]), int(ends[1]) + 1)
    return places


def _parts(values: Nested) -> tuple[list[tuple[str, NDArray[Any]]], dict[str, NDArray[np.uint8]]]:
    """The numbers and the images of observations or actions; keys of a Dict in sorted order, as they are flattened."""
    numbers: list[tuple[str, NDArray[Any]]] = []
    images: dict[str, NDArray[np.uint8]] = {}
    for path, array in tree.flatten_with_path(values):
        name = leaf_name("/".join(map(str, path)))
        if array.ndim == 4 and array.dtype == np.uint8:
            images[name] = array
            continue
        columns = array.reshape(len(array), -1)
        places = flat_places(array.shape[1:], columns.shape[1])
        numbers += [(f"{name}{place}", columns[:, column]) for column, place in enumerate(places)]
    return numbers, images


def _chosen(numbers: Numbers, dimensions: Sequence[int]) -> list[tuple[str, NDArray[Any]]]:
    if missing := [place for place in dimensions if place >= len(numbers)]:
        raise ValueError(
            f"`--dimensions` names the number {missing[0]} of the observations, which have {len(numbers)} numbers, "
            f"from 0 to {len(numbers) - 1}."
            if numbers
            else "`--dimensions` chooses numbers of the observations, which are images alone; drop it."
        )
    return [numbers[place] for place in dimensions]
