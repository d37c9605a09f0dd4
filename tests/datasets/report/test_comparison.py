"""Data against spaces: what is measured is right, mistakes are told with key, index and numbers, sound data are not."""

from __future__ import annotations

import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from rllib_calql.datasets.episodes.reader import EpisodeBlock
from rllib_calql.datasets.report.comparison import findings_on_spaces, mismatches
from rllib_calql.datasets.report.report import DatasetReport, ReportBuilder

RNG = np.random.default_rng(0)
TANK = Dict(level=Box(0, 2, (1,)), temperature=Box(15, 100, (1,)), setpoint=Box(0, 2, (1,)))
VALVES = Box(0, 100, (2,))
ROWS = 3000


def report_of(
    observations: Any,
    actions: np.ndarray | None = None,
    spaces: tuple[gym.Space[Any] | None, gym.Space[Any] | None] = (None, None),
    *,
    num_blocks: int = 3,
    measures_images: bool = False,
) -> DatasetReport:
    """Of observations in rows, divided into blocks of one episode each."""
    nested = observations if isinstance(observations, (dict, tuple)) else {"": observations}
    values = list(nested.values()) if isinstance(nested, dict) else list(nested)
    num_rows = len(values[0])
    actions = RNG.uniform(0, 100, (num_rows, 2)) if actions is None else actions
    builder = ReportBuilder(observation_space=spaces[0], action_space=spaces[1], measures_images=measures_images)
    for rows in np.array_split(np.arange(num_rows), num_blocks):
        if isinstance(observations, dict):
            block: Any = {key: value[rows] for key, value in observations.items()}
        elif isinstance(observations, tuple):
            block = tuple(value[rows] for value in observations)
        else:
            block = observations[rows]
        builder.add(
            EpisodeBlock(
                ids=[str(rows[0])],
                lengths=np.array([len(rows)]),
                observations=block,
                final_observations=None,
                actions=actions[rows],
                rewards=np.arange(len(rows), dtype=float),
                terminateds=np.array([True]),
                truncateds=np.array([False]),
                where=lambda row: f"row {row}",
            )
        )
    return builder.build()


def tank(**changes: np.ndarray) -> dict[str, np.ndarray]:
    sound = {
        "level": RNG.uniform(0.3, 1.9, (ROWS, 1)),
        "temperature": RNG.uniform(18, 60, (ROWS, 1)),
        "setpoint": np.full((ROWS, 1), 1.2),
    }
    return sound | changes


def findings(
    observations: Any, actions: np.ndarray | None = None, space: Any = TANK, action_space: Any = VALVES
) -> Any:
    spaces = space, action_space
    return findings_on_spaces(report_of(observations, actions, spaces), *spaces)


# --- Measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize("num_blocks", [1, 7])
def test_range_mean_and_deviation_of_every_number_are_those_of_numpy(dtype: Any, num_blocks: int) -> None:
    values = (RNG.uniform(0, 200, (ROWS, 2, 3)) + (1e6 if dtype == np.float64 else 0)).astype(dtype)
    values[:, 1, 2] = values[0, 1, 2]
    (info,) = report_of(values, num_blocks=num_blocks).observations
    flat = values.reshape(ROWS, -1).astype(np.float64)
    for name in ("min", "max", "mean", "std"):
        measured = getattr(info, {"min": "low", "max": "high"}.get(name, name))
        np.testing.assert_allclose(measured, getattr(flat, name)(axis=0), rtol=1e-9, atol=1e-7, err_msg=name)
    assert list(info.constant) == [False] * 5 + [True] if dtype != np.bool_ else info.constant[5]


def test_pictures_are_one_number_and_only_where_it_is_asked_for() -> None:
    pictures = RNG.integers(0, 256, (50, 8, 8, 3)).astype(np.uint8)
    assert report_of(pictures).observations[0].low == ()
    (info,) = report_of(pictures, measures_images=True).observations
    measured = (info.low, info.high, info.mean, info.std)
    numbers = pictures.astype(float)
    expected = [(numbers.min(),), (numbers.max(),), (numbers.mean(),), (numbers.std(),)]
    np.testing.assert_allclose(measured, expected, rtol=1e-9)
    assert "(all numbers)" in str(report_of(pictures, measures_images=True))


def test_the_report_tells_ranges_by_key_and_index_and_survives_storing() -> None:
    report = report_of(tank(), spaces=(TANK, VALVES))
    lines = {line.split()[0]: line for line in str(report).splitlines() if line.startswith(("'", "["))}
    assert lines["'setpoint'[0]"].split()[1:] == ["1.2", "1.2", "1.2", "0", "constant"]
    assert {"'level'[0]", "'temperature'[0]", "[0]", "[1]"} < lines.keys()
    assert DatasetReport.from_dict(report.to_dict()) == report
    assert "'' and" not in str(report_of(np.zeros((9, 60))))
    assert "and 20 more" in str(report_of(np.zeros((9, 60))))


# --- Findings ---------------------------------------------------------------------------------------------------------


def test_sound_data_give_no_finding() -> None:
    assert findings(tank()) == []
    # On the bounds, stored with the rounding of float32; a step beyond them once in a while.
    level = np.full((ROWS, 1), np.float32(0.1) * 20)
    level[0] = 2.05
    assert findings(tank(level=level)) == []
    unbounded = Box(-np.inf, np.inf, (3,))
    assert findings(RNG.normal(size=(ROWS, 3)) * 1e6, space=unbounded) == []
    widest = np.finfo(np.float32).max
    assert findings(np.zeros((ROWS, 1)), space=Box(-widest, widest, (1,))) == []
    fixed = Box(np.float32([0, 0.5]), np.float32([100, 0.5]))
    actions = np.stack([RNG.uniform(0, 100, ROWS), np.full(ROWS, 0.5)], axis=1)
    assert findings(tank(), actions, action_space=fixed) == []
    parts = (RNG.integers(1, 4, ROWS), RNG.integers(0, 3, (ROWS, 2)), RNG.integers(0, 2, (ROWS, 3)))
    space = Tuple((Discrete(3, start=1), MultiDiscrete([3, 3]), MultiBinary(3)))
    assert findings(parts, space=space) == []


def test_swapped_columns_are_told_by_both_names() -> None:
    sound = tank()
    found = findings(tank(level=sound["temperature"], temperature=sound["level"]))
    assert len(found) == 2
    assert found[0].startswith("observations 'level'[0]: 100 % of the values lie outside [0, 2], the bounds of")
    for finding in found:
        assert "check the order of the columns" in finding
        assert {"'level'[0]", "'temperature'[0]"} <= set(finding.replace(":", " ").split())


def test_swapped_columns_of_actions_are_told_by_both_names_and_other_units_are_not() -> None:
    space = Box(np.float32([0, 10]), np.float32([100, 90]))
    pump, valve = np.linspace(0, 100, ROWS), np.linspace(10, 90, ROWS)
    (swapped,) = findings(tank(), np.stack([valve, pump], axis=1), action_space=space)
    assert swapped.startswith("actions[1]: 20 % of the values lie outside [10, 90]")
    assert swapped.endswith("actions[1] and actions[0] would fit each other's bounds, as if they were swapped")
    shares = findings(tank(), np.stack([pump, valve], axis=1) / 100, action_space=space)
    assert shares[0].endswith("check the units, or clip them")
    assert not any("swapped" in finding for finding in shares)


def test_the_share_of_values_outside_is_exact_and_flat_rows_are_named_by_key() -> None:
    level = np.where(np.arange(ROWS) % 4 == 0, 7.5, 1.0)
    flat = np.stack([level, np.full(ROWS, 1.0), RNG.uniform(18, 60, ROWS)], axis=1)  # Keys in sorted order.
    (info,) = report_of(flat, spaces=(TANK, None)).observations
    assert info.share_outside == (0.25, 0.0, 0.0)
    (finding,) = findings(flat)
    assert "25 % of the values lie outside [0, 2]" in finding
    assert "from 1 to 7.5; check the units" in finding
    assert finding.startswith("observations 'level'[0]:")


def test_one_glitch_far_outside_is_told_and_many_numbers_of_one_array_are_one_line() -> None:
    temperature = RNG.uniform(18, 60, (ROWS, 1))
    temperature[17] = 1e6
    (finding,) = findings(tank(temperature=temperature))
    assert "'temperature'[0]: 0.03333 %" in finding
    assert "to 1e+06" in finding or "to 1,000,000" in finding
    (finding,) = findings(np.full((ROWS, 50), 3.0), space=Box(-1, 1, (50,)))
    assert finding.startswith("observations[0]: 100 % of the values")
    assert "(and 49 more of its numbers likewise)" in finding


def test_actions_in_other_units_are_told_by_the_share_of_the_range_that_they_use() -> None:
    actions = np.stack([np.linspace(0, 1, ROWS), np.linspace(0, 100, ROWS)], axis=1)
    (finding,) = findings(tank(), actions)
    assert finding.startswith("actions[0]: the values use 1 % of the action space's range [0, 100], from 0 to 1; check")
    actions[:, 0] = 30.0
    (finding,) = findings(tank(), actions)
    assert finding.startswith("actions[0] is 30 at every step")
    (finding,) = findings(tank(), np.stack([np.linspace(-1, 100, ROWS), np.linspace(0, 100, ROWS)], axis=1))
    assert "lie outside [0, 100], the bounds of the action space; they go from -1 to 100" in finding


def test_actions_that_reach_exactly_from_minus_one_to_one_may_be_scaled() -> None:
    actions = np.sin(np.linspace(0, 20 * np.pi, 20_001))[:, None]
    observations = RNG.normal(size=(20_001, 1))
    unbounded = Box(-np.inf, np.inf, (1,))
    (finding,) = findings(observations, actions, unbounded, Box(-2, 2, (1,)))
    assert 'set `action_space_of_data="module"`' in finding
    assert findings(observations, actions, unbounded, Box(-1, 1, (1,))) == []
    assert findings(observations, 1.5 * actions, unbounded, Box(-2, 2, (1,))) == []


# --- Structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observations", "space", "message"),
    [
        (tank(), Dict({k: TANK[k] for k in ("level", "setpoint")}), "have 'temperature', which the environment lacks"),
        (tank(), Dict({**TANK, "flow": Box(0, 1, (1,))}), "observations lack 'flow', which the environment has"),
        (tank(), Dict({**TANK, "level": Box(0, 2, (2,))}), r"'level' have shape \(1,\), the environment's \(2,\)"),
        (np.zeros((ROWS, 4)), TANK, "rows of 4 numbers, the environment's have 3 in"),
        (np.zeros((ROWS, 2, 3)), Box(-1, 1, (3, 2)), r"have shape \(2, 3\), the environment's \(3, 2\): transpose"),
        (np.zeros((ROWS, 3)), Box(0, 9, (3,), np.uint8), "hold float64, the environment's uint8"),
        (np.zeros((ROWS, 3)), Box(-1, 1, (3,)), None),
        (np.zeros((ROWS, 3)), TANK, None),
        (np.zeros((ROWS, 1)), Discrete(3), None),
    ],
)
def test_what_cannot_be_trained_on_in_the_environment_is_said(
    observations: Any, space: Any, message: str | None
) -> None:
    wrong = mismatches(report_of(observations), space, VALVES)
    if message is None:
        assert wrong == []
    else:
        (line,) = wrong
        assert re.search(message, line), line


def test_actions_of_another_size_do_not_fit() -> None:
    (wrong,) = mismatches(report_of(tank()), TANK, Box(-1, 1, (3,)))
    assert wrong == "actions have shape (2,), the environment's (3,)"
