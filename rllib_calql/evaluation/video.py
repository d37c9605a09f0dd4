"""Videos of episodes, by Gymnasium's `RecordVideo`."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym

from rllib_calql.environments.rendering import make_rendered
from rllib_calql.policy.whole_files import partial_of
from rllib_calql.system.offscreen import prepare_offscreen

ENDING = ".mp4"
_PREFIX = "video"
_USUAL_FPS = 30.0  # Of `RecordVideo` where the environment declares none.
# MoviePy places frames by sums of 1 / rate and loses some to rounding, unless the rate is a power of two. The rate of
# the environment is set where the pieces are joined.
_EXACT_FPS = 32


@dataclass(frozen=True)
class Video:
    """What is recorded of an evaluation.

    Attributes:
        file: Where the video is written; an existing one is replaced.
        num_episodes: How many of the first episodes it shows, one after the other.
    """

    file: Path
    num_episodes: int


def check_video_file(file: Path, name: str = "`file`") -> None:
    """Refuses a file that no video can be written into, before anything is recorded.

    Args:
        file: The file.
        name: What it is called in messages.

    Raises:
        ValueError: If it is no `.mp4`, or its folder does not exist.
    """
    if file.suffix.lower() != ENDING:
        raise ValueError(f"{name} must name a {ENDING} file, got '{file}'.")
    if file.is_dir():
        raise ValueError(f"{name}: '{file}' is a folder; name a file.")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{name}: the folder of '{file}' does not exist; create it first.")


def require_moviepy() -> None:
    """Raises an ImportError that names the remedy if MoviePy, which Gymnasium writes videos by, is not installed."""
    try:
        import moviepy  # noqa: F401
    except ImportError as err:
        raise ImportError('Videos need the `moviepy` package: pip install "rllib-calql[video]"') from err


class Recorder:
    """Records episodes one file each, and joins them: `RecordVideo` holds all frames of a file in memory.

    Args:
        num_episodes: How many of the first episodes are recorded.

    Raises:
        ImportError: If MoviePy is not installed.
    """

    def __init__(self, num_episodes: int) -> None:
        require_moviepy()
        prepare_offscreen()
        self._num_episodes = num_episodes
        self._fps = _USUAL_FPS
        self._folder = tempfile.TemporaryDirectory(prefix="rllib_calql_video_")

    def make(self, env: Any, env_config: Mapping[str, Any]) -> gym.Env[Any, Any]:
        """Makes the environment, which is recorded from its first reset on, until it is closed.

        Raises:
            ValueError: If it cannot be recorded.
        """
        rendered = make_rendered(env, env_config)
        self._fps = float(rendered.metadata.get("render_fps") or _USUAL_FPS)
        return gym.wrappers.RecordVideo(
            rendered,
            fps=_EXACT_FPS,
            video_folder=str(self._pieces),
            episode_trigger=lambda number: number < self._num_episodes,
            name_prefix=_PREFIX,
            disable_logger=True,
        )

    def write(self, file: Path) -> None:
        """Writes what was recorded as one file, whole or not at all.

        Raises:
            RuntimeError: If that fails.
        """
        from moviepy.config import FFMPEG_BINARY

        names = [f"{_PREFIX}-episode-{number}{ENDING}" for number in range(self._num_episodes)]
        names = [name for name in names if (self._pieces / name).exists()]
        listing = self._pieces / "pieces.txt"
        listing.write_text("".join(f"file '{name}'\n" for name in names))
        partial = partial_of(file)
        # Nothing is encoded again.
        rate = ["-itsscale", repr(_EXACT_FPS / self._fps)]
        command = [FFMPEG_BINARY, "-v", "error", *rate, "-f", "concat", "-safe", "0", "-i", str(listing)]
        try:
            joined = subprocess.run(
                [*command, "-c", "copy", "-f", "mp4", str(partial)],
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            if joined.returncode or not names:
                raise RuntimeError(f"The video '{file}' could not be written: {joined.stderr.strip() or 'no frames'}.")
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes what was recorded and not written."""
        self._folder.cleanup()

    @property
    def _pieces(self) -> Path:
        # `RecordVideo` makes the folder, and warns of one that is there.
        return Path(self._folder.name, "pieces")
