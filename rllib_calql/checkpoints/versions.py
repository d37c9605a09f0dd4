"""Versions that a checkpoint was made with, compared with those here where it matters."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("rllib-calql", "ray", "torch", "numpy")


def versions_here() -> dict[str, str | None]:
    """Python and the packages that decide on what a checkpoint holds; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version_of(name) for name in _PACKAGES}}


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# Settings that came later, with the value that earlier versions computed by.
_COMPUTED_BY = {"observation_clip": None}


def completed_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a checkpoint, those that were unknown when it was made included: the run stays what it was."""
    return {**_COMPUTED_BY, **state}


def incompatible(stored: Mapping[str, str | None]) -> str | None:
    """Why a checkpoint made with these versions cannot be read here, with the remedy; None if it can.

    * NumPy: arrays pickled by NumPy 2 name modules that NumPy 1 lacks, `numpy._core` for example. The other way round
      NumPy itself sees to it.
    * This package: a newer minor version may keep what this one would leave out without a word.

    Others do not matter by themselves: RLlib is pinned by this package, networks and optimisers are stored as NumPy
    arrays, and Python's minor version only for functions and classes of the user's own script, which cloudpickle stores
    as byte code. If reading fails, the message names all that differ, see `difference`.
    """
    here = versions_here()
    was, now = _number(stored.get("numpy")), _number(here["numpy"])
    if was and now and was[0] > now[0]:
        return (
            f"it was made with NumPy {stored['numpy']}, whose arrays NumPy {here['numpy']} here cannot read; "
            f'pip install "numpy>={was[0]}"'
        )
    was, now = _number(stored.get("rllib-calql")), _number(here["rllib-calql"])
    if was and now and was > now:
        return (
            f"it was made with rllib-calql {stored['rllib-calql']}, which is newer than {here['rllib-calql']} here; "
            f'pip install "rllib-calql>={was[0]}.{was[1]}"'
        )
    return None


def difference(stored: Mapping[str, str | None]) -> str:
    """Which versions are others here, as a sentence for the end of a message; empty if none is."""
    here = versions_here()
    parts = [f"{name} {was} (here {here[name]})" for name, was in stored.items() if name in here and here[name] != was]
    return f" It was made with {', '.join(parts)}." if parts else ""


def _number(text: str | None) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(match[1]), int(match[2])) if match else None
