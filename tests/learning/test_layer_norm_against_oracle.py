"""Layer norm in both networks or in one of them: losses, gradients and updates against the float64 NumPy oracle."""

from __future__ import annotations

import itertools

import oracle
import pytest
from oracle_bridge import (
    MODULE,
    assert_params_equal,
    float64_learner,
    load_params,
    module_of,
    read_params,
    torch_batch,
    use_noise,
)

from rllib_calql.common import metrics as keys

# Every two of the other settings take all their values together with each choice of networks.
COMBINATIONS = [
    oracle.Settings(
        layer_norm=layer_norm,
        max_target_backup=max_target_backup,
        deterministic_backup=deterministic_backup,
        lagrangian=max_target_backup ^ deterministic_backup,
        num_critics=num_critics,
        num_actions=2,
    )
    for layer_norm in (True, "critic", "actor")
    for max_target_backup, deterministic_backup in itertools.product((True, False), repeat=2)
    for num_critics in (2, 10)
]


def name_of(settings: oracle.Settings) -> str:
    return (
        f"{settings.layer_norm}-max={settings.max_target_backup}-entropy={not settings.deterministic_backup}-"
        f"lagrangian={settings.lagrangian}-{settings.num_critics}"
    )


@pytest.mark.parametrize("settings", COMBINATIONS, ids=name_of)
def test_losses_gradients_and_five_updates_equal_the_oracle(settings: oracle.Settings) -> None:
    params, batch, noise = oracle.random_case(7, settings, batch_size=5, hiddens=(9, 7))
    learner = float64_learner(settings, hiddens=(9, 7))
    load_params(learner, params)
    use_noise(learner, noise)
    state = oracle.initial_opt_state(params)
    for number in range(5):
        learner._uncompiled_update({MODULE: torch_batch(batch)})
        if number == 0:
            gradients = oracle.gradients(params, batch, noise, settings)
            assert all(gradients[name].any() for name in gradients if ".norms." in name and "target." not in name)
            assert_params_equal(read_params(learner, gradients=True), gradients)
        params, state, metrics = oracle.full_update(params, state, batch, noise, settings)
        if number == 0:
            logged = learner._accumulator.pop()
            for key, expected in ((keys.QF_LOSS, "critic_loss"), (keys.POLICY_LOSS, "actor_loss")):
                assert logged[key] == pytest.approx(metrics[expected], rel=1e-9), key
            assert logged[keys.TARGET_Q] == pytest.approx(metrics["target_mean"], rel=1e-9)
    assert_params_equal(read_params(learner), params)


@pytest.mark.parametrize(("layer_norm", "in_policy", "in_critics"), [
    (False, False, False), (True, True, True), ("actor", True, False), ("critic", False, True),
])  # fmt: skip
def test_the_setting_says_which_networks_are_normalised(
    layer_norm: bool | str, in_policy: bool, in_critics: bool
) -> None:
    module = module_of(float64_learner(oracle.Settings(layer_norm=layer_norm)))
    names = {name.split(".")[0] for name in module.state_dict() if "norm" in name}
    assert names == {*["policy"] * in_policy, *["critic", "target_critic"] * in_critics}
