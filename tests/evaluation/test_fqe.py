"""Fitted Q evaluation against a solved decision process, its gradients against autograd, and what a score says."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_learners import make_learner
from solved_mdp import NUM_STATES, SolvedMDP

from rllib_calql import CalQLConfig
from rllib_calql.evaluation.fqe import scoring
from rllib_calql.evaluation.fqe.critics import FQECritics, with_ones
from rllib_calql.evaluation.fqe.data import JudgedData, own_split
from rllib_calql.evaluation.fqe.fitting import FittedValues, FQESettings, fit_values
from rllib_calql.evaluation.fqe.off_data import share_off_data
from rllib_calql.evaluation.fqe.policies import policy_of_module
from rllib_calql.evaluation.fqe.scoring import mean_interval, score_policy
from rllib_calql.store.offline_table import OfflineTable
from rllib_calql.store.split import Split, split_episodes

SMALL = FQESettings(updates=1_000, batch_size=256, hiddens=(32, 32))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- The values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_are_those_of_the_solved_process_within_two_percent(seed: int) -> None:
    mdp = SolvedMDP.drawn(seed)
    fitted = fit_values(mdp.data(), mdp, SMALL)
    exact = mdp.values()[list(mdp.start_states)]
    assert fitted.initial_values.mean() == pytest.approx(exact.mean(), rel=0.02)
    assert np.abs(fitted.initial_values - exact).max() < 0.1 * np.ptp(mdp.values())


def test_the_policy_is_valued_and_not_the_behaviour() -> None:
    # Action 0.5 pays 1 in every state and -0.5 pays 0; the data take both equally often.
    mdp = dataclasses.replace(
        SolvedMDP.drawn(0), rewards=np.array([[0.0] * NUM_STATES, [1.0] * NUM_STATES]), choices=np.ones(NUM_STATES, int)
    )
    worse = dataclasses.replace(mdp, choices=np.zeros(NUM_STATES, int))
    assert fit_values(mdp.data(), mdp, SMALL).initial_values.mean() == pytest.approx(
        mdp.values()[list(mdp.start_states)].mean(), rel=0.02
    )
    assert fit_values(mdp.data(), worse, SMALL).initial_values.mean() == pytest.approx(0.0, abs=0.1)


def test_held_out_steps_never_reach_a_fit() -> None:
    mdp = SolvedMDP.drawn(1)
    settings = dataclasses.replace(SMALL, updates=100)
    without, with_large = (
        fit_values(mdp.data(held_out_reward=reward), mdp, settings).initial_values for reward in (0.0, 1e6)
    )
    np.testing.assert_array_equal(without, with_large)


def test_the_same_seed_gives_the_same_values_and_torch_s_own_generator_is_left_alone() -> None:
    mdp = SolvedMDP.drawn(1)
    settings = dataclasses.replace(SMALL, updates=50)
    state = torch.get_rng_state()
    first, second = (fit_values(mdp.data(), mdp, settings).initial_values for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_held_out_td_errors_are_larger_where_rewards_are_others() -> None:
    mdp = SolvedMDP.drawn(2)
    alike = fit_values(mdp.data(held_out_reward=2.0), mdp, dataclasses.replace(SMALL, updates=200))
    other = fit_values(mdp.data(held_out_reward=500.0), mdp, dataclasses.replace(SMALL, updates=200))
    assert other.held_out_td_error == pytest.approx(500.0, rel=0.1)
    assert alike.held_out_td_error < 50.0
    assert alike.training_td_error == other.training_td_error


# --- One step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_rows", [16, 37, 1024])
@pytest.mark.parametrize("hiddens", [(7, 6), (5,)])
def test_a_step_is_that_of_autograd_and_adam_in_float64(hiddens: tuple[int, ...], block_rows: int) -> None:
    torch.manual_seed(0)
    rows, num_inputs, number = 37, 5, 3
    critics = FQECritics(
        num_inputs, hiddens, batch_size=rows, num_critics=number, dtype=torch.float64, block_rows=block_rows
    )
    critics.targets.add_(torch.randn_like(critics.targets))
    here, following = (with_ones(torch.randn(rows, num_inputs, dtype=torch.float64)) for _ in range(2))
    rewards, discounts = torch.randn(rows, dtype=torch.float64), torch.rand(rows, dtype=torch.float64)

    def q(parameters: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Of one critic, by its part of the vector."""
        at = 0
        for width in (*hiddens, 1):
            weight = parameters[at : at + x.shape[1] * width].view(x.shape[1], width)
            at += weight.numel()
            x = x @ weight
            if at < len(parameters):
                x = torch.cat([torch.relu(x), torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        return x[:, 0]

    own = critics.parameters.clone().requires_grad_()
    former_targets = critics.targets.clone()
    mean_target = torch.stack([q(part, following) for part in former_targets.chunk(number)]).mean(dim=0)
    targets = rewards + discounts * mean_target
    torch.stack([(q(part, here) - targets).square().mean() for part in own.chunk(number)]).sum().backward()
    critics.step(here, following, rewards, discounts, learning_rate=1e-2, tau=0.25)
    assert own.grad is not None
    torch.testing.assert_close(critics.gradients, own.grad, rtol=1e-10, atol=1e-12)
    torch.optim.Adam([own], lr=1e-2).step()
    torch.testing.assert_close(critics.parameters, own.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(critics.targets, former_targets.lerp(own.detach(), 0.25))
    for part, values in zip(own.detach().chunk(number), critics.values_of_each(here), strict=True):
        torch.testing.assert_close(values, q(part, here))


def test_columns_of_another_size_are_refused() -> None:
    critics = FQECritics(3, [4], batch_size=8)
    inputs, numbers = with_ones(torch.zeros(8, 3)), torch.zeros(8)
    with pytest.raises(ValueError, match=r"inputs must be \(8, 4\)"):
        critics.step(inputs[:, :3], inputs, numbers, numbers, learning_rate=1e-3, tau=0.1)
    with pytest.raises(ValueError, match=r"rewards and discounts must be \(8,\)"):
        critics.step(inputs, inputs, numbers[:7], numbers, learning_rate=1e-3, tau=0.1)


# --- The policy -------------------------------------------------------------------------------------------------------


def test_the_greedy_policy_is_judged_and_its_own_critics_are_not_read() -> None:
    module = make_learner(obs_dim=NUM_STATES, action_dim=1).module["default_policy"]
    data, policy = SolvedMDP.drawn(0).data(), policy_of_module(module)
    observations = np.random.default_rng(0).normal(size=(5_000, NUM_STATES)).astype(np.float32)
    mean, _ = module.policy(torch.from_numpy(observations))
    np.testing.assert_allclose(policy.actions(observations), torch.tanh(mean).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert policy.features(observations) is observations
    settings = dataclasses.replace(SMALL, updates=20)
    before = fit_values(data, policy, settings).initial_values
    for parameter in (*module.critic.parameters(), *module.target_critic.parameters()):
        parameter.data.fill_(7.0)
    np.testing.assert_array_equal(fit_values(data, policy, settings).initial_values, before)


def test_of_images_values_are_fitted_to_what_the_policy_s_encoder_makes_of_them() -> None:
    networks = {"actor_hiddens": [8], "critic_hiddens": [8], "conv_filters": [[4, 3, 2]], "image_features": 5}
    spaces = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8), gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    module = CalQLConfig().rl_module(model_config=networks).build_learner(spaces={"default_policy": spaces}).module
    module = module["default_policy"]
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    policy = policy_of_module(module)
    with torch.no_grad():
        code = module.policy_trunk(module.encoder(torch.from_numpy(images)))
        mean, _ = module.policy(code)
    np.testing.assert_allclose(policy.features(images.reshape(6, -1)), code.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy.actions(images.reshape(6, -1)), torch.tanh(mean).numpy(), rtol=1e-5, atol=1e-6)


def test_the_rate_falls_to_a_fiftieth_by_half_a_cosine_in_the_second_half() -> None:
    settings = FQESettings(updates=400, learning_rate=2e-3)
    rates = [settings.learning_rate_at(update) for update in (0, 199, 200, 300, 400)]
    assert rates == pytest.approx([2e-3, 2e-3, 2e-3, 2e-3 * (0.02 + 0.98 / 2.0), 2e-3 / 50.0])


def test_a_state_beyond_ten_deviations_of_the_data_is_taken_for_one_at_ten() -> None:
    mdp, values = SolvedMDP.drawn(0), []
    for size in (1e3, 1e6):
        data = mdp.data()
        data.first_observations = np.full_like(data.first_observations, size)
        values.append(fit_values(data, mdp, dataclasses.replace(SMALL, updates=20)).initial_values)
    np.testing.assert_array_equal(*values)


# --- The data ---------------------------------------------------------------------------------------------------------


def test_rewards_and_returns_are_those_of_the_environment() -> None:
    mdp = SolvedMDP.drawn(0)
    data = mdp.data(held_out_reward=3.0)
    np.testing.assert_allclose(data.behaviour_returns, 3.0 + 0.9 * 3.0, rtol=1e-6)
    assert data.first_observations.argmax(axis=1).tolist() == list(mdp.start_states)
    first = data.rows(np.array([0]))
    k, s, _ = np.argwhere(mdp.counts)[0]
    assert first.rewards[0] == pytest.approx(mdp.rewards[k, s], rel=1e-6)
    assert data.share_cut == pytest.approx(0.9**2)


def table_of_lengths(lengths: list[int]) -> OfflineTable:
    table = SolvedMDP.drawn(0).data().table
    records = np.resize(table.records, sum(lengths))
    ends = np.zeros(len(lengths), bool)
    final = np.zeros((len(lengths), NUM_STATES), np.float32)
    return OfflineTable(records, final, lengths=np.array(lengths), terminateds=ends, has_tail=ends, gamma=0.9)


@pytest.mark.parametrize(("num_episodes", "held_out"), [(3, 2), (19, 2), (200, 20)])
def test_a_tenth_of_the_episodes_is_held_out_and_never_less_than_two(num_episodes: int, held_out: int) -> None:
    assert len(own_split(table_of_lengths([2] * num_episodes)).held_out_episodes) == held_out


@pytest.mark.parametrize(("num_episodes", "said"), [(1, "hold 1 episode;"), (2, "hold 2 episodes;")])
def test_too_few_episodes_are_refused(num_episodes: int, said: str) -> None:
    with pytest.raises(ValueError, match=f"{said} judging by data needs at least 3"):
        own_split(table_of_lengths([5] * num_episodes))


def test_one_held_out_episode_has_no_interval_and_is_refused() -> None:
    table = table_of_lengths([2] * 9)
    split = Split(table.lengths, np.array([3]), fraction=0.1, seed=0)
    with pytest.raises(ValueError, match=r"1 episode is held out, .* raise `validation_fraction` 0.1"):
        JudgedData(table, split, rewards=SolvedMDP.drawn(0).scaling)


def test_held_out_episodes_that_begin_where_no_other_ever_is_are_refused() -> None:
    rng = np.random.default_rng(0)
    table = table_of_lengths([10] * 30)
    table.records["obs"] = rng.normal(size=table.records["obs"].shape)
    starts = np.arange(27, 30) * 10
    split = Split(table.lengths, np.array([27, 28, 29]), fraction=0.1, seed=0)
    JudgedData(table, split, rewards=SolvedMDP.drawn(0).scaling)
    table.records["obs"][starts] += 50.0
    with pytest.raises(ValueError, match="100% of the held-out episodes begin in states that the other episodes never"):
        JudgedData(table, split, rewards=SolvedMDP.drawn(0).scaling)


def test_starts_that_lie_apart_in_all_episodes_are_told_and_not_refused() -> None:
    # A regulator: from starts all over the place it is soon at its set-point, and stays there.
    num_episodes, steps = 40, 50
    rng = np.random.default_rng(0)
    table = table_of_lengths([steps] * num_episodes)
    start = rng.uniform(-30.0, 30.0, (num_episodes, 1, NUM_STATES))
    noise = 0.05 * rng.normal(size=(num_episodes, steps, NUM_STATES))
    rows = start * 0.6 ** np.arange(steps)[:, None] + noise
    table.records["obs"] = rows.reshape(-1, NUM_STATES)
    split = split_episodes(table.lengths, fraction=0.1, seed=0)
    rewards = SolvedMDP.drawn(0).scaling
    few, mdp = dataclasses.replace(SMALL, updates=2), SolvedMDP.drawn(0)
    apart = JudgedData(table, split, rewards=rewards)
    assert apart.share_far_starts == 1.0
    said = "100% of the held-out episodes begin farther from the other data than their later steps are"
    assert said in "\n".join(score_policy(apart, mdp, few).warnings)
    # Where later steps go as far as starts do, there is nothing to tell.
    table.records["obs"] = rng.uniform(-30.0, 30.0, table.records["obs"].shape)
    anywhere = JudgedData(table, split, rewards=rewards)
    assert anywhere.share_far_starts < 0.5
    assert "begin farther" not in "\n".join(score_policy(anywhere, mdp, few).warnings)


def test_observations_that_never_vary_are_no_obstacle() -> None:
    table = table_of_lengths([10] * 30)
    table.records["obs"] = 0.5
    mdp = SolvedMDP.drawn(0)
    data = JudgedData(table, None, rewards=mdp.scaling)
    assert data.share_far_starts == 0.0
    assert np.isfinite(score_policy(data, mdp, dataclasses.replace(SMALL, updates=2)).value.mean)


def test_moving_what_never_moves_in_the_data_is_leaving_them() -> None:
    rng = np.random.default_rng(0)
    states, held_out = rng.normal(size=(500, 2)), rng.normal(size=(200, 2))
    actions, own = (np.stack([np.tanh(rows[:, 0]), np.full(len(rows), 0.3)], axis=1) for rows in (states, held_out))
    share = {
        by: share_off_data((states, actions), (held_out, own), own + np.array([0.0, by]), rng=np.random.default_rng(1))
        for by in (0.0, 1e-4, 0.7)
    }
    assert share[0.0] == pytest.approx(0.01, abs=0.005)
    assert share[1e-4] < 0.02
    assert share[0.7] == 1.0


# --- The score --------------------------------------------------------------------------------------------------------


def test_intervals_are_bootstraps_over_episodes() -> None:
    values = np.array([0.0, 1.0] * 20)
    interval = mean_interval(values)
    half = 1.96 * 0.5 / np.sqrt(len(values))  # The normal approximation.
    assert interval.mean == 0.5
    assert interval.high - interval.low == pytest.approx(2.0 * half, rel=0.1)
    with pytest.raises(ValueError, match="at least 2 episodes, got 1"):
        mean_interval(np.array([1.0]))


def test_the_interval_of_a_value_is_over_the_held_out_episodes_and_no_other_rows() -> None:
    mdp = dataclasses.replace(SolvedMDP.drawn(0), start_states=(0, 1, 2, 3, 0, 1))
    settings = dataclasses.replace(SMALL, updates=200)
    values = fit_values(mdp.data(), mdp, settings).initial_values
    value = score_policy(mdp.data(), mdp, settings).value
    resampled = np.random.default_rng(1).choice(values, (20_000, len(values))).mean(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert value.mean == values.mean()
    assert (value.low, value.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_share_off_the_data_tells_a_policy_that_leaves_them() -> None:
    rng = np.random.default_rng(0)
    states, held_out = rng.normal(size=(3_000, 20)), rng.normal(size=(1_000, 20))
    actions, own = (0.3 * np.tanh(rows[:, :2]) + 0.02 * rng.normal(size=(len(rows), 2)) for rows in (states, held_out))
    like_the_data = 0.3 * np.tanh(held_out[:, :2])
    share = {
        name: share_off_data((states, actions), (held_out, own), policy, rng=np.random.default_rng(1))
        for name, policy in (("own", own), ("alike", like_the_data), ("far", like_the_data + 0.9))
    }
    assert share["own"] == pytest.approx(0.01, abs=0.002)
    assert share["alike"] < 0.03
    assert share["far"] > 0.95


def test_states_and_actions_count_alike_however_many_numbers_they_have() -> None:
    rng = np.random.default_rng(0)
    states, held_out = rng.normal(size=(500, 2)), rng.normal(size=(200, 2))
    actions, own = (np.tanh(rows[:, :1]) + 0.1 * rng.normal(size=(len(rows), 1)) for rows in (states, held_out))
    once, many = (
        share_off_data(
            (np.tile(states, times), actions), (np.tile(held_out, times), own), own + 0.6, rng=np.random.default_rng(1)
        )
        for times in (1, 50)
    )
    assert 0.1 < once < 0.9
    assert many == once


@pytest.mark.parametrize(
    ("changes", "share", "said"),
    [
        ({"looks": [0.0, 0.0, 4.0]}, 0.0, "still moved by 4"),
        ({"of_each_critic": np.array([1.0, 9.0])}, 0.0, "the critics differ by 8, more than the interval tells"),
        ({}, 0.2, "in 20% of the states the policy leaves the data"),
        # Those of the behaviour's return, 5.7: two steps of 3 each.
        ({"initial_values": np.linspace(5.0, 6.4, 20)}, 0.0, "the interval holds the behaviour's return"),
    ],
)
def test_each_doubt_is_told_and_none_without_a_cause(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], share: float, said: str
) -> None:
    sure = FittedValues(np.full(20, 3.0), np.array([3.0, 3.0]), [3.0, 3.0, 3.0], 0.1, 0.1)
    mdp = dataclasses.replace(SolvedMDP.drawn(0), start_states=(0, 1, 2, 3) * 5)
    data = mdp.data(held_out_reward=3.0)
    data.scale_of_values, data.possible_values, data.share_cut = (3.0, 1.0), (-50.0, 50.0), 0.0
    for outcome, off, expected in ((sure, 0.0, False), (dataclasses.replace(sure, **changes), share, True)):
        monkeypatch.setattr(scoring, "fit_values", lambda *_, outcome=outcome: outcome)
        monkeypatch.setattr(scoring, "_share_off_data", lambda *_, off=off: off)
        warnings = score_policy(data, mdp, SMALL).warnings
        assert [warning for warning in warnings if said in warning] == warnings
        assert bool(warnings) == expected


def test_a_score_warns_of_what_makes_it_doubtful() -> None:
    mdp = SolvedMDP.drawn(0)
    score = score_policy(mdp.data(), mdp, dataclasses.replace(SMALL, updates=150), remarks=["it was seen"])
    said = "\n".join(score.warnings)
    assert score.warnings[0] == "it was seen"
    assert "5 held-out episodes are few for an interval" in said
    assert "raise the updates" in said
    assert "leaves out what would follow where episodes were cut, 81%" in said
    assert score.num_held_out_episodes == 5
    assert score.value.low <= score.value.mean <= score.value.high
    assert score.to_dict()["value"]["mean"] == score.value.mean


def test_a_fit_that_has_hardly_begun_is_told_with_the_updates_that_it_needs() -> None:
    # Rewards count for 1 / (1 - 0.9) = 10 steps, which an episode is shorter than: two steps of 1 / 0.05 updates.
    mdp = SolvedMDP.drawn(0)
    longest = int(mdp.data().table.lengths.max())
    said = "\n".join(score_policy(mdp.data(), mdp, dataclasses.replace(SMALL, updates=1)).warnings)
    assert (
        f"1 updates are too few for rewards to count as far as they should; raise the updates to {longest * 20}" in said
    )
    assert "too few" not in "\n".join(score_policy(mdp.data(), mdp, SMALL).warnings)


def test_where_all_rewards_are_0_a_value_near_0_has_not_diverged() -> None:
    mdp = dataclasses.replace(SolvedMDP.drawn(0), rewards=np.zeros((2, NUM_STATES)))
    score = score_policy(mdp.data(held_out_reward=0.0), mdp, dataclasses.replace(SMALL, updates=20))
    assert 0.0 < abs(score.value.mean) < 0.05
    assert score.is_possible
    assert "diverged" not in "\n".join(score.warnings)


def test_a_value_that_rewards_cannot_sum_up_to_is_no_possible_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = SolvedMDP.drawn(0)
    fitted = fit_values(mdp.data(), mdp, dataclasses.replace(SMALL, updates=1))
    for value in (1e6, -1e6, np.nan, np.inf):
        diverged = dataclasses.replace(fitted, initial_values=np.full(5, value))
        monkeypatch.setattr(scoring, "fit_values", lambda *_, outcome=diverged: outcome)
        score = score_policy(mdp.data(), mdp, SMALL)
        assert not score.is_possible
        assert any("the fit diverged" in warning for warning in score.warnings)


def test_a_policy_whose_actions_are_no_numbers_is_refused() -> None:
    mdp = SolvedMDP.drawn(0)
    broken = SimpleNamespace(
        features=mdp.features, actions=lambda observations: np.full((len(observations), 1), np.nan)
    )
    with pytest.raises(ValueError, match="The policy's actions are NaN: its training diverged; take an earlier"):
        score_policy(mdp.data(), broken, SMALL)


def test_all_rewards_are_looked_at_once_for_all_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    undone = JudgedData._environment_rewards

    def counted(data: JudgedData, rewards: np.ndarray) -> np.ndarray:
        looked_at.append(len(rewards))
        return undone(data, rewards)

    monkeypatch.setattr(JudgedData, "_environment_rewards", counted)
    mdp = SolvedMDP.drawn(0)
    data = mdp.data()
    for _ in range(2):
        score_policy(data, mdp, dataclasses.replace(SMALL, updates=1))
    assert looked_at.count(len(data.table)) == 1
