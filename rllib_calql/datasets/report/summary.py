"""What a report about a data set says, how it is printed, and how it is stored."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllib_calql.common.encoding import flat_places, leaf_name
from rllib_calql.datasets.report.magnitudes import OUTLIER_FACTOR

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_QUANTILE_NAMES = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max", "mean", "std")
_NOT_STORED = ("returns", "lengths", "held_out")  # Arrays, and what is no property of the data.
_WIDTH = 110  # Columns of a terminal.
_LABEL_WIDTH = 18
_MOST_ROWS = 40  # Of one array in a table of ranges.


@dataclass(frozen=True)
class Distribution:
    """Summary of one number per episode; quantiles interpolate linearly and `std` is the population's."""

    minimum: float
    percentile_5: float
    percentile_25: float
    median: float
    percentile_75: float
    percentile_95: float
    maximum: float
    mean: float
    std: float

    @classmethod
    def of(cls, values: NDArray[Any]) -> Distribution:
        """Summarises at least one value."""
        quantiles = np.quantile(values, _QUANTILES).tolist()
        moments = float(values.mean()), float(values.std())
        if quantiles[0] == quantiles[-1]:  # The rounding of a mean would make up a spread.
            moments = quantiles[0], 0.0
        return cls(*[*quantiles, *moments])


def is_wide(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this type may differ and still be one number in float32."""
    return dtype.kind in "iuf" and dtype.itemsize >= (8 if dtype.kind == "f" else 4)


@dataclass(frozen=True)
class ArrayInfo:
    """One array of the observations or actions.

    Attributes:
        path: Keys that lead to it in nested data, joined by "/"; "" for plain arrays.
        dtype: As stored, e.g. "float32"; several, joined by " and ", if they differ between parts of the data.
        shape: Of one row.
        low: Least value per dimension (row-major order). One for all dimensions of pictures and very long rows, or none
            where these are not measured.
        high: Largest value, likewise.
        mean: Mean, likewise.
        std: Population's standard deviation, likewise.
        constant: Whether all values are one, up to rounding, likewise.
        share_outside: Share of the values outside the bounds of the space that the data were compared with, in [0, 1],
            per dimension; empty without such bounds.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    constant: tuple[bool, ...] = ()
    share_outside: tuple[float, ...] = ()


@dataclass(frozen=True)
class DatasetReport:
    """What a data set holds, in units of the environment.

    Attributes:
        names: The inputs as the user wrote them.
        num_episodes: Whole episodes, after the treatment of unfinished ones.
        num_transitions: Their rows.
        share_terminated: Share of the episodes that ended by termination, in [0, 1].
        share_truncated: Share that was cut and not terminated, with the unfinished ones that were taken as truncated.
        share_unfinished: Share that had no end in the data, among the episodes reported on and those dropped.
        return_distribution: Of the undiscounted returns.
        length_distribution: Of the number of steps.
        reward_range: Least and largest reward of a step.
        usual_reward: 99.9 % quantile of the sizes of the rewards that are not 0, see `Magnitudes`.
        share_outlying_rewards: Share of the rewards over `OUTLIER_FACTOR` times that, in [0, 1].
        constant_reward: The reward of every step if they are all equal, else None.
        failure_reward: As given; None if no failure rule applies.
        share_interventions: Share of the steps in which a person chose the action, in [0, 1]; None if no input says it.
        share_failed: Share of the episodes whose every reward is `failure_reward`; None without it.
        normalized_scores: Least, mean and largest return on the scale of `EvaluationHistory.normalized_score` (0 is
            the lower reference, 100 the upper one); None unless all inputs record the same reference scores.
        observations: Arrays of the observations.
        actions: Arrays of the actions, with their ranges.
        ignored_columns: Columns of the data that are not read.
        remarks: What was decided about incomplete data, counted by kind.
        notes: What looks wrong, one sentence each.
        returns: [E] in order of reading, if they were asked for; not stored by `to_dict`.
        lengths: [E] likewise.
        held_out: Episodes and transitions that a run holds out; None if it holds out none, or there is no run. Not
            stored, for the data do not depend on it. All other numbers are of the whole data.
    """

    names: tuple[str, ...]
    num_episodes: int
    num_transitions: int
    share_terminated: float
    share_truncated: float
    share_unfinished: float
    return_distribution: Distribution
    length_distribution: Distribution
    reward_range: tuple[float, float]
    usual_reward: float
    share_outlying_rewards: float
    constant_reward: float | None
    failure_reward: float | None
    share_interventions: float | None
    share_failed: float | None
    normalized_scores: tuple[float, float, float] | None
    observations: tuple[ArrayInfo, ...]
    actions: tuple[ArrayInfo, ...]
    ignored_columns: tuple[str, ...]
    remarks: dict[str, int]
    notes: tuple[str, ...]
    returns: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    lengths: NDArray[np.int64] | None = field(default=None, repr=False, compare=False)
    held_out: tuple[int, int] | None = None

    @property
    def share_succeeded(self) -> float | None:
        """Share of the episodes that did not fail; None without a failure rule."""
        return None if self.share_failed is None else 1.0 - self.share_failed

    @property
    def note_on_outliers(self) -> str:
        """What rewards that stand out mean, in a sentence."""
        return (
            f"{format_share(self.share_outlying_rewards)} of the rewards are over {OUTLIER_FACTOR:,} times the usual "
            f"size, {format_number(self.usual_reward)}: unless the task has such rewards they are glitches, and one of "
            "them spoils Q for long; repair them, or drop their episodes"
        )

    @property
    def headline(self) -> str:
        """One line: the sizes, how episodes end, the mean return, and what was decided about incomplete data."""
        parts = [
            f"{self.num_episodes:,} episodes, {self.num_transitions:,} transitions",
            f"{format_share(self.share_terminated)} terminated",
            f"mean return {format_number(self.return_distribution.mean)}",
        ]
        if self.share_failed is not None:
            parts.append(f"{format_share(self.share_failed)} failed")
        if self.share_interventions:
            parts.append(f"{format_share(self.share_interventions)} interventions")
        if self.share_outlying_rewards:
            parts.append(f"{format_share(self.share_outlying_rewards)} of the rewards over {OUTLIER_FACTOR:,} x usual")
        if self.held_out is not None:
            parts[0] += " (held out {:,} and {:,})".format(*self.held_out)
        return "; ".join([", ".join(parts), *(f"{count:,} {remark}" for remark, count in self.remarks.items())])

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays and what is held out, for JSON: its numbers are finite."""
        content = asdict(replace(self, returns=None, lengths=None))
        return {name: value for name, value in content.items() if name not in _NOT_STORED}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DatasetReport:
        """The report that `to_dict` stored, number for number.

        Raises:
            ValueError: If names are missing or unknown, as in a report of another version.
        """
        expected = {known.name for known in fields(cls)} - set(_NOT_STORED)
        if set(content) != expected:
            differing = ", ".join(f"`{name}`" for name in sorted(set(content) ^ expected))
            raise ValueError(f"The stored dataset report lacks or has in excess {differing}; build the report anew.")
        scores = content["normalized_scores"]
        values: dict[str, Any] = {
            **content,
            **{name: tuple(content[name]) for name in ("names", "reward_range", "ignored_columns", "notes")},
            **{name: Distribution(**content[name]) for name in ("return_distribution", "length_distribution")},
            **{name: tuple(map(_array_info, content[name])) for name in ("observations", "actions")},
            "normalized_scores": None if scores is None else tuple(scores),
        }
        return cls(**values)

    def _held_out_of(self, what: int) -> str:
        """How many of the episodes (0) or transitions (1) are held out, and how many are left to train on."""
        if self.held_out is None:
            return ""
        total, held_out = (self.num_episodes, self.num_transitions)[what], self.held_out[what]
        return f", {held_out:,} of them held out and {total - held_out:,} to train on"

    def __str__(self) -> str:
        """Rows of label and text, at most 110 columns wide unless a name is longer."""
        shares = map(format_share, (self.share_terminated, self.share_truncated, self.share_unfinished))
        counts = [
            ("dataset" if len(self.names) < 2 else "datasets", ", ".join(self.names) or "-"),
            ("episodes", f"{self.num_episodes:,}{self._held_out_of(0)}"),
            ("transitions", f"{self.num_transitions:,}{self._held_out_of(1)}"),
            ("ended", "terminated {}, truncated {}; without an end in the data {}".format(*shares)),
        ]
        if self.share_interventions is not None:
            counts.append(("interventions", f"a person acted in {format_share(self.share_interventions)} of the steps"))
        rewards = [
            ("reward", _interval(*self.reward_range)),
            (
                "outlying rewards",
                f"{format_share(self.share_outlying_rewards)} over {OUTLIER_FACTOR:,} times the usual size, "
                f"{format_number(self.usual_reward)} (99.9 % quantile of those that are not 0)",
            ),
        ]
        if self.failure_reward is not None and self.share_failed is not None:
            succeeded, failed = format_share(1.0 - self.share_failed), format_share(self.share_failed)
            reward = format_number(self.failure_reward)
            rewards.append(("success", f"{succeeded} of the episodes; in {failed} every reward is {reward}"))
        if self.normalized_scores is not None:
            rewards.append(("normalised score", "min {:.2f}, mean {:.2f}, max {:.2f}".format(*self.normalized_scores)))
        arrays = [("observations", _array_line(info)) for info in self.observations]
        ranges = [*range_table("observations", self.observations), *range_table("actions", self.actions)]
        for info in self.actions:
            arrays += [("actions", _array_line(info)), ("action range", _range_line(info))]
        ends = [("ignored columns", ", ".join(self.ignored_columns) or "none")]
        ends += [("remarks", f"{remark}: {count:,}") for remark, count in self.remarks.items()]
        ends += [("notes", note) for note in self.notes or ("nothing looks wrong",)]
        table = _table(("return", self.return_distribution), ("episode length", self.length_distribution))
        return "\n".join([*_aligned(counts), *table, *_aligned(rewards + arrays), *ranges, *_aligned(ends)])


def _array_info(content: Mapping[str, Any]) -> ArrayInfo:
    values: dict[str, Any] = dict(content)
    names = ("shape", "low", "high", "mean", "std", "constant", "share_outside")
    return ArrayInfo(**values | {name: tuple(content[name]) for name in names})


def format_number(value: float) -> str:
    """Whole numbers below a million in full, other numbers with four digits."""
    value += 0.0  # No -0.
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def format_share(share: float) -> str:
    """A share in [0, 1] as a percentage, where only none is 0 % and only all is 100 %."""
    if 0.0 < share < 0.0001:
        return "< 0.01 %"
    return "> 99.99 %" if 0.9999 < share < 1.0 else f"{100.0 * share:.4g} %"


def _interval(low: float, high: float) -> str:
    return f"[{format_number(low)}, {format_number(high)}]"


def _array_line(info: ArrayInfo) -> str:
    return f"{info.path + ': ' if info.path else ''}{info.dtype}, shape {info.shape}"


def _range_line(info: ArrayInfo) -> str:
    intervals = [_interval(*bounds) for bounds in zip(info.low, info.high, strict=True)]
    if len(set(intervals)) == 1 and len(intervals) > 1:
        return f"{intervals[0]} in each of {len(intervals)} dimensions"
    return "  ".join(interval.replace(", ", ",\u00a0") for interval in intervals)


def range_table(column: str, infos: Iterable[ArrayInfo]) -> list[str]:
    """Lines with range, mean and deviation of every number, and what stands out: constants, values out of bounds."""
    rows: list[tuple[str, ...]] = []
    for info in infos:
        is_whole = len(info.low) == 1 and np.prod(info.shape) != 1
        places = [" (all numbers)"] if is_whole else flat_places(info.shape, len(info.low))
        for number in range(min(len(info.low), _MOST_ROWS)):
            share = info.share_outside[number] if info.share_outside else 0.0
            remarks = ["constant"] * info.constant[number] + [f"{format_share(share)} out of bounds"] * (share > 0.0)
            values = (values[number] for values in (info.low, info.high, info.mean, info.std))
            name = f"{leaf_name(info.path)}{places[number]}".strip() or "value"
            rows.append((name, *map(format_number, values), ", ".join(remarks)))
        if len(info.low) > _MOST_ROWS:
            rows.append((f"{leaf_name(info.path)} and {len(info.low) - _MOST_ROWS} more", "", "", "", "", "see --json"))
    if not rows:
        return []
    rows = [(f"{column}", "min", "max", "mean", "std", ""), *rows]
    widths = [max(map(len, cells)) + 2 for cells in zip(*rows, strict=True)]
    return [
        (
            row[0].ljust(max(widths[0], _LABEL_WIDTH - 2))
            + "".join(map(str.rjust, row[1:5], widths[1:5]))
            + f"  {row[5]}"
        ).rstrip()
        for row in rows
    ]


def _aligned(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Labels in front of their texts, which are wrapped; a label that repeats is said once."""
    lines: list[str] = []
    previous = None
    for label, text in rows:
        wrapped = textwrap.wrap(
            text,
            width=_WIDTH,
            initial_indent=("" if label == previous else label).ljust(_LABEL_WIDTH),
            subsequent_indent=" " * _LABEL_WIDTH,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [line.replace("\u00a0", " ") for line in wrapped]
        previous = label
    return lines


def _table(*rows: tuple[str, Distribution]) -> list[str]:
    cells = [[format_number(value) for value in asdict(distribution).values()] for _, distribution in rows]
    widths = [max(map(len, column)) + 2 for column in zip(_QUANTILE_NAMES, *cells, strict=True)]
    labelled = zip(("", *(label for label, _ in rows)), (_QUANTILE_NAMES, *cells), strict=True)
    return [
        label.ljust(_LABEL_WIDTH - 2) + "".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for label, line in labelled
    ]
