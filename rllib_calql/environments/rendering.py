"""`make_rendered`: an environment that gives a picture of each of its states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from rllib_calql.environments.resolving import ResolvedEnv, resolve_env
from rllib_calql.system.offscreen import prepare_offscreen

MODE = "rgb_array"
_REMEDY = (
    f'a video needs `metadata = {{"render_modes": ["{MODE}"], "render_fps": 30}}` in its class, and a `render()` that '
    "returns an array (height, width, 3) of bytes"
)


def make_rendered(env: Any, env_config: Mapping[str, Any]) -> gym.Env[Any, Any]:
    """Makes an environment whose `render()` returns pictures of even height and width.

    Args:
        env: The setting `env`.
        env_config: The setting `env_config`; `render_mode` is put into it.

    Raises:
        ValueError: If the environment declares no pictures, or does not take `render_mode` from `env_config`.
    """
    resolved = resolve_env(env)
    what = f"`env` {resolved.name!r}"
    given = env_config.get("render_mode")
    if given not in (None, MODE):
        raise ValueError(f"`env_config` sets `render_mode` {given!r}, and a video needs {MODE!r}; drop it.")
    if modes := _modes(_class_of(resolved)):
        _check_modes(modes, what)
    config = {**env_config, "render_mode": MODE}
    if hasattr(env_config, "copy_with_overrides"):  # RLlib's, which tells the number of the env runner as well.
        config = env_config.copy_with_overrides(env_config=config)
    try:
        made = resolved.creator(config)
    except TypeError as error:
        if "render_mode" not in str(error):
            raise
        raise ValueError(f"{what} takes no `render_mode` ({error}), so it cannot be recorded; {_REMEDY}.") from error
    _check_modes(_modes(made), what)
    if made.render_mode != MODE:
        made.close()
        raise ValueError(
            f"{what} has `render_mode` {made.render_mode!r}, though `env_config` asks for {MODE!r}; its constructor "
            'has to set `self.render_mode = config.get("render_mode")`.'
        )
    return _Pictures(made, what)


class _Pictures(gym.Wrapper[Any, Any, Any, Any]):
    """Checks what `render` returns, and says what is missing where it fails."""

    def __init__(self, env: gym.Env[Any, Any], what: str) -> None:
        super().__init__(env)
        self._what = what

    def render(self) -> Any:
        try:
            picture: Any = self.env.render()
        except Exception as error:
            problem = prepare_offscreen()
            raise RuntimeError(
                f"`render()` of {self._what} failed, {type(error).__name__}: {error}{f'. {problem}' if problem else ''}"
            ) from error
        is_picture = isinstance(picture, np.ndarray) and picture.ndim == 3 and picture.shape[2] == 3
        if not is_picture or picture.dtype != np.uint8:
            found = f"{picture.dtype} of shape {picture.shape}" if isinstance(picture, np.ndarray) else repr(picture)
            raise ValueError(
                f"`render()` of {self._what} returned {found}; it has to return an array (height, width, 3) of bytes."
            )
        return _even(picture)


def _even(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The picture with its last row and column twice where their number is odd: few players know such videos."""
    height, width = picture.shape[:2]
    if height % 2 == 0 and width % 2 == 0:
        return picture
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _class_of(resolved: ResolvedEnv) -> Any:
    """The class of an environment that has not been made; None if it is not known."""
    if resolved.kind != "gymnasium id":
        return resolved.creator if isinstance(resolved.creator, type) else None
    try:
        entry_point = gym.spec(resolved.name.rpartition(":")[2]).entry_point
    except gym.error.Error:
        return None
    return gym.envs.registration.load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point


def _modes(owner: Any) -> list[str]:
    metadata = getattr(owner, "metadata", None)
    return list(metadata.get("render_modes") or ()) if isinstance(metadata, Mapping) else []


def _check_modes(modes: list[str], what: str) -> None:
    if MODE in modes:
        return
    declared = f"the render modes {', '.join(map(repr, modes))} alone" if modes else "no render mode"
    raise ValueError(f"{what} declares {declared}, so it cannot be recorded; {_REMEDY}.")
