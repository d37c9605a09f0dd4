"""`Pretrained`: a run that begins with the networks of another run's checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from ray.rllib.core import COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE

from rllib_calql.checkpoints.manifest import (
    changes_of_units,
    check_networks,
    check_reference_is_there,
    fits_reference_anew,
    remark_on_hold_out,
)
from rllib_calql.checkpoints.reading import CheckpointFiles, read_of_one_save
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.system import activity

logger = logging.getLogger(__name__)

_STATE = "calql"  # The learner's own part of its state.
_is_restoring: ContextVar[bool] = ContextVar("is_restoring", default=False)


def check_pretrained(path: Any) -> None:
    """Looks for the checkpoint that `pretrained` names, without reading it. A run that is restored needs none.

    Args:
        path: The checkpoint's folder or URI, or None.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no complete checkpoint.
    """
    if path is None or _is_restoring.get():
        return
    with _named():
        CheckpointFiles.find(path)


class Learners(Protocol):
    """Who gives learners another state."""

    @property
    def has_remote_learners(self) -> bool:
        """Whether learners are actors of their own."""
        ...

    def set_learner_state(self, func: Callable[[Any, dict[str, Any]], None], state: dict[str, Any]) -> None:
        """Calls `func` with every learner and the state."""
        ...


class Pretrained:
    """Takes over the networks of `config.pretrained`, once, unless the run is restored before.

    A run that is restored needs that checkpoint no more, and it may be gone. Ray Tune restores a trial only after it
    has been set up, so there it is read before the first training step.

    Args:
        path: The checkpoint's folder or URI, or None.
        learners: Get the networks.
        lifetime: Goes on from the checkpoint's offline updates.
        manifest: Makes the manifest of this run.
        on_loaded: Brings env runners in line with the learners, and waits for it.
        offline_updates: Offline updates that the config asks for, or None.
    """

    def __init__(
        self,
        path: Any,
        *,
        learners: Learners,
        lifetime: Lifetime,
        manifest: Callable[[], dict[str, Any]],
        on_loaded: Callable[[], None],
        offline_updates: int | None = None,
    ) -> None:
        self._offline_updates = offline_updates
        self._remarks: list[str] = []
        self._path = path
        self._learners = learners
        self._lifetime = lifetime
        self._manifest = manifest
        self._on_loaded = on_loaded
        self._is_due = path is not None and not _is_restoring.get()

    @property
    def remark(self) -> str | None:
        """What a user should know of the updates that were taken over, and of what they saw; None if nothing."""
        return ". ".join(self._remarks) or None

    def forget(self) -> None:
        """Nothing is taken over any more: the run has been restored."""
        self._is_due = False

    def load_if_due(self) -> bool:
        """Takes the networks over, and returns whether it did.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If it is none, or its networks or spaces are others; nothing has been changed then.
        """
        if not self._is_due:
            return False
        activity.say("reading the networks of `pretrained`")
        own = self._manifest()

        def read(files: CheckpointFiles) -> tuple[dict[str, Any], dict[str, Any]]:
            stored = files.manifest()
            check_networks(stored, own)
            check_reference_is_there(stored, own)
            return stored, files.learner_state()

        with _named():
            stored, learner_state = read_of_one_save(self._path, None, read)
        if changes := changes_of_units(stored, own):
            logger.warning(
                "The Q values of `pretrained` were learned in other units: %s. They are adapted only by training.",
                ", ".join(changes),
            )
        if fits_reference_anew(stored, own):  # From where it is.
            learner_state = {**learner_state, _STATE: {**learner_state[_STATE], "num_reference_updates": 0}}
        self._learners.set_learner_state(_adopt, learner_state)
        self._lifetime.continue_from(stored)
        self._tell_updates()
        self._tell(remark_on_hold_out(stored, own))
        self._is_due = False
        self._on_loaded()
        return True

    def _tell_updates(self) -> None:
        """Says what `offline_updates` means here: the total of both runs, so that the phase may be over already."""
        brought, total = self._lifetime.num_offline_updates, self._offline_updates
        if not brought or not total:
            return
        left = self._lifetime.num_offline_updates_left
        then = f"{left} are left before it goes online" if left else "so this run goes online at once"
        self._tell(
            f"{brought} offline updates come along with the networks and count for `offline_updates`, {total}: {then}. "
            f"For {total} more of them set `offline_updates` to {brought + total}"
        )

    def _tell(self, remark: str | None) -> None:
        if remark is not None:
            self._remarks.append(remark)
            logger.warning("`pretrained`: %s.", remark)


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError) as err:
        raise type(err)(f"`pretrained`: {err}") from err


def _adopt(learner: Any, state: dict[str, Any]) -> None:
    """Gives a learner the parameters, optimisers and update count of another run; its own seed stays."""
    own = learner.get_state(components=[_STATE])[_STATE]
    kept = {name: own[name] for name in ("generator", "seed") if name in own}
    learner.set_state(
        {
            COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE],
            # RLlib would register anew all optimisers for one that is not there, as that of `lagrangian`.
            COMPONENT_OPTIMIZER: {
                name: optimizer
                for name, optimizer in state[COMPONENT_OPTIMIZER].items()
                if name in learner._named_optimizers
            },
            _STATE: {**state[_STATE], **kept},
        }
    )


@contextmanager
def restoring() -> Iterator[None]:
    """While an algorithm is built to be restored: no `Pretrained` made within is ever due."""
    token = _is_restoring.set(True)
    try:
        yield
    finally:
        _is_restoring.reset(token)
