"""What is told of a trial: its line while it goes on, its summary at the end."""

from __future__ import annotations

from typing import Any

import pytest

from rllib_calql.progress.budget import format_budget, format_duration, format_reached, limits_of
from rllib_calql.progress.lines import (
    Evaluation,
    Totals,
    TrialProgress,
    format_line,
    format_summary,
    observe,
)


def result_of(phase: str, done: int, seconds: float, **more: Any) -> dict[str, Any]:
    counter = {"offline": "num_offline_updates_lifetime", "online": "num_online_env_steps_lifetime"}[phase]
    return {"phase": phase, counter: done, "time_total_s": seconds, "training_iteration": 1} | more


def evaluation(episode_return: float, **more: float) -> dict[str, Any]:
    return {"evaluation": {"env_runners": {"episode_return_mean": episode_return, **more}}}


TOTALS = Totals(offline_updates=5_000, stop={"num_online_env_steps_lifetime": 10_000})


def test_an_offline_line_tells_updates_speed_time_left_and_the_evaluation() -> None:
    result = result_of("offline", 3_000, 15.0, **evaluation(31.204, success_rate=0.62))
    line = format_line(observe(TrialProgress("CalQL_a"), result, TOTALS))
    # 3,000 updates in 15 s are 200/s; the other 2,000 take 10 s.
    assert line == "CalQL_a  offline  3,000/5,000 updates  200/s  ETA 0:10  return 31.20  success 0.62"


def test_an_online_line_measures_speed_from_the_switch() -> None:
    progress = observe(TrialProgress("CalQL_a"), result_of("offline", 5_000, 20.0), TOTALS)
    progress = observe(progress, result_of("online", 1_000, 30.0) | {"training_iteration": 6}, TOTALS)
    # 1,000 env steps in the 10 s since the switch are 100/s; the other 9,000 take 90 s.
    assert format_line(progress) == "CalQL_a  online  1,000/10,000 env steps  100/s  ETA 1:30"


def test_a_resumed_run_measures_speed_from_its_first_result() -> None:
    progress = observe(TrialProgress("a"), result_of("offline", 2_000, 100.0) | {"training_iteration": 2}, TOTALS)
    assert format_line(progress) == "a  offline  2,000/5,000 updates"
    progress = observe(progress, result_of("offline", 3_000, 102.0) | {"training_iteration": 3}, TOTALS)
    assert format_line(progress) == "a  offline  3,000/5,000 updates  500/s  ETA 0:04"


def test_other_algorithms_count_iterations_if_they_stop_by_them_and_env_steps_otherwise() -> None:
    result = {"training_iteration": 1, "num_env_steps_sampled_lifetime": 400, "time_total_s": 2.0}
    result |= {"env_runners": {"episode_return_mean": 21.0}}
    by_iterations = observe(TrialProgress("PPO_a"), result, Totals(stop={"training_iteration": 4}))
    assert format_line(by_iterations) == "PPO_a  training  1/4 iterations  0.5/s  ETA 0:06  training return 21.00"
    by_steps = observe(TrialProgress("PPO_a"), result, Totals())
    assert format_line(by_steps) == "PPO_a  training  400 env steps  200/s  training return 21.00"


REGIMES = {
    "policy": (
        "At the switch the policy (return 0.94) is better than the data (0.40): `warmup_env_steps` keeps what it can, "
        "a low `mixing_ratio` costs little (arXiv:2510.01460)."
    ),
    "data": (
        "At the switch the data (return 0.40) are better than the policy (0.94): a high `mixing_ratio` keeps what they "
        "show, `warmup_env_steps` adds little (arXiv:2510.01460)."
    ),
    "both": (
        "At the switch the policy (return 0.94) and the data (0.40) differ by no more than chance: both are worth "
        "keeping, by `warmup_env_steps` and by `mixing_ratio` (arXiv:2510.01460)."
    ),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_summary_says_what_the_regime_at_the_switch_speaks_for(regime: str) -> None:
    told = {"regime": regime, "regime_quantity": "return", "regime_policy": 0.94, "regime_data": 0.4}
    progress = observe(TrialProgress("a"), result_of("offline", 5_000, 1.0, fine_tuning=told), TOTALS)
    progress = observe(progress, result_of("online", 1, 2.0), TOTALS)  # Another tool's result in between.
    assert f"  regime             {REGIMES[regime]}" in format_summary(progress, "ended", None).splitlines()


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"dip": -1.0},
        {"regime": "other", "regime_policy": 1.0, "regime_data": 0.0},
        {"regime": "policy", "regime_policy": float("nan"), "regime_data": 0.0},
        {"regime": "policy"},
    ],
)
def test_the_summary_says_nothing_of_a_regime_that_is_not_known(told: Any) -> None:
    progress = observe(TrialProgress("a"), result_of("offline", 1, 1.0, fine_tuning=told), TOTALS)
    assert "regime" not in format_summary(progress, "ended", None)


def test_an_iteration_without_evaluation_keeps_the_last_one_and_nan_is_no_return() -> None:
    progress = observe(TrialProgress("a"), result_of("offline", 1, 1.0, **evaluation(5.0)), TOTALS)
    later = result_of("offline", 2, 2.0, env_runners={"episode_return_mean": float("nan")})
    later |= evaluation(float("nan"))
    progress = observe(progress, later, TOTALS)
    assert progress.last == Evaluation(episode_return=5.0)
    assert progress.training_return is None


def test_the_summary_has_final_and_best_evaluation_dip_and_checkpoint() -> None:
    progress = TrialProgress("CalQL_a")
    for done, episode_return, success_rate in ((1, 10.0, 0.5), (2, 60.2, 0.98), (3, 53.1, 0.97)):
        evaluated = evaluation(episode_return, success_rate=success_rate, normalized_score=2 * episode_return)
        dip = {"fine_tuning": {"dip": -2.125, "regret": 0.1}} if done > 1 else {}
        progress = observe(progress, result_of("online", done, 64.0 * done, **evaluated, **dip), TOTALS)
    assert format_summary(progress, "ended", "/results/checkpoint_000001").splitlines() == [
        "CalQL_a: ended after 3:12",
        "  evaluation return  final 53.10, best 60.20",
        "  success rate       final 0.97, best 0.98",
        "  normalised score   final 106.20, best 120.40",
        "  dip at the switch  -2.12",
        "  checkpoint         /results/checkpoint_000001",
    ]


def test_the_summary_of_a_trial_without_evaluation_has_the_training_return() -> None:
    progress = TrialProgress("PPO_a", training_return=3.0, wall_s=3.6)
    assert format_summary(progress, "failed", None).splitlines() == [
        "PPO_a: failed after 0:04",
        "  training return    final 3.00",
        "  checkpoint         none",
    ]


def test_the_summary_says_what_of_the_budget_was_used() -> None:
    result = {"num_online_env_steps_lifetime": 1_998, "time_total_s": 192.3, "evaluation": {"env_runners": {}}}
    stop = {
        "num_online_env_steps_lifetime": 2_000,
        "time_total_s": 600,
        "evaluation/env_runners/success_rate": 0.95,  # A score to be reached is no budget.
        "training_iteration": float("inf"),
    }
    budget = format_budget(result, stop)
    assert budget == "1,998 of 2,000 online env steps, 3:12 of 10:00 min"
    assert "  budget             1,998 of 2,000" in format_summary(TrialProgress("a"), "ended", None, budget=budget)
    assert format_budget(result | {"time_total_s": 60.0}, {"time_total_s": 7_200}) == "1:00 of 2:00:00 h"
    assert format_budget(result, {"evaluation/env_runners/success_rate": 0.95}) is None


def test_the_env_steps_that_the_algorithm_may_take_are_part_of_the_budget() -> None:
    result = {"num_online_env_steps_taken_lifetime": 1_998}
    config = {"max_online_env_steps": 2_000, "num_envs_per_env_runner": 3}
    assert format_budget(result, limits_of({}, config)) == "1,998 of 2,000 online env steps taken"
    assert format_reached(result, {}, config) == "1,998 of `max_online_env_steps` 2,000 are taken"
    assert format_reached(result, {}, config | {"num_envs_per_env_runner": 2}) is None
    assert limits_of({"time_total_s": 5}, {"max_online_env_steps": None}) == {"time_total_s": 5}


def test_a_trial_that_had_ended_before_says_so_why_and_how_to_go_on() -> None:
    result = {"training_iteration": 3, "evaluation": {"env_runners": {"success_rate": 0.975}}}
    stop = {"training_iteration": 3, "evaluation/env_runners/success_rate": 0.9, "time_total_s": 60}
    reached = format_reached(result, stop, {})
    assert reached == "`training_iteration` is 3 of 3, `evaluation/env_runners/success_rate` is 0.97 of 0.90"
    assert format_reached(result, {"time_total_s": 60, "training_iteration": 4}, {}) is None
    lines = format_summary(TrialProgress("a", wall_s=192), "ended", None, already_ended=reached).splitlines()
    assert lines[:3] == [
        "a: had already ended before, after 3:12; nothing was run",
        f"  because            {reached}",
        "  to go on           raise what it ended at in the experiment's file, then `--resume` again",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (605, "10:05"), (3_661, "1:01:01")])
def test_durations_are_minutes_and_hours(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_held_out_episodes_and_overfitting_are_told_where_there_is_no_return() -> None:
    def judged(td_loss: float, **more: Any) -> dict[str, Any]:
        return {"evaluation": {"held_out": {"td_loss": td_loss, "td_loss_training": 0.5}}, **more}

    progress = TrialProgress("a")
    for number, td_loss in enumerate((2.5, 1.25, 1.75)):
        more = {"overfitting": "The critics overfit: so they say"} if number == 2 else {}
        progress = observe(progress, result_of("offline", 1_000 * (number + 1), 5.0, **judged(td_loss, **more)), TOTALS)
    assert format_line(progress).endswith("held-out TD loss 1.75")
    summary = format_summary(progress, "ended", "/checkpoint").splitlines()
    assert "  held-out TD loss   final 1.75, best 1.25" in summary
    assert "  overfitting        The critics overfit: so they say" in summary
    progress = observe(progress, result_of("offline", 4_000, 20.0, **judged(1.5)), TOTALS)
    assert "overfitting" not in format_summary(progress, "ended", None)


@pytest.mark.parametrize(
    ("warnings", "doubts"),
    [({}, ""), ({"warnings": "One."}, ", 1 warning"), ({"warnings": "One.\nTwo."}, ", 2 warnings")],
)
def test_a_value_by_data_is_told_with_its_interval_and_the_number_of_its_warnings(
    warnings: dict[str, str], doubts: str
) -> None:
    def judged(updates: int, evaluation: dict[str, Any]) -> TrialProgress:
        result = result_of("offline", updates, 5.0, evaluation={"held_out": {"td_loss": 0.5}} | evaluation)
        return observe(TrialProgress("a"), result, TOTALS)

    before = judged(1_000, {})
    assert "value" not in format_line(before) + format_summary(before, "ended", None)
    fitted = {"fqe": {"value": 0.34567, "value_low": 0.25, "value_high": 0.5} | warnings}
    progress = judged(2_000, fitted)
    assert format_line(progress).endswith(f"value by data 0.3457 [0.25, 0.5]{doubts}")
    assert (
        f"  value by data      final 0.3457 [0.25, 0.5]{doubts}" in format_summary(progress, "ended", None).splitlines()
    )
