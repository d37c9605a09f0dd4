"""The settings of the online side against the float64 NumPy oracle: losses, gradients, five updates in a row."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle_bridge import MODULE, assert_params_equal, float64_learner, load_params, read_params, torch_batch, use_noise
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from scipy import stats
from small_learners import make_learner

from rllib_calql.common import metrics as keys
from rllib_calql.learning.learner import ONLINE
from rllib_calql.networks.steps import draw_subset
from rllib_calql.store.offline_data import as_multi_agent_batch

NUM_UPDATES = 5

# One setting of the online side each: settings of the oracle, what the learner is told beside them, and the steps of
# the actor among the five updates.
ALONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "critic_subset": ({}, {"critic_subset": 2}),
    "actor_q": ({"actor_q": "mean"}, {}),
    "actor_update_period": ({}, {"actor_update_period": 2}),
    "bc_weight": ({"bc_weight": 0.7}, {"bc_weight": 0.7, "input_": "rows.parquet", "offline_updates": 1}),
    "n_step": ({}, {"several_steps": True}),
}
# What it is combined with. Without the conservative term the learner is in the online phase.
WITH: dict[str, dict[str, Any]] = {
    "max backup": {"max_target_backup": True},
    "one action": {"max_target_backup": False},
    "entropy": {"deterministic_backup": False},
    "entropy of the best": {"max_target_backup": True, "deterministic_backup": False},
    "Lagrangian": {"lagrangian": True},
    "no conservative term": {"learn": False, "max_target_backup": False, "deterministic_backup": False},
    "cloning": {"bc": True},
}
_BEST = "entropy of the best"
PAIRS = [{first, second} for first, second in itertools.combinations(ALONE, 2)]


def cases() -> list[Any]:
    """Each setting alone and all of them with every way, two critics; with ten critics with two ways, and the pairs."""
    combined = [
        *((names, way, 2) for names in [*({name} for name in ALONE), set(ALONE)] for way in WITH),
        *((names, way, 10) for names in [*({name} for name in ALONE), set(ALONE)] for way in (_BEST, "Lagrangian")),
        *((names, _BEST, 10) for names in PAIRS),
    ]
    return [
        pytest.param(names, WITH[way], critics, id=f"{'+'.join(sorted(names))}-{way}-{critics}")
        for names, way, critics in combined
    ]


def several_steps(batch: oracle.Batch, rng: np.random.Generator) -> oracle.Batch:
    """The batch with bootstrap observations of their own, and discounts of one to three steps."""
    obs = rng.normal(size=batch.next_obs.shape)
    return replace(batch, bootstrap_obs=obs, bootstrap_discounts=0.99 ** rng.integers(1, 4, size=len(obs)))


@pytest.mark.parametrize(("names", "with_", "num_critics"), cases())
def test_losses_gradients_and_five_updates_equal_the_oracle(
    names: set[str], with_: Mapping[str, Any], num_critics: int
) -> None:
    of_oracle: dict[str, Any] = {}
    of_learner: dict[str, Any] = {}
    for name in names:
        of_oracle |= ALONE[name][0]
        of_learner |= ALONE[name][1]
    has_several_steps = of_learner.pop("several_steps", False)
    settings = oracle.Settings(**of_oracle, **with_, num_critics=num_critics, num_actions=2, gap_clip=(-9.0, 9.0))
    params, _, _ = oracle.random_case(1, settings)
    learner = float64_learner(settings, **of_learner)
    learner.config.bc_updates = NUM_UPDATES if settings.bc else 0
    load_params(learner, params)
    state = oracle.initial_opt_state(params)
    for number in range(1, NUM_UPDATES + 1):
        rng = np.random.default_rng(number)
        _, batch, noise = oracle.random_case(number, settings, batch_size=4)
        batch = replace(batch, is_offline=(np.arange(len(batch.rewards)) % 3 == 0).astype(np.float64))
        if has_several_steps:
            batch = several_steps(batch, rng)
        if "critic_subset" in names:
            noise["subset"] = rng.permutation(num_critics)[:2]
        moves_actor = "actor_update_period" not in names or number % 2 == 0
        here = replace(settings, moves_actor=moves_actor)
        use_noise(learner, noise)

        learner._uncompiled_update({MODULE: torch_batch(batch)})

        logged = learner._accumulator.pop()
        if number <= 2:  # With a step of the actor and without; later ones follow from parameters.
            assert_params_equal(read_params(learner, gradients=True), oracle.gradients(params, batch, noise, here))
        params, state, expected = oracle.full_update(params, state, batch, noise, here)
        pairs = {keys.QF_LOSS: "critic_loss", keys.TARGET_Q: "target_mean"}
        if moves_actor:
            pairs |= {keys.POLICY_LOSS: "actor_loss", keys.ALPHA_LOSS: "alpha_loss", keys.LOG_PROB: "log_prob_mean"}
        for key, name in pairs.items():
            assert logged[key] == pytest.approx(expected[name], rel=1e-8, abs=1e-12), key
    assert_params_equal(read_params(learner), params)


# --- What is logged ---------------------------------------------------------------------------------------------------


def rows_of(batch: oracle.Batch) -> Any:
    return as_multi_agent_batch({name: column.float().numpy() for name, column in torch_batch(batch).items()})


def logged_names(*, online: bool, num_updates: int = 4, **settings: Any) -> set[str]:
    learner = make_learner(**settings)
    _, batch, _ = oracle.random_case(1, oracle.Settings())
    results = [
        learner.update(rows_of(batch), timesteps={ONLINE: online, NUM_ENV_STEPS_SAMPLED_LIFETIME: 0})[MODULE]
        for _ in range(num_updates)
    ]
    return set(results[-1])


def test_metrics_of_what_is_not_evaluated_are_absent() -> None:
    everything = logged_names(online=False, conservative_online=False)
    without = logged_names(online=True, conservative_online=False)
    of_critics = {
        template.format(c=c)
        for c in (1, 2)
        for template in (
            *(keys.GAP_OF_CRITIC, keys.Q_UNIFORM_OF_CRITIC, keys.Q_CURRENT_OF_CRITIC, keys.Q_NEXT_OF_CRITIC),
            *(keys.Q_STD_OF_CRITIC, keys.BOUND_RATE_CURRENT_OF_CRITIC, keys.BOUND_RATE_NEXT_OF_CRITIC),
        )
    }
    assert everything - without == of_critics | {keys.CQL_LOSS}
    assert without <= everything


def test_between_two_steps_of_the_actor_its_metrics_are_absent() -> None:
    of_actor = {keys.POLICY_LOSS, keys.ALPHA_LOSS, keys.LOG_PROB}
    assert logged_names(online=False, num_updates=4, actor_update_period=4) >= of_actor
    assert not logged_names(online=False, num_updates=3, actor_update_period=4) & of_actor


# --- Subsets of critics -----------------------------------------------------------------------------------------------


def test_every_subset_of_critics_is_drawn_equally_often_and_none_twice_in_it() -> None:
    generator = torch.Generator().manual_seed(5)
    draws = [draw_subset(5, 2, generator=generator, device=torch.device("cpu")).tolist() for _ in range(6000)]
    assert all(len(set(subset)) == 2 for subset in draws)
    counts = [draws.count(list(pair)) for pair in itertools.permutations(range(5), 2)]
    assert sum(counts) == len(draws)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_one_subset_of_critics_holds_for_all_rows_and_actions_and_each_step_has_its_own() -> None:
    # Critic c of the targets is the constant c, so the minimum names the smallest member of the subset.
    learner = make_learner(num_critics=10, critic_subset=2, num_actions=3)
    module = learner._calql_module
    for parameter in module.target_critic.parameters():
        parameter.data.zero_()
    module.target_critic.biases[-1].data.copy_(torch.arange(10.0).unsqueeze(1))
    _, batch, _ = oracle.random_case(1, oracle.Settings(), batch_size=32)
    columns = {name: column.float() for name, column in torch_batch(batch).items()}
    smallest = []
    for _ in range(300):
        values = module.forward_train(columns)["target_next_q"]
        assert values.unique().numel() == 1
        smallest.append(int(values[0, 0]))
    # P(minimum = k) = (9 - k) / 45 for two of ten without replacement; 9 cannot be.
    counts = np.bincount(smallest, minlength=10)
    assert counts[9] == 0
    assert stats.chisquare(counts[:9], 300 * (9 - np.arange(9)) / 45).pvalue > 1e-3


# --- Schedules --------------------------------------------------------------------------------------------------------


def test_weights_follow_their_schedules_of_env_steps() -> None:
    # At 0, 25 and 200 env steps on [[0, 2], [100, 1]]: 2, 1.75 and 1; on [[0, 0], [50, 3]]: 0, 1.5 and 3.
    base = oracle.Settings(num_actions=2)
    params, _, _ = oracle.random_case(1, base)
    learner = float64_learner(
        base,
        min_q_weight_online=[[0, 2.0], [100, 1.0]],
        bc_weight=[[0, 0.0], [50, 3.0]],
        input_="rows.parquet",
        offline_updates=1,
    )
    load_params(learner, params)
    state = oracle.initial_opt_state(params)
    for number, (env_steps, weight, bc_weight) in enumerate([(0, 2.0, 0.0), (25, 1.75, 1.5), (200, 1.0, 3.0)]):
        _, batch, noise = oracle.random_case(number, base)
        use_noise(learner, noise)
        columns = as_multi_agent_batch({name: column.numpy() for name, column in torch_batch(batch).items()})
        learner.update(columns, timesteps={ONLINE: True, NUM_ENV_STEPS_SAMPLED_LIFETIME: env_steps})
        here = replace(base, min_q_weight=weight, bc_weight=bc_weight)
        params, state, _ = oracle.full_update(params, state, batch, noise, here)
    assert_params_equal(read_params(learner), params)


def test_the_online_weight_does_not_act_before_the_switch() -> None:
    settings = oracle.Settings(num_actions=2, min_q_weight=5.0)
    params, batch, noise = oracle.random_case(1, settings)
    learner = float64_learner(settings, min_q_weight_online=[[0, 2.0], [100, 1.0]])
    load_params(learner, params)
    use_noise(learner, noise)
    columns = as_multi_agent_batch({name: column.numpy() for name, column in torch_batch(batch).items()})
    learner.update(columns, timesteps={ONLINE: False, NUM_ENV_STEPS_SAMPLED_LIFETIME: 0})
    expected, _, _ = oracle.full_update(params, oracle.initial_opt_state(params), batch, noise, settings)
    assert_params_equal(read_params(learner), expected)


# --- Gradient isolation -----------------------------------------------------------------------------------------------


def test_imitation_reaches_the_policy_alone_and_offline_rows_alone() -> None:
    settings = oracle.Settings(num_actions=2, bc_weight=1.0, num_critics=3)
    params, batch, noise = oracle.random_case(2, settings)
    gradients = []
    for bc_weight, is_offline in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        learner = float64_learner(settings, bc_weight=bc_weight, input_="rows.parquet", offline_updates=1)
        load_params(learner, params)
        use_noise(learner, noise)
        columns = torch_batch(replace(batch, is_offline=np.full(len(batch.rewards), is_offline)))
        learner._uncompiled_update({MODULE: columns})
        gradients.append(read_params(learner, gradients=True))
    without, no_rows, imitating = gradients
    for name, value in without.items():
        assert np.array_equal(value, no_rows[name]), name
        assert np.array_equal(value, imitating[name]) == (not name.startswith("policy.")), name


def test_between_two_steps_of_the_actor_policy_and_temperature_stay_bit_for_bit() -> None:
    learner = make_learner(actor_update_period=3, actor_update_period_online=2, lagrangian=True)
    _, batch, _ = oracle.random_case(1, oracle.Settings())
    moved = []
    for number in range(12):
        before = read_params(learner)
        learner.update(rows_of(batch), timesteps={ONLINE: number >= 6, NUM_ENV_STEPS_SAMPLED_LIFETIME: 0})
        after = read_params(learner)
        changed = {name.split(".")[0] for name in before if not np.array_equal(before[name], after[name])}
        assert changed - {"policy", "log_alpha"} == {"critic", "target", "log_alpha_prime"}
        assert ("policy" in changed) == ("log_alpha" in changed)
        moved.append("policy" in changed)
    assert moved == [False, False, True] * 2 + [False, True] * 3
