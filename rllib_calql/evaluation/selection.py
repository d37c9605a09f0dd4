"""`select_by_episodes`: a few real episodes spent on the most promising of several policies.

Source:
    Karnin et al. 2013, "Almost Optimal Exploration in Multi-Armed Bandits", algorithm 1 (sequential halving).
    Departures: the candidates come with a ranking made from data, which says who takes part and decides between
    equals, and the episodes of earlier rounds count in later ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

MIN_EPISODES = 3  # Of each candidate in the first round; fewer tell less than the ranking does.


@dataclass
class Candidate:
    """A policy with the episodes that were spent on it.

    Attributes:
        name: Of its checkpoint.
        returns: Of its episodes.
        success_rates: Number of episodes and success rate of each of its rounds, where they are known.
        error: Why it takes part no more, if its environment or its checkpoint failed.
        attempted: Episodes that it has begun, those that failed included.
    """

    name: str
    returns: list[float] = field(default_factory=list)
    success_rates: list[tuple[int, float]] = field(default_factory=list)
    error: str = ""
    attempted: int = 0

    @property
    def mean_return(self) -> float:
        """Over all of its episodes; minus infinity without any, or where that is no number."""
        mean = float(np.mean(self.returns)) if self.returns else math.nan
        return -math.inf if math.isnan(mean) else mean

    @property
    def success_rate(self) -> float | None:
        """Over all of its episodes; None if one of its rounds does not say."""
        number = sum(count for count, _ in self.success_rates)
        if not number or number < len(self.returns):
            return None
        return sum(count * rate for count, rate in self.success_rates) / number


@dataclass(frozen=True)
class Selection:
    """The outcome.

    Attributes:
        winner: The candidate that is left; None if all of them failed.
        candidates: Those that took part, the best first.
        left_out: Names of those for which there were not enough episodes.
        episodes_spent: Of all candidates.
    """

    winner: Candidate | None
    candidates: Sequence[Candidate]
    left_out: Sequence[str]
    episodes_spent: int


def num_taking_part(num_candidates: int, num_episodes: int) -> int:
    """How many candidates there are episodes for, at least three for each in the first round."""
    return max(
        (k for k in range(1, num_candidates + 1) if num_episodes // num_rounds(k) >= MIN_EPISODES * k),
        default=min(1, num_episodes),
    )


def num_rounds(num_candidates: int) -> int:
    """Until one is left, half of them going out each time."""
    return max(1, math.ceil(math.log2(num_candidates)))


def select_by_episodes(
    ranking: Sequence[str],
    num_episodes: int,
    run: Callable[[str, int, int], tuple[Sequence[float], float | None]],
    *,
    num_begun: Callable[[], int] | None = None,
) -> Selection:
    """Spends exactly `num_episodes` on the candidates, fewer if they fail.

    In each round those that are left get equally many, what does not divide going to the first of the ranking, and the
    worse half goes out. The success rate decides, then the mean return, then the ranking.

    Args:
        ranking: Names of the candidates, the most promising first.
        num_episodes: How many may be run, at least 1.
        run: Runs so many episodes of one, by its name; the last argument is the number of the round. Returns the
            returns and the success rate, None if it is not known; raises RuntimeError, ValueError, OSError or
            ImportError if it cannot.
        num_begun: How many episodes `run` has begun so far, over all calls; None: always all that it was asked for.

    Raises:
        ValueError: If there is no candidate or no episode.
    """
    if not ranking or num_episodes < 1:
        raise ValueError(f"Got {len(ranking)} candidates and {num_episodes} episodes; at least one of each is needed.")
    part = num_taking_part(len(ranking), num_episodes)
    candidates = [Candidate(name) for name in ranking[:part]]
    rank = {candidate.name: place for place, candidate in enumerate(candidates)}
    left, out = list(candidates), list[Candidate]()
    rounds, spent = num_rounds(part), 0
    for number in range(rounds):
        share = (num_episodes - spent) // (rounds - number)
        for place, candidate in enumerate(left):
            count = share // len(left) + (place < share % len(left))
            if count:
                before = num_begun() if num_begun is not None else 0
                _spend(candidate, count, number, run)
                begun = num_begun() - before if num_begun is not None else count
                candidate.attempted += begun
                spent += begun
        left.sort(key=lambda one: _merit(one, rank), reverse=True)
        keep = 1 if number == rounds - 1 else math.ceil(len(left) / 2)
        failed = [one for one in left if one.error]
        working = [one for one in left if not one.error]
        out = [*working[keep:], *failed, *out]
        left = working[:keep]
        if not left:
            break
        left.sort(key=lambda one: rank[one.name])
    return Selection(left[0] if left else None, [*left, *out], list(ranking[part:]), spent)


def _spend(
    candidate: Candidate,
    count: int,
    number: int,
    run: Callable[[str, int, int], tuple[Sequence[float], float | None]],
) -> None:
    try:
        returns, success_rate = run(candidate.name, count, number)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        candidate.error = " ".join(str(error).split())
        return
    candidate.returns.extend(returns)
    if success_rate is not None:
        candidate.success_rates.append((len(returns), success_rate))


def _merit(candidate: Candidate, rank: dict[str, int]) -> tuple[float, float, int]:
    rate = candidate.success_rate
    return (-math.inf if rate is None else rate, candidate.mean_return, -rank[candidate.name])


def success_interval(successes: float, number: int) -> tuple[float, float]:
    """95 % interval of a success rate that was seen in so many episodes.

    Source:
        Wilson 1927 (score interval); unlike a bootstrap it is not empty where all episodes end alike.
    """
    z = 1.959964
    centre = (successes + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(successes * (1 - successes) / number + z * z / (4 * number**2))
    # At rates of 0 and 1 an end is the rate itself; rounding would leave 2.8e-17 of 0.
    return 0.0 if successes == 0.0 else centre - half, 1.0 if successes == 1.0 else centre + half
