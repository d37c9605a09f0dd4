"""Pictures of an episode in which something else was executed than was asked for."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.image import imread

from rllib_calql.common.returns import RewardSettings
from rllib_calql.datasets.report.episode import EpisodeView
from rllib_calql.progress.episode import draw

DPI, PANEL_INCHES = 110, 2.0


def pixels_of(**changes: Any) -> np.ndarray[Any, Any]:
    """Of four steps with one observation and one action."""
    view: dict[str, Any] = {
        "name": "logs",
        "id": "a",
        "index": 0,
        "is_terminated": True,
        "observations": [("[0]", np.arange(4.0))],
        "images": {},
        "actions": [("[0]", np.array([0.5, -0.5, 0.5, -0.5]))],
        "are_module_actions": False,
        "executed": (),
        "is_intervention": None,
        "rewards": np.ones(4),
        "returns_to_go": np.array([4.0, 3.0, 2.0, 1.0]),
        "settings": RewardSettings(1.0),
    }
    return np.asarray(imread(io.BytesIO(draw(EpisodeView(**view | changes), None))))[..., :3]


def test_executed_actions_stand_beside_those_asked_for_only_in_the_same_units() -> None:
    executed = [("[0]", np.array([np.nan, -1.0, np.nan, 1.0]))]
    plain = pixels_of()
    beside, apart = pixels_of(executed=executed), pixels_of(executed=executed, are_module_actions=True)
    assert beside.shape == plain.shape
    assert (beside != plain).any()
    assert apart.shape[0] - plain.shape[0] == round(DPI * PANEL_INCHES)


def test_many_executed_actions_with_gaps_are_drawn_where_they_are_known() -> None:
    asked = [(f"[{number}]", np.linspace(-1.0, 1.0, 4)) for number in range(9)]
    gaps = np.array([np.nan, 1.0, np.nan, np.nan])
    executed = [(name, gaps if number else np.full(4, np.nan)) for number, (name, _) in enumerate(asked)]
    for are_module_actions in (False, True):
        assert pixels_of(actions=asked, executed=executed, are_module_actions=are_module_actions).ndim == 3


def test_steps_in_which_a_person_acted_are_shaded() -> None:
    plain, shaded = pixels_of(), pixels_of(is_intervention=np.array([False, True, True, False]))
    colour = 1.0 - 0.18 * (1.0 - np.array([0xE6, 0x9F, 0x00]) / 255)
    num_shaded = [(np.abs(pixels - colour) < 0.01).all(axis=-1).mean() for pixels in (plain, shaded)]
    assert num_shaded[0] < 0.001
    assert num_shaded[1] > 0.1
