"""Which OpenGL draws MuJoCo's pictures where there is no display."""

from __future__ import annotations

import os
import sys

import pytest

from rllib_calql.system import offscreen

choose = offscreen.prepare_offscreen.__wrapped__  # Without the memory of what was chosen before.


@pytest.fixture(autouse=True)
def _without_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")
    for name in ("MUJOCO_GL", "SDL_AUDIODRIVER", "SDL_VIDEODRIVER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("broken", "chosen"), [((), "egl"), (("egl",), "osmesa")])
def test_the_first_that_works_is_chosen(broken: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offscreen, "_why_not", lambda kind: "no driver" if kind in broken else None)
    assert choose() is None
    assert os.environ["MUJOCO_GL"] == chosen


def test_where_none_works_both_reasons_and_the_remedy_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offscreen, "_why_not", lambda kind: f"no {kind} here")
    told = choose()
    assert told is not None
    assert "(EGL: no egl here; OSMesa: no osmesa here)" in told
    assert "apt-get install libegl1" in told
    assert "MUJOCO_GL" not in os.environ


@pytest.mark.parametrize(
    ("name", "value"), [("DISPLAY", ":0"), ("WAYLAND_DISPLAY", "wayland-0"), ("MUJOCO_GL", "glfw")]
)
def test_a_display_or_the_choice_of_the_user_is_left_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offscreen, "_why_not", lambda kind: pytest.fail("tried"))
    monkeypatch.setenv(name, value)
    assert choose() is None
    assert os.environ.get("MUJOCO_GL") == (value if name == "MUJOCO_GL" else None)


def test_a_kind_that_cannot_be_used_is_told_by_mujocos_own_error() -> None:
    assert "invalid value for environment variable MUJOCO_GL: nothing" in (offscreen._why_not("nothing") or "")
