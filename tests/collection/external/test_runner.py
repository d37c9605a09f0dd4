"""The env runner of clients in the collection of a run, without Ray: counters, debts, warm-up, policies, restarts."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from client_server import free_port
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.columns import Columns
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from tiny import TINY_NETWORKS

from rllib_calql import CalQLConfig, PolicyClient
from rllib_calql.collection.budget import EnvStepBudget
from rllib_calql.collection.collection import EpisodeCollection
from rllib_calql.collection.external.runner import ExternalEnvRunner, with_client_runners
from rllib_calql.collection.storing import EpisodeKeeper
from rllib_calql.collection.success_key import SuccessKeyWatch
from rllib_calql.common import metrics as keys
from rllib_calql.common.episode_returns import EpisodeReturns
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.common.returns import RewardSettings
from rllib_calql.learning.divergence import DivergenceWatch
from rllib_calql.learning.weights import WeightPublisher
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo

OBSERVATIONS = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)
ACTIONS = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)


class Watching(RLlibCallback):
    """Counts what it is called for."""

    calls: list[str]

    def __init__(self) -> None:
        super().__init__()
        Watching.calls = []

    def on_episode_end(self, **kwargs: Any) -> None:
        """One episode."""
        Watching.calls.append(f"episode of {len(kwargs['episode'])} steps")

    def on_sample_end(self, **kwargs: Any) -> None:
        """One request."""
        Watching.calls.append(f"{len(kwargs['samples'])} samples")


class Updates:
    """Stands for the updater: counts what it is asked for."""

    def __init__(self, lifetime: Lifetime) -> None:
        self._lifetime = lifetime

    def num_offline_rows(self, *, online: bool) -> int:
        """Half of the batch."""
        return 2

    def update(self, num_updates: int, *, online: bool) -> None:
        """Counts."""
        self._lifetime.count_updates(num_updates, online=True)


class Run:
    """A run with a local env runner for clients."""

    def __init__(self, stack: ExitStack, port: int, *, warmup_env_steps: int = 0) -> None:
        config = CalQLConfig().environment(observation_space=OBSERVATIONS, action_space=ACTIONS)
        config.rl_module(model_config=TINY_NETWORKS).callbacks(Watching).external_clients(external_port=port)
        config.validate()
        self.runner = ExternalEnvRunner(config=with_client_runners(config), worker_index=0)
        stack.callback(self.runner.stop)
        self.store = TransitionStore(obs_dim=1, action_dim=1, online_capacity=100, seed=0)
        self.lifetime = Lifetime(offline_updates=0, updates_per_env_step=1.0, warmup_env_steps=warmup_env_steps)
        group = SimpleNamespace(local_env_runner=self.runner)
        self.weights = WeightPublisher(group, has_remote_runners=False)
        self.collection = EpisodeCollection(
            config,
            group,
            store=self.store,
            lifetime=self.lifetime,
            budget=EnvStepBudget(self.lifetime, None, 1),
            keeper=EpisodeKeeper(
                self.store,
                self.lifetime,
                DivergenceWatch(gamma=0.99, has_entropy_term=False),
                EpisodeReturns(),
                add_returns=AddReturnsToGo(RewardSettings(gamma=0.99)),
                space=OBSERVATIONS,
                action_space=ACTIONS,
                episode_limit_env_steps=1_000,
            ),
            weights=self.weights,
            metrics=MetricsLogger(root=True),
            success_key=SuccessKeyWatch(None),
        )

    def step(self) -> None:
        """One, with the updates that it owes."""
        self.collection.step(Updates(self.lifetime))  # type: ignore[arg-type]


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr("rllib_calql.collection.collection._SECONDS_OF_CLIENTS", 0.3)
    monkeypatch.setattr("rllib_calql.collection.external.runner._SECONDS_WITHOUT_CLIENTS", 0.1)
    monkeypatch.setattr("rllib_calql.collection.external.runner.SECONDS_OF_A_ROUND", 1.0)
    with ExitStack() as made:
        yield made


def in_background(stack: ExitStack, port: int, num_episodes: int, num_steps: int) -> PolicyClient:
    """A client that sends episodes of so many steps, one whenever the run wants one."""
    client = PolicyClient(f"127.0.0.1:{port}", seed=0)
    stack.callback(client.close, timeout_s=0.0)

    def drive() -> None:
        for number in range(num_episodes):
            with contextlib.suppress(RuntimeError):  # The test is over.
                client.wait()
            if client._is_closed:
                return
            client.reset(np.array([number], np.float32))
            for t in range(num_steps):
                action = client.act(np.zeros(1, np.float32))
                client.step(action, -1.0, t == num_steps - 1, False, np.array([t + 0.5], np.float32))

    threading.Thread(target=drive, daemon=True).start()
    return client


def until(is_true: Callable[[], Any]) -> None:
    end = time.monotonic() + 20.0
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_counters_are_exact_and_clients_hear_what_is_stored(stack: ExitStack) -> None:
    run, port = (Run(stack, port := free_port()), port)
    client = in_background(stack, port, num_episodes=4, num_steps=3)
    until(lambda: run.runner.num_clients == 1)
    for number in range(1, 5):
        run.step()
        assert (run.lifetime.num_online_episodes, run.lifetime.num_online_env_steps) == (number, 3 * number)
        assert run.lifetime.num_online_env_steps_taken == run.store.num_online == run.lifetime.num_online_updates
        assert run.collection.results() == {keys.NUM_CLIENTS: 1}
        until(lambda number=number: client.num_stored >= number - 1)
    assert Watching.calls[:2] == ["episode of 3 steps", "1 samples"]
    begin = time.monotonic()
    run.step()  # Nothing comes, and it ends all the same; the client hears that its last episode is stored.
    assert time.monotonic() - begin < 10.0
    assert run.lifetime.num_online_episodes == 4
    until(lambda: client.num_stored == 4)


def test_nobody_waits_long_for_clients_that_are_not_there(stack: ExitStack) -> None:
    run = Run(stack, free_port())
    begin = time.monotonic()
    run.step()
    assert 0.3 <= time.monotonic() - begin < 10.0
    assert (run.lifetime.num_online_episodes, run.collection.results()) == (0, {keys.NUM_CLIENTS: 0})


def test_clients_act_at_random_in_the_warm_up_and_by_the_latest_weights_after_it(stack: ExitStack) -> None:
    run, port = (Run(stack, port := free_port(), warmup_env_steps=4), port)
    client = in_background(stack, port, num_episodes=3, num_steps=4)
    run.step()
    assert client.is_warm_up
    assert run.lifetime.num_online_updates == 0
    state = run.runner.get_state(components="rl_module")
    weights = state["rl_module"]
    state["rl_module"] = {name: value + 0.25 for name, value in weights.items()}
    run.weights.publish({"rl_module": state["rl_module"]})
    run.step()
    assert not client.is_warm_up
    assert run.lifetime.num_online_updates == 4
    obs = np.linspace(-3.0, 3.0, 20, dtype=np.float32)[:, None]
    with torch.no_grad():
        outputs = run.runner.module.forward_inference({Columns.OBS: torch.from_numpy(obs)})
    expected = 2.0 * outputs[Columns.ACTIONS].numpy()  # From [-1, 1] to [-2, 2].
    assert client.policy is not None
    np.testing.assert_allclose(client.policy.compute_actions(obs), expected, atol=1e-6)
    assert client.policy.metadata["checkpoint"]["run"] == run.collection.get_state()["clients_run"]


def test_weights_that_are_not_finite_are_not_handed_out(stack: ExitStack) -> None:
    run, port = (Run(stack, port := free_port()), port)
    client = in_background(stack, port, num_episodes=2, num_steps=2)
    run.step()
    policy = client.policy
    state = run.runner.get_state(components="rl_module")["rl_module"]
    run.weights.publish({"rl_module": {name: value * np.nan for name, value in state.items()}})
    run.step()
    assert run.lifetime.num_online_episodes == 2
    assert client.policy is policy


def test_a_resumed_run_is_the_same_for_clients_and_stores_nothing_twice(stack: ExitStack) -> None:
    run, port = (Run(stack, port := free_port()), port)
    client = in_background(stack, port, num_episodes=3, num_steps=2)
    run.step()
    run.step()
    state = run.collection.get_state()
    ids = list(state["clients_episodes"])
    assert len(ids) == 2
    # The client has not heard that the second one is stored, and sends it again.
    run.runner.stop()
    until(lambda: not client.is_connected)
    assert client.num_waiting == 1
    again = Run(stack, port)
    again.collection.set_state(state)
    for _ in range(4):
        again.step()
    until(lambda: client.num_stored == 3)
    assert again.lifetime.num_online_episodes == 1
    assert again.lifetime.num_online_env_steps_taken == again.lifetime.num_online_env_steps == 2
    assert again.collection.get_state()["clients_episodes"][:2] == ids
    assert len(again.collection.get_state()["clients_episodes"]) == 3


def test_a_port_that_is_taken_is_told(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rllib_calql.collection.external.server._SECONDS_TO_BIND", 0.0)
    port = free_port()
    Run(stack, port)
    with pytest.raises(OSError, match=rf"Nothing can listen at 127\.0\.0\.1:{port} .* set another `external_port`"):
        Run(stack, port)


def test_env_runners_listen_at_ports_beside_each_other_and_ask_for_the_token(stack: ExitStack, tmp_path: Path) -> None:
    token = "the token of sixteen letters"
    (tmp_path / "token").write_text(token)
    port = free_port()
    config = CalQLConfig().environment(observation_space=OBSERVATIONS, action_space=ACTIONS)
    config.rl_module(model_config=TINY_NETWORKS).env_runners(num_env_runners=2)
    config = with_client_runners(config.external_clients(external_port=port, external_token_file=tmp_path / "token"))
    local, first, second = (ExternalEnvRunner(config=config, worker_index=index) for index in range(3))
    for runner in (first, second):
        stack.callback(runner.stop)
    with pytest.raises(ValueError, match="The local env runner has no clients"):
        local.sample(num_timesteps=1)
    assert local.receipt is None
    for runner, own_port in ((first, port), (second, port + 1)):
        with PolicyClient(f"127.0.0.1:{own_port}", token=token) as client:
            until(lambda client=client: client.is_connected)
            assert runner.num_clients == 1
            assert runner.sample(num_timesteps=1) == []
            until(lambda client=client: client.policy is not None)
        with PolicyClient(f"127.0.0.1:{own_port}") as client, pytest.raises(ConnectionError, match="needs a token"):
            client.wait(10.0)
