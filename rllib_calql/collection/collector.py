"""`Collector`: keeps remote env runners sampling, and goes on without those that fail until they are back."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_calql.collection.budget import EnvStepBudget
from rllib_calql.collection.callbacks import ENV_STEPS
from rllib_calql.collection.requests import Collected, EpisodeJoiner, Failure
from rllib_calql.system import activity

logger = logging.getLogger(__name__)

SECONDS_PER_REQUEST = 0.5  # Aim of asynchronous requests: short enough for fresh weights, long enough to be cheap.
_TAG = "calql_sample"
_MAX_FAILURES = 5  # Per env runner, in a row and without a finished episode of any.
_MAX_SECONDS_BETWEEN_ATTEMPTS = 30.0
_POLL_SECONDS = 0.01
_STOP_SECONDS = 10.0
_MAX_GROWTH = 4.0  # Of a request over the one before: the first ones hold resets and warm-ups.

# Makes what an env runner runs, for a number of env steps wished for, and the number that it may make at most.
MakeTask = Callable[[int, float], Callable[[Any], Any]]


@dataclass
class _Runner:
    """What is known of one env runner.

    Attributes:
        num_outstanding: Requests whose result is not here.
        since: When the oldest of them may have begun.
        is_lost: Whether it failed and has not returned anything since.
        next_attempt: When a lost one is asked again.
        num_failures: How often it failed since its last finished episode.
        num_env_steps: Env steps of its next asynchronous request.
        granted: Env steps that the requests under way might make.
        receipt: Of what it has sent last, if its environments are clients, which are told by it.
        num_clients: These clients, when it answered last.
    """

    num_outstanding: int = 0
    since: float = 0.0
    is_lost: bool = False
    next_attempt: float = 0.0
    num_failures: int = 0
    num_env_steps: int = 1
    granted: float = 0.0
    receipt: tuple[str, int] | None = None
    num_clients: int = 0


class Collector:
    """Requests episodes of remote env runners and joins their pieces.

    A runner that dies, hangs or raises is started anew and asked again, with the current weights in the request; its
    unfinished episodes are forgotten. Nobody waits for it meanwhile.

    Args:
        group: RLlib's `EnvRunnerGroup`, with remote runners.
        timeout_s: Seconds after which a runner that does not answer counts as hanging.
        num_envs: Sub-environments of each runner.
        max_requests: Requests that a runner may have at once.
        budget: Grants the env steps of requests.
    """

    def __init__(
        self, group: Any, *, timeout_s: float, num_envs: int, max_requests: int, budget: EnvStepBudget
    ) -> None:
        self._group = group
        self._manager = group._worker_manager
        self._timeout_s = timeout_s
        self._num_envs = num_envs
        self._max_requests = max_requests
        self._budget = budget
        self._runners = {index: _Runner(num_env_steps=num_envs) for index in self._manager.actor_ids()}
        self._joiner = EpisodeJoiner()
        self._generation = 0
        self._old_tags: list[str] = []
        self._recovered: list[int] = []
        self._num_failures_in_a_row = 0
        self._all_lost_since: float | None = None
        self._cause = ""
        self._num_failures = 0

    @property
    def num_healthy(self) -> int:
        """Env runners that are not lost."""
        return sum(not runner.is_lost for runner in self._runners.values())

    @property
    def num_clients(self) -> int:
        """Clients that were connected to the runners when these answered last."""
        return sum(runner.num_clients for runner in self._runners.values())

    @property
    def num_failures(self) -> int:
        """How often runners failed, since the beginning or `forget_failures`."""
        return self._num_failures

    def forget_failures(self) -> None:
        """Counts failures from 0 again."""
        self._num_failures = 0

    @property
    def _tag(self) -> str:
        return f"{_TAG}_{self._generation}"

    # --- Requests ----------------------------------------------------------------------------------------------------

    def ask(
        self,
        make_task: MakeTask,
        *,
        max_requests: int | None = None,
        max_env_steps: float = math.inf,
        max_granted: float | None = None,
    ) -> None:
        """Sends requests to every runner that has room for them, as long as the budget grants them env steps.

        Args:
            make_task: Makes what runs inside a runner.
            max_requests: Requests that a runner may have at once; None for the constructor's.
            max_env_steps: Env steps of all requests together that may be under way, but never less than a step of
                every environment in each.
            max_granted: Env steps that one request may make at most; None for what is asked for, and the steps of other
                sub-environments that RLlib makes beyond it.
        """
        now = time.monotonic()
        max_requests = max_requests or self._max_requests
        share = max_env_steps / (len(self._runners) * max_requests)
        for index, runner in self._runners.items():
            limit = 1 if runner.is_lost else max_requests
            while runner.num_outstanding < limit and now >= runner.next_attempt:
                size = int(max(self._num_envs, min(share, runner.num_env_steps)))
                granted = self._budget.grant(size + self._num_envs - 1 if max_granted is None else max_granted)
                if not granted:
                    return
                task: Callable[..., Any] = make_task(size, granted)
                sent = self._group.foreach_env_runner_async(
                    task if runner.receipt is None else partial(task, receipt=runner.receipt),
                    tag=self._tag,
                    healthy_only=False,
                    remote_worker_ids=[index],
                )
                if not sent:
                    self._budget.settle(granted, 0)
                    break
                runner.granted += granted
                if runner.num_outstanding == 0:
                    runner.since = now
                runner.num_outstanding += 1

    def fetch(self) -> tuple[list[SingleAgentEpisode], list[dict[str, Any]]]:
        """Takes what has arrived, without waiting.

        Returns:
            Episodes that are complete now, and metrics of the runners.

        Raises:
            RuntimeError: If all runners are lost for good.
        """
        episodes: list[SingleAgentEpisode] = []
        metrics: list[dict[str, Any]] = []
        for index, collected in self._arrived():
            self._plan(self._runners[index], collected)
            episodes += self._join(index, collected)
            metrics.append(collected.metrics)
        self._lose_those_that_hang()
        self._check_that_some_are_left()
        return episodes, metrics

    def wait(self) -> None:
        """Waits a moment for results."""
        time.sleep(_POLL_SECONDS)

    def collect_round(
        self, make_task: MakeTask, *, max_granted: Callable[[], float]
    ) -> tuple[list[SingleAgentEpisode], list[dict[str, Any]]]:
        """Sends one request to every runner and waits for those that are not lost.

        Args:
            make_task: Makes what runs inside a runner.
            max_granted: Says how many env steps one request may make at most.

        Returns:
            Episodes that are complete now, in the order of runners where all answer, and metrics of the runners.

        Raises:
            RuntimeError: If all runners are lost for good.
        """
        arrived: list[tuple[int, Collected]] = []
        while not arrived and not self._budget.is_spent:
            self.ask(make_task, max_requests=1, max_granted=max_granted())
            while any(runner.num_outstanding and not runner.is_lost for runner in self._runners.values()):
                arrived += self._arrived()
                self._lose_those_that_hang()
                self.wait()
            arrived += self._arrived()
            self._check_that_some_are_left()
            if not arrived:
                self.wait()
        arrived.sort(key=lambda entry: entry[0])
        episodes = [episode for index, collected in arrived for episode in self._join(index, collected)]
        return episodes, [collected.metrics for _, collected in arrived]

    def cut(self) -> list[SingleAgentEpisode]:
        """Ends all unfinished episodes where they are, as truncated ones, and hands them out."""
        return self._joiner.cut()

    def forget_outstanding(self) -> None:
        """Gives up all requests under way and all unfinished episodes, as after a restore."""
        self._old_tags.append(self._tag)
        self._generation += 1
        self._joiner.clear()
        for runner in self._runners.values():
            runner.num_outstanding = 0
            self._settle_lost(runner)

    def take_recovered(self) -> list[int]:
        """Indices of runners that came back since the last call."""
        recovered, self._recovered = self._recovered, []
        return recovered

    def stop(self) -> None:
        """Closes the environments and ends all runners, also those that do not answer, for which RLlib would wait."""
        self._group.foreach_env_runner("stop", local_env_runner=False, timeout_seconds=_STOP_SECONDS)
        for index in self._manager.actor_ids():
            ray.kill(self._manager.remove_actor(index))

    # --- Results and failures ----------------------------------------------------------------------------------------

    def _arrived(self) -> list[tuple[int, Collected]]:
        for tag in list(self._old_tags):
            self._manager.fetch_ready_async_reqs(tags=tag, timeout_seconds=0.0)
            if self._manager.num_outstanding_async_reqs(tag) == 0:
                self._old_tags.remove(tag)
        arrived: list[tuple[int, Collected]] = []
        lost: set[int] = set()
        for result in self._manager.fetch_ready_async_reqs(tags=self._tag, timeout_seconds=0.0, mark_healthy=True):
            index, value = result.actor_id, result.get()
            if index in lost:
                continue  # What a broken environment made of the request behind the one that failed.
            if isinstance(value, (Collected, Failure)):
                self._settle(self._runners[index], value.granted, value.taken)
            if result.ok and isinstance(value, Collected):
                self._note_result(index)
                self._runners[index].receipt = value.receipt
                self._runners[index].num_clients = value.num_clients
                activity.count(ENV_STEPS, value.num_env_steps)
                arrived.append((index, value))
                continue
            lost.add(index)
            if isinstance(value, Failure):
                self._lose(index, value.cause, starts_anew=True)
            else:
                self._lose(index, _first_line(value), is_restarting=isinstance(value, ActorUnavailableError))
        return arrived

    def _settle(self, runner: _Runner, granted: float, taken: int) -> None:
        if math.isinf(granted) or granted <= runner.granted:  # Otherwise it was given up, and counted then.
            runner.granted = 0.0 if math.isinf(granted) else runner.granted - granted
            self._budget.settle(granted, taken)

    def _settle_lost(self, runner: _Runner) -> None:
        """Counts what a runner was granted as taken: it may have been."""
        granted, runner.granted = runner.granted, 0.0
        if granted and math.isfinite(granted):
            self._budget.settle(granted, None)
            if self._budget.limit is not None:
                logger.warning("Up to %d env steps that were lost count for `max_online_env_steps`.", granted)

    def _note_result(self, index: int) -> None:
        runner = self._runners[index]
        if runner.is_lost:
            self._recovered.append(index)
            logger.warning("Env runner %d is back.", index)
        runner.num_outstanding -= 1
        runner.since = time.monotonic()
        runner.is_lost = False
        self._all_lost_since = None

    def _join(self, index: int, collected: Collected) -> list[SingleAgentEpisode]:
        episodes = self._joiner.add(collected.pieces, index)
        if episodes:  # A few steps alone are no sign that an environment works.
            self._runners[index].num_failures = self._num_failures_in_a_row = 0
        return episodes

    def _plan(self, runner: _Runner, collected: Collected) -> None:
        """Sets the length of the next request by the speed of this one."""
        if collected.num_env_steps:
            fitting = SECONDS_PER_REQUEST * collected.num_env_steps / max(collected.seconds, 1e-6)
            largest = _MAX_GROWTH * max(collected.num_env_steps, self._num_envs)
            runner.num_env_steps = max(self._num_envs, round(min(fitting, largest)))

    def _lose_those_that_hang(self) -> None:
        now = time.monotonic()
        for index, runner in self._runners.items():
            if runner.num_outstanding and now - runner.since > self._timeout_s:
                self._lose(index, f"no answer for {self._timeout_s:g} s (`sample_timeout_s`)", starts_anew=True)

    def _lose(self, index: int, cause: str, *, starts_anew: bool = False, is_restarting: bool = False) -> None:
        runner = self._runners[index]
        was_lost, runner.is_lost = runner.is_lost, True
        runner.num_outstanding = 0
        self._settle_lost(runner)
        runner.num_env_steps = self._num_envs
        runner.receipt, runner.num_clients = None, 0
        now = time.monotonic()
        if self.num_healthy == 0 and self._all_lost_since is None:
            self._all_lost_since = now
        if not (was_lost and is_restarting):
            runner.num_failures += 1
            self._num_failures += 1
            self._num_failures_in_a_row += 1
            self._cause = cause
        runner.next_attempt = now + min(2.0 ** (runner.num_failures - 1), _MAX_SECONDS_BETWEEN_ATTEMPTS)
        if not was_lost:
            logger.warning(
                "Env runner %d failed and is started anew; unfinished episodes of it that are lost: %d. %s",
                index,
                self._joiner.forget(index),
                cause,
            )
        if starts_anew:
            ray.kill(self._manager.actors()[index], no_restart=False)
            self._manager.set_actor_state(index, healthy=False)

    def _check_that_some_are_left(self) -> None:
        silence = 0.0 if self._all_lost_since is None else time.monotonic() - self._all_lost_since
        if self._num_failures_in_a_row >= _MAX_FAILURES * len(self._runners) or silence > self._timeout_s:
            raise RuntimeError(
                f"{len(self._runners)} env runners failed {self._num_failures_in_a_row} times without a finished "
                f"episode. The last failure: {self._cause}. Mend the environment; if it is only slow, raise "
                "`sample_timeout_s`. The run can be resumed from its last checkpoint."
            )


def _first_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
