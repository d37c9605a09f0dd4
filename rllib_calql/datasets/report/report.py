"""Collects the report about a data set while its episodes pass by, and says what looks wrong.

Three numbers per episode are kept, whatever the rows hold, and a histogram.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rllib_calql.common.returns import failure_tolerance
from rllib_calql.common.spaces import WIDEST
from rllib_calql.datasets.episodes.columns import IS_INTERVENTION
from rllib_calql.datasets.episodes.reader import (
    DROPPED,
    DROPPED_STEPS,
    TRUNCATED,
    DatasetInfo,
    EpisodeBlock,
    EpisodeReader,
)
from rllib_calql.datasets.report.arrays import ArrayCollector
from rllib_calql.datasets.report.comparison import bounds_of
from rllib_calql.datasets.report.magnitudes import Magnitudes
from rllib_calql.datasets.report.summary import (
    ArrayInfo,
    DatasetReport,
    Distribution,
    format_number,
    format_share,
)

__all__ = ["ArrayInfo", "DatasetReport", "Distribution", "ReportBuilder"]

_SMALL_PART = 0.1  # Of the width of the action bounds.
_REMARKABLE_SHARE = 0.01  # Of the episodes.


class ReportBuilder:
    """Collects a report while blocks of episodes pass by.

    Args:
        failure_reward: Reward of every step of a failed episode (environment units), or None.
        keep_distributions: Whether the report keeps the return and the length of every episode.
        observation_space: Space to compare observations with; None: not compared.
        action_space: Space to compare actions with; None: not compared.
        measures_images: Whether pictures are measured as well, which takes long, all numbers of one as one.

    Raises:
        ValueError: If `failure_reward` is not finite.
    """

    def __init__(
        self,
        failure_reward: float | None = None,
        *,
        keep_distributions: bool = False,
        observation_space: gym.Space[Any] | None = None,
        action_space: gym.Space[Any] | None = None,
        measures_images: bool = False,
    ) -> None:
        if failure_reward is not None and not math.isfinite(failure_reward):
            raise ValueError(f"`failure_reward` must be a finite number or None, got {failure_reward}.")
        self._failure_reward = failure_reward
        self._keep_distributions = keep_distributions
        self._infos: list[DatasetInfo] = []
        self._remarks: Counter[str] = Counter()
        # `array` grows in place; a list of arrays would cost more than their numbers where blocks hold one episode.
        self._returns = array("d")
        self._lengths = array("q")
        self._constants = array("d")  # The reward of episodes of two or more equal rewards, NaN for all others.
        self._num_terminated = 0
        self._num_failed = 0
        self._num_interventions: int | None = None
        self._reward_range = (math.inf, -math.inf)
        self._magnitudes = Magnitudes()
        self._observations, self._actions = (
            ArrayCollector(column, partial(bounds_of, space), measures_images=measures_images)
            for column, space in (("obs", observation_space), ("actions", action_space))
        )

    def add(self, block: EpisodeBlock) -> None:
        """Adds the episodes of a block.

        Raises:
            ValueError: If observations or actions have another structure or shape than in earlier blocks, or the
                rewards of an episode sum to more than float32 can hold.
        """
        self._observations.add(block.observations, block)
        self._actions.add(block.actions, block)
        rewards = np.asarray(block.rewards, dtype=np.float64)
        starts = np.cumsum(block.lengths) - block.lengths
        self._returns.frombytes(_returns(block, rewards, starts).tobytes())
        lengths = np.asarray(block.lengths, dtype=np.int64)
        self._lengths.frombytes(lengths.tobytes())
        lowest, highest = np.minimum.reduceat(rewards, starts), np.maximum.reduceat(rewards, starts)
        constants = np.where((lowest == highest) & (lengths > 1), lowest, np.nan)
        self._constants.frombytes(constants.tobytes())
        low, high = self._reward_range
        self._reward_range = (min(low, float(lowest.min())), max(high, float(highest.max())))
        self._magnitudes.add(rewards)
        self._num_terminated += int(np.count_nonzero(block.terminateds))
        if (interventions := block.extra_model_outputs.get(IS_INTERVENTION)) is not None:
            self._num_interventions = (self._num_interventions or 0) + int(np.count_nonzero(interventions))
        if self._failure_reward is not None:
            # All rewards are near a number exactly if the lowest and the highest are.
            tolerance = failure_tolerance(np.asarray(block.rewards).dtype) * abs(self._failure_reward)
            near = [np.abs(extreme - self._failure_reward) <= tolerance for extreme in (lowest, highest)]
            self._num_failed += int(np.count_nonzero(near[0] & near[1]))

    def add_reader(self, reader: EpisodeReader) -> None:
        """Takes what a reader says about its data; to be called after the blocks of its latest pass were added."""
        self._infos.append(reader.info)
        self._remarks.update(reader.remarks)

    def build(self) -> DatasetReport:
        """Returns the report on everything added so far.

        Raises:
            ValueError: If there is no episode to report on.
        """
        names = tuple(info.name for info in self._infos)
        num_episodes = len(self._returns)
        if not num_episodes:
            done = "".join(f" ({count:,} {remark})" for remark, count in self._remarks.items() if count)
            remedy = 'keep unfinished episodes by `unfinished_episodes="truncate"`, or check the columns that end them'
            if self._remarks[DROPPED_STEPS] and not self._remarks[DROPPED]:
                remedy = 'keep last steps by `missing_final_observation="repeat"`, or check the columns that end them'
            raise ValueError(
                f"Dataset {', '.join(map(repr, names))} has no whole episode to report on{done}; {remedy}."
            )
        returns, lengths = np.array(self._returns), np.array(self._lengths)
        unfinished, dropped = self._remarks[TRUNCATED] + self._remarks[DROPPED], self._remarks[DROPPED]
        lowest, highest = self._reward_range
        return_distribution = Distribution.of(returns)
        usual_reward, share_outlying = self._magnitudes.summary()
        report = DatasetReport(
            names=names,
            num_episodes=num_episodes,
            num_transitions=int(lengths.sum()),
            share_terminated=self._num_terminated / num_episodes,
            share_truncated=(num_episodes - self._num_terminated) / num_episodes,
            # An unfinished episode of one step may have vanished with its last step.
            share_unfinished=unfinished / max(num_episodes + dropped, unfinished),
            return_distribution=return_distribution,
            length_distribution=Distribution.of(lengths),
            reward_range=self._reward_range,
            usual_reward=usual_reward,
            share_outlying_rewards=share_outlying,
            constant_reward=lowest if lowest == highest else None,
            failure_reward=self._failure_reward,
            share_interventions=(
                None if self._num_interventions is None else self._num_interventions / int(lengths.sum())
            ),
            share_failed=None if self._failure_reward is None else self._num_failed / num_episodes,
            normalized_scores=_normalized_scores(self._infos, return_distribution),
            observations=self._observations.build(),
            actions=self._actions.build(),
            ignored_columns=tuple(dict.fromkeys(name for info in self._infos for name in info.ignored_columns)),
            remarks={remark: count for remark, count in self._remarks.items() if count},
            notes=(),
            returns=returns if self._keep_distributions else None,
            lengths=lengths if self._keep_distributions else None,
        )
        share_lowest = np.count_nonzero(np.array(self._constants) == lowest) / num_episodes
        notes = (
            *_notes_on_ends(report, int(np.count_nonzero(lengths == 1))),
            *_notes_on_rewards(report, share_lowest),
            *_notes_on_actions(report, self._infos),
        )
        return replace(report, notes=notes)


def _returns(block: EpisodeBlock, rewards: NDArray[np.float64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        returns: NDArray[np.float64] = np.add.reduceat(rewards, starts)
    too_large = ~(np.abs(returns) <= np.finfo(np.float32).max)
    if too_large.any():
        episode = int(np.argmax(too_large))
        raise ValueError(
            f"The rewards of episode {block.ids[episode]!r}, from {block.where(int(starts[episode]))} on, sum to "
            f"{returns[episode]:.3g}, but training stores returns as float32; repair or scale the rewards."
        )
    return returns


def _normalized_scores(infos: Sequence[DatasetInfo], returns: Distribution) -> tuple[float, float, float] | None:
    """On D4RL's scale, 0 to 100 between the references, as evaluations report it."""
    references = {info.reference_scores for info in infos}
    reference = references.pop() if len(references) == 1 else None
    if reference is None or reference[0] == reference[1]:
        return None
    low, high = reference
    least, mean, largest = (
        100.0 * (value - low) / (high - low) for value in (returns.minimum, returns.mean, returns.maximum)
    )
    return least, mean, largest


def _notes_on_ends(report: DatasetReport, num_one_step: int) -> Iterator[str]:
    lengths = report.length_distribution
    if report.share_unfinished:
        yield f"{format_share(report.share_unfinished)} of the episodes have no end in the data"
    if not report.share_terminated:
        yield "no episode terminated: right only if the task has neither a goal nor a failure that ends it"
    if report.share_terminated == 1.0 and report.num_episodes > 1 and lengths.minimum == lengths.maximum > 1:
        yield (
            f"every episode terminated after exactly {format_number(lengths.maximum)} steps: time-outs may have been "
            "stored as terminations"
        )
    if num_one_step == report.num_episodes:
        yield "every episode has a single step: right only for bandits; check what marks the end of an episode"
    elif num_one_step:
        yield f"{num_one_step:,} of the episodes have a single step"


def _notes_on_rewards(report: DatasetReport, share_lowest: float) -> Iterator[str]:
    returns, lowest = report.return_distribution, report.reward_range[0]
    if report.constant_reward is not None:
        yield f"all rewards are {format_number(report.constant_reward)}: they say nothing about what is better"
    elif returns.minimum == returns.maximum and report.num_episodes > 1:
        yield "all returns are equal: no episode is better than another"
    if report.share_outlying_rewards:
        yield report.note_on_outliers
    if report.share_failed == 1.0:
        yield "all episodes failed: there is no success to learn from"
    elif report.share_failed == 0.0:
        yield (
            f"no episode failed, though `failure_reward` is {report.failure_reward}: the rewards lie in "
            f"[{format_number(lowest)}, {format_number(report.reward_range[1])}]"
        )
    elif report.failure_reward is None and report.constant_reward is None and share_lowest >= _REMARKABLE_SHARE:
        yield (
            f"{format_share(share_lowest)} of the episodes have the lowest reward at every step: if they failed, set "
            f"`failure_reward={lowest}`"
        )


def _notes_on_actions(report: DatasetReport, infos: Sequence[DatasetInfo]) -> Iterator[str]:
    for info in report.observations + report.actions:
        if " and " in info.dtype:
            yield f"parts of the data differ in type: {info.dtype}"
    for info in report.actions:
        name = f"actions {info.path!r}" if info.path else "actions"
        low, high = np.array(info.low), np.array(info.high)
        constant = low == high
        if constant.any():
            yield f"{name} are constant in {_dimensions(constant)}"
        bounds = _action_bounds(infos, low.size)
        if bounds is not None:
            outside = (low < bounds[0]) | (high > bounds[1])
            small = ~constant & (high - low < _SMALL_PART * (bounds[1] - bounds[0]))
            if outside.any():
                yield f"{name} leave the bounds of the action space in {_dimensions(outside)}"
            if small.any():
                yield (
                    f"{name} use less than {format_share(_SMALL_PART)} of the range of the action space in "
                    f"{_dimensions(small)}: they may be in other units"
                )
        elif all(info.actions == "environment" for info in infos):
            outside = (low < -1.0) | (high > 1.0)
            if outside.any() and not outside.all():
                yield f"{name} exceed [-1, 1] only in {_dimensions(outside)}: dimensions may differ in units"


def _action_bounds(infos: Sequence[DatasetInfo], num_dimensions: int) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Finite bounds of the plain action space that all inputs record for the actions they hold, flat."""
    spaces = [info.action_space if info.actions == "environment" else None for info in infos]
    if not spaces or any(space != spaces[0] for space in spaces) or not isinstance(spaces[0], gym.spaces.Box):
        return None
    low, high = spaces[0].low.ravel(), spaces[0].high.ravel()
    # Bounds such as the largest float32 are none, and say nothing about what part of them is used.
    is_usable = low.size == num_dimensions and bool((np.abs(low) <= WIDEST).all() and (np.abs(high) <= WIDEST).all())
    return (low.astype(np.float64), high.astype(np.float64)) if is_usable else None


def _dimensions(chosen: NDArray[np.bool_]) -> str:
    if chosen.all():
        return "every dimension"
    indices = np.flatnonzero(chosen).tolist()
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    return f"dimension{'s' if len(indices) > 1 else ''} {shown}"
