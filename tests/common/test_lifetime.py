"""`Lifetime` by hand-worked numbers: what is counted, what is owed, which phase follows."""

from __future__ import annotations

from rllib_calql.common import metrics as keys
from rllib_calql.common.lifetime import Lifetime


def lifetime_of(*, warmup_env_steps: int = 0, updates_per_env_step: float = 0.5) -> Lifetime:
    return Lifetime(offline_updates=10, updates_per_env_step=updates_per_env_step, warmup_env_steps=warmup_env_steps)


def test_the_phase_follows_from_the_offline_updates() -> None:
    lifetime = lifetime_of()
    lifetime.count_updates(9, online=False)
    assert (lifetime.phase, lifetime.num_offline_updates_left) == ("offline", 1)
    lifetime.count_updates(1, online=False)
    assert (lifetime.phase, lifetime.num_offline_updates_left) == ("online", 0)
    lifetime.count_updates(5, online=True)
    assert (lifetime.phase, lifetime.num_updates) == ("online", 15)


def test_env_steps_owe_updates_and_updates_pay_them_back() -> None:
    lifetime = lifetime_of()
    lifetime.count_episode(7)
    lifetime.count_episode(4)
    assert (lifetime.updates_owed, lifetime.num_env_steps_behind) == (5.5, 11.0)
    lifetime.count_updates(5, online=True)
    assert (lifetime.updates_owed, lifetime.num_env_steps_behind) == (0.5, 1.0)
    lifetime.count_updates(3, online=False)
    assert lifetime.updates_owed == 0.5


def test_the_warm_up_owes_nothing_even_if_it_ends_within_an_episode() -> None:
    lifetime = lifetime_of(warmup_env_steps=10, updates_per_env_step=2.0)
    assert lifetime.is_warming_up
    lifetime.count_episode(8)
    assert (lifetime.is_warming_up, lifetime.updates_owed) == (True, 0.0)
    lifetime.count_episode(8)
    assert (lifetime.is_warming_up, lifetime.updates_owed) == (False, 12.0)


def test_updates_that_are_lost_with_learners_are_owed_again() -> None:
    lifetime = lifetime_of()
    lifetime.count_updates(10, online=False)
    lifetime.count_episode(20)
    lifetime.count_updates(2, online=True)
    before = lifetime.counters()
    lifetime.count_updates(7, online=True)
    lifetime.count_episode(2)
    lifetime.take_back_updates(before)
    assert (lifetime.num_online_updates, lifetime.updates_owed) == (2, 10.0 - 2.0 + 1.0)
    assert (lifetime.num_online_env_steps, lifetime.num_online_episodes) == (22, 2)  # Data are not lost with learners.


def test_a_state_holds_everything() -> None:
    lifetime, restored = lifetime_of(), lifetime_of()
    lifetime.count_updates(10, online=False)
    lifetime.count_episode(5)
    lifetime.count_updates(1, online=True)
    state = lifetime.get_state()
    assert state == {
        keys.NUM_OFFLINE_UPDATES_LIFETIME: 10,
        keys.NUM_ONLINE_UPDATES_LIFETIME: 1,
        keys.NUM_ONLINE_ENV_STEPS_LIFETIME: 5,
        keys.NUM_ONLINE_EPISODES_LIFETIME: 1,
        keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME: 0,
        "updates_owed": 1.5,
    }
    restored.set_state(state)
    assert (restored.get_state(), restored.phase) == (state, "online")


def test_another_runs_networks_bring_its_offline_updates_alone() -> None:
    lifetime, other = lifetime_of(), lifetime_of()
    other.count_updates(10, online=False)
    other.count_episode(5)
    lifetime.continue_from(other.counters())
    assert lifetime.counters() == lifetime_of().counters() | {keys.NUM_OFFLINE_UPDATES_LIFETIME: 10}
    assert (lifetime.phase, lifetime.updates_owed) == ("online", 0.0)


def test_env_steps_taken_are_counted_apart_and_earlier_checkpoints_know_of_stored_ones_alone() -> None:
    lifetime, restored = lifetime_of(), lifetime_of()
    lifetime.count_episode(5)
    lifetime.count_env_steps_taken(7)
    assert (lifetime.num_online_env_steps, lifetime.num_online_env_steps_taken) == (5, 7)
    state = lifetime.get_state()
    restored.set_state(state)
    assert restored.num_online_env_steps_taken == 7
    del state[keys.NUM_ONLINE_ENV_STEPS_TAKEN_LIFETIME]
    restored.set_state(state)
    assert restored.num_online_env_steps_taken == 5
