"""Every reference value and form of calibration against the float64 NumPy oracle: losses, gradients, five updates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from oracle_bridge import MODULE, assert_params_equal, float64_learner, load_params, read_params, torch_batch, use_noise

from rllib_calql.common import metrics as keys
from rllib_calql.learning.learner import FITS_REFERENCE, ONLINE
from rllib_calql.learning.skipped_updates import number_of
from rllib_calql.store.offline_data import as_multi_agent_batch

NUM_UPDATES = 5
OFFLINE, ONLINE_PHASE = False, True
DATA = {"input_": "rows.parquet", "offline_updates": 1}
LEARNED = {"reference_value": "learned", **DATA}
OF_LEARNED = {"has_reference": True, "reference": ("learned", "learned")}
OF_COLUMN = {"reference_value": "expert", **DATA}

# Settings of the oracle, of the learner beside them, and the phases.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[bool, ...]]] = {
    "learned": (OF_LEARNED, LEARNED, (OFFLINE, ONLINE_PHASE)),
    "learned by td": (
        {**OF_LEARNED, "reference_td": True},
        {**LEARNED, "reference_fit": "td"},
        (OFFLINE, ONLINE_PHASE),
    ),
    "quantile": (
        {"reference": ("quantile",) * 2, "quantile": 0.35},
        {"reference_value": "quantile", **DATA},
        (OFFLINE,),
    ),
    "column": ({}, OF_COLUMN, (OFFLINE, ONLINE_PHASE)),
    "column, then learned": (
        {"has_reference": True, "reference": ("column", "learned")},
        {**OF_COLUMN, "reference_online": "learned"},
        (OFFLINE, ONLINE_PHASE),
    ),
    "column, then nothing": (
        {"reference": ("column", "none")},
        {**OF_COLUMN, "reference_online": "none"},
        (ONLINE_PHASE,),
    ),
    "uniform actions too": ({"bounds_uniform": True}, {}, (OFFLINE,)),
    "penalty": ({"penalty": 0.3}, {"calibration_form": "penalty", "calibration_quantile": 0.3}, (OFFLINE,)),
    "penalty on uniform actions too": (
        {"penalty": 0.5, "bounds_uniform": True, **OF_LEARNED},
        {"calibration_form": "penalty", **LEARNED},
        (ONLINE_PHASE,),
    ),
    "penalty on offline rows alone": (
        {"penalty": 0.5, "reference": ("column", "none")},
        {**OF_COLUMN, "calibration_form": "penalty", "reference_online": "none"},
        (ONLINE_PHASE,),
    ),
}
# What each is combined with.
WITH: dict[str, dict[str, Any]] = {
    "plain": {},
    "several steps": {"layer_norm": "critic", "lagrangian": True, "importance_sampling": False},
}


def cases() -> list[Any]:
    return [
        pytest.param(name, way, online, id=f"{name}-{way}-{'online' if online else 'offline'}")
        for name, (_, _, phases) in CASES.items()
        for way in WITH
        for online in phases
    ]


def several_steps(batch: oracle.Batch, rng: np.random.Generator) -> oracle.Batch:
    obs = rng.normal(size=batch.next_obs.shape)
    return replace(batch, bootstrap_obs=obs, bootstrap_discounts=0.99 ** rng.integers(1, 4, size=len(obs)))


def row_columns(batch: oracle.Batch) -> Any:
    return as_multi_agent_batch({name: column.numpy() for name, column in torch_batch(batch).items()})


@pytest.mark.parametrize(("name", "way", "online"), cases())
def test_losses_gradients_and_five_updates_equal_the_oracle(name: str, way: str, online: bool) -> None:
    of_oracle, of_learner, _ = CASES[name]
    is_column = "expert" in of_learner.values()
    settings = oracle.Settings(
        **of_oracle,
        **WITH[way],
        num_actions=2,
        num_critics=3,
        gap_clip=(-9.0, 9.0),
        fits_offline=not online or is_column,
    )
    params, _, _ = oracle.random_case(1, settings)
    learner = float64_learner(settings, **of_learner)
    learner._online = online
    learner._reference_quantile.fill_(settings.quantile)
    load_params(learner, params)
    state = oracle.initial_opt_state(params)
    calibrated = []
    for number in range(1, NUM_UPDATES + 1):
        _, batch, noise = oracle.random_case(number, settings, batch_size=6)
        # In the offline phase there are no online rows; that one would not be fitted to is seen by putting some in.
        batch = replace(batch, is_offline=(np.arange(len(batch.rewards)) % 3 > 0).astype(np.float64))
        if way == "several steps":
            batch = several_steps(batch, np.random.default_rng(number))
        use_noise(learner, noise)

        learner._uncompiled_update({MODULE: torch_batch(batch)})

        logged = learner._accumulator.pop()
        if number == 1:
            assert_params_equal(read_params(learner, gradients=True), oracle.gradients(params, batch, noise, settings))
        bounds = oracle.reference_values(params, batch, settings)
        params, state, expected = oracle.full_update(params, state, batch, noise, settings)
        calibrated.append(expected["calibrated_current"])
        pairs = {
            keys.QF_LOSS: expected["critic_loss"],
            keys.POLICY_LOSS: expected["actor_loss"],
            keys.REFERENCE_VALUE_MEAN: bounds[np.isfinite(bounds)].mean(),
        }
        if settings.has_reference:
            pairs |= {keys.REFERENCE_LOSS: expected["reference_loss"], keys.REFERENCE_GAP: expected["reference_gap"]}
        if settings.penalty is not None:
            pairs[keys.CALIBRATION_PENALTY_OF_CRITIC.format(c=2)] = expected["penalty.1"]
        for key, value in pairs.items():
            assert logged[key] == pytest.approx(value, rel=1e-8, abs=1e-12), key
    assert_params_equal(read_params(learner), params)
    assert 0.05 < np.mean(calibrated) < 0.95


@pytest.mark.parametrize("is_td", [False, True], ids=["monte_carlo", "td"])
def test_a_step_of_the_fit_moves_the_network_alone_as_the_oracle_says(is_td: bool) -> None:
    settings = oracle.Settings(**OF_LEARNED, reference_td=is_td, num_actions=2, tau=0.1)
    params, _, _ = oracle.random_case(1, settings)
    learner = float64_learner(settings, **LEARNED, reference_fit="td" if is_td else "monte_carlo")
    load_params(learner, params)
    expected, state = dict(params), oracle.initial_opt_state(params)
    for number in range(3):
        _, batch, noise = oracle.random_case(number, settings)
        use_noise(learner, noise)
        before = dict(expected)
        updated, state, metrics = oracle.full_update(expected, state, batch, noise, settings)
        expected = before | {name: value for name, value in updated.items() if "reference" in name}

        logged = learner.update(row_columns(batch), timesteps={ONLINE: False, FITS_REFERENCE: True})[MODULE]

        assert_params_equal(read_params(learner), expected)
        assert number_of(logged[keys.REFERENCE_LOSS]) == pytest.approx(metrics["reference_loss"], rel=1e-8)
        assert number_of(logged[keys.REFERENCE_GAP]) == pytest.approx(metrics["reference_gap"], rel=1e-8)
    assert (learner.num_reference_updates, learner._num_updates) == (3, 0)


# --- Gradient isolation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["maximum", "penalty"])
def test_no_loss_but_its_own_reaches_the_network_of_the_reference_value(form: str) -> None:
    settings = oracle.Settings(**OF_LEARNED, num_actions=2, lagrangian=True)
    params, batch, noise = oracle.random_case(2, settings)
    learner = float64_learner(settings, **LEARNED, calibration_form=form)
    load_params(learner, params)
    use_noise(learner, noise)
    # Returns equal to V take the network's own loss away; what were left would be others'.
    value = oracle.value_forward(params, "reference", batch.obs).v
    learner._uncompiled_update({MODULE: torch_batch(replace(batch, returns_to_go=value))})
    gradients = read_params(learner, gradients=True)
    largest = {
        part: max(float(np.abs(g).max()) for name, g in gradients.items() if name.startswith(f"{part}."))
        for part in ("reference", "critic", "policy")
    }
    assert largest["reference"] < 1e-14
    assert min(largest["critic"], largest["policy"]) > 1e-3


def test_the_loss_of_the_reference_value_reaches_no_other_parameter() -> None:
    settings = oracle.Settings(**OF_LEARNED, num_actions=2)
    params, batch, noise = oracle.random_case(2, settings)
    gradients = []
    for scale in (1.0, 1e3):  # Of what V is fitted to, which nothing else looks at.
        learner = float64_learner(settings, **LEARNED)
        load_params(learner, params)
        use_noise(learner, noise)
        changed = replace(batch, returns_to_go=batch.returns_to_go * scale)
        learner._uncompiled_update({MODULE: torch_batch(changed)})
        gradients.append(read_params(learner, gradients=True))
    for name, value in gradients[0].items():
        is_equal = np.array_equal(value, gradients[1][name])
        assert is_equal == (not name.startswith("reference.")), name
