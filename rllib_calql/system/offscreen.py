"""Pictures without a display: which OpenGL draws those of MuJoCo, and quiet for those of Pygame."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache

_VARIABLE = "MUJOCO_GL"
_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
_KINDS = {"egl": "EGL", "osmesa": "OSMesa"}
_PROBE = "import mujoco; context = mujoco.GLContext(64, 64); context.make_current(); context.free()"
_TIMEOUT_S = 60.0


@cache
def prepare_offscreen() -> str | None:
    """Sets `MUJOCO_GL` where MuJoCo is installed, there is no display, and the user has not set it: EGL, else OSMesa.

    Each is tried in a process of its own, since one that fails can spoil the other in the same process. MuJoCo reads
    the variable when it is imported, so this comes before environments are. Pygame, by which many other environments
    draw, is told that nobody listens, since it complains of missing sound cards.

    Returns:
        Why none of the two can be used, with the remedy; None if nothing is wrong, or nothing is to be done.
    """
    has_display = any(os.environ.get(name) for name in _DISPLAYS)
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    if sys.platform == "linux" and not has_display:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if sys.platform != "linux" or has_display or os.environ.get(_VARIABLE):
        return None
    if importlib.util.find_spec("mujoco") is None:
        return None
    reasons = []
    for kind, name in _KINDS.items():
        reason = _why_not(kind)
        if reason is None:
            os.environ[_VARIABLE] = kind
            return None
        reasons.append(f"{name}: {reason}")
    return (
        f"MuJoCo draws without a display by EGL or OSMesa, and neither works here ({'; '.join(reasons)}). Install one "
        "of them (Debian and Ubuntu: `apt-get install libegl1 libgl1-mesa-dri`, or `libosmesa6`), or give the command "
        "a display by `xvfb-run`."
    )


def _why_not(kind: str) -> str | None:
    """Why a kind of OpenGL cannot be used, in a few words; None if it can."""
    environment = {**os.environ, _VARIABLE: kind}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith((" ", "Exception ignored"))]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines or [f"exit code {done.returncode}"])[-1 if not errors else 0]
