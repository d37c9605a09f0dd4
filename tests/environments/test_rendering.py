"""Environments that give pictures, and why others do not."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from drawn_line import DrawnLine

from rllib_calql.environments import rendering
from rllib_calql.environments.rendering import make_rendered


@pytest.mark.parametrize("env", ["drawn_line:DrawnLine", "drawn_line.DrawnLine", DrawnLine, lambda c: DrawnLine(c)])
def test_an_environment_of_any_name_is_asked_for_pictures(env: Any) -> None:
    made = make_rendered(env, {"steps": 3})
    made.reset()
    made.step(np.zeros(1, np.float32))
    picture: Any = made.render()
    assert picture.shape == (48, 64, 3)  # 47 rows are made even.
    assert (picture == 10).all()


def test_an_environment_of_gymnasium_is_asked_by_its_keyword() -> None:
    made = make_rendered("Pendulum-v1", {"g": 9.0})
    made.reset(seed=0)
    picture: Any = made.render()
    assert (picture.shape, picture.dtype) == ((500, 500, 3), np.uint8)
    assert made.unwrapped.g == 9.0  # type: ignore[attr-defined]
    made.close()


@pytest.mark.parametrize(
    ("env", "env_config", "message"),
    [
        (
            "tiny:LineEnv",
            {},
            r"'tiny:LineEnv' declares no render mode, so it cannot be recorded; a video needs `metadata",
        ),
        (lambda config: gym.make("drawn_line:OldLine-v0"), {}, r"has `render_mode` None, though `env_config` asks for"),
        ("drawn_line:HumanLine", {}, r"declares the render modes 'human' alone, so it cannot be recorded"),
        ("drawn_line:DeafLine", {}, r"has `render_mode` None, .* `self.render_mode = config.get\(\"render_mode\"\)`"),
        ("drawn_line:OldLine-v0", {}, r"takes no `render_mode` \(.*unexpected keyword argument 'render_mode'"),
        ("drawn_line:DrawnLine", {"render_mode": "human"}, r"`env_config` sets `render_mode` 'human', .* drop it"),
    ],
)
def test_an_environment_without_pictures_is_refused(env: Any, env_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rendered(env, env_config)


def test_something_else_than_a_picture_is_refused() -> None:
    made = make_rendered("drawn_line:SketchedLine", {})
    with pytest.raises(ValueError, match=r"returned float64 of shape \(4, 4, 3\); .* \(height, width, 3\) of bytes"):
        made.render()


def test_a_picture_that_cannot_be_drawn_is_told_with_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "prepare_offscreen", lambda: "Install a driver.")
    made = make_rendered("drawn_line:BrokenLine", {})
    with pytest.raises(RuntimeError, match=r"`render\(\)` of .* failed, OSError: no context\. Install a driver\."):
        made.render()
