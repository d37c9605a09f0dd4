"""`ResumableCQL`: what of the algorithm is in a checkpoint, how a run is resumed from one or begun from another's."""

from __future__ import annotations

import logging
import pathlib
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.cql.cql import CQL
from ray.rllib.core import COMPONENT_LEARNER_GROUP, COMPONENT_OPTIMIZER, COMPONENT_RL_MODULE
from ray.rllib.utils.annotations import override
from ray.rllib.utils.checkpoints import Checkpointable

from rllib_calql.checkpoints.integrity import check_component, upload, write_manifest
from rllib_calql.checkpoints.manifest import changes_of_units, check_networks, check_resumable, manifest_of
from rllib_calql.checkpoints.reading import CheckpointFiles, clear_remote_checkpoint, read_of_one_save, replaced_folder
from rllib_calql.common import metrics as keys
from rllib_calql.config import CalQLConfig

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from typing_extensions import Self

    from rllib_calql.evaluation.history import EvaluationHistory
    from rllib_calql.store.replay import TransitionStore

logger = logging.getLogger(__name__)

_STATE = "calql"
_is_restoring: ContextVar[bool] = ContextVar("is_restoring", default=False)


class ResumableCQL(CQL):
    """The part of `CalQL` that concerns checkpoints.

    Attributes:
        config: The frozen config.
        store: Offline and online transitions.
        num_offline_updates: Gradient updates of the offline phase so far.
        num_online_updates: Gradient updates of the online phase so far.
        num_online_env_steps: Env steps stored so far.
        num_online_episodes: Episodes stored so far.
    """

    config: CalQLConfig
    store: TransitionStore
    num_offline_updates: int
    num_online_updates: int
    num_online_env_steps: int
    num_online_episodes: int
    _updates_owed: float
    _history: EvaluationHistory
    _observation_space: Any
    _action_space: Any
    _is_pretrained_due: bool = False

    def _collection_state(self) -> dict[str, Any]:
        """What checkpoints keep of the collection, besides the episodes stored."""
        raise NotImplementedError

    def _set_collection_state(self, state: dict[str, Any]) -> None:
        """Restores what `_collection_state` returned; empty from a checkpoint of an earlier version."""
        raise NotImplementedError

    def _after_restore(self) -> None:
        """Brings env runners in line with what was restored, and waits for it."""
        raise NotImplementedError

    def _counters_of_phases(self) -> dict[str, int]:
        return {
            keys.NUM_OFFLINE_UPDATES_LIFETIME: self.num_offline_updates,
            keys.NUM_ONLINE_UPDATES_LIFETIME: self.num_online_updates,
            keys.NUM_ONLINE_ENV_STEPS_LIFETIME: self.num_online_env_steps,
            keys.NUM_ONLINE_EPISODES_LIFETIME: self.num_online_episodes,
        }

    def _manifest(self) -> dict[str, Any]:
        return manifest_of(
            self.config,
            self.store,
            self._counters_of_phases(),
            observation_space=self._observation_space,
            action_space=self._action_space,
        )

    # --- Saving ------------------------------------------------------------------------------------------------------

    @override(Algorithm)
    def save_to_path(
        self,
        path: str | pathlib.Path | None = None,
        *,
        state: dict[str, Any] | None = None,
        filesystem: FileSystem | None = None,
        use_msgpack: bool = False,
    ) -> str:
        """Writes a checkpoint that takes the place of an earlier one at `path` only once it is complete.

        On a local file system an interruption at any moment leaves the earlier checkpoint or the new one, and one of
        several writers is let in, see `replaced_folder`. Elsewhere nothing can be renamed or locked: the files are
        written to a temporary folder and copied, and a checkpoint that was interrupted, or written by two at once, is
        refused when read.

        Args:
            path: Folder, relative ones as well, or URI; by default a new folder for temporary files.
            state: What to write instead of the present state.
            filesystem: PyArrow file system of `path`; by default what the URI says.
            use_msgpack: Refused.

        Returns:
            The folder.

        Raises:
            ValueError: With `use_msgpack`.
            RuntimeError: If somebody else is writing to the folder, or a remote learner could not write its part.
        """
        from pyarrow.fs import FileSystem, LocalFileSystem

        if use_msgpack:
            raise ValueError("`use_msgpack` is True, but Cal-QL's checkpoints are pickled only; drop it.")
        location = str(path or pathlib.Path(tempfile.gettempdir()) / str(uuid.uuid4()))
        if filesystem is None and "://" in location:
            filesystem, location = FileSystem.from_uri(location)
        if filesystem is not None and not isinstance(filesystem, LocalFileSystem):
            filesystem.create_dir(location, recursive=True)
            clear_remote_checkpoint(filesystem, location)
            with tempfile.TemporaryDirectory(prefix="rllib_calql_checkpoint_") as staged:
                self._write(pathlib.Path(staged), state=state)
                upload(pathlib.Path(staged), filesystem, location)
            return location
        target = pathlib.Path(location).expanduser().absolute()
        with replaced_folder(target) as folder:
            self._write(folder, state=state)
        return str(target)

    def _write(self, folder: pathlib.Path, *, state: dict[str, Any] | None) -> None:
        from pyarrow.fs import LocalFileSystem

        self._load_due_pretrained()
        own = state if state is None else state.get(_STATE)
        manifest = self._manifest() if state is None else own and own["manifest"]
        super().save_to_path(str(folder), state=state, filesystem=LocalFileSystem())
        if self.learner_group.is_remote and state is None:
            # RLlib has a learner actor write its own part, and ignores its errors.
            try:
                CheckpointFiles(LocalFileSystem(), str(folder)).learner_state()
            except (OSError, EOFError, ValueError, LookupError) as err:
                raise RuntimeError(f"A learner could not write its part of the checkpoint to '{folder}'.") from err
        if manifest:
            write_manifest(folder, manifest, parts=[name for name, _ in self.get_checkpointable_components()])
        if manifest and manifest["online_data"]["in_checkpoint"]:
            online = manifest["online_data"]
            logger.info(
                "The checkpoint holds %d online transitions, %.1f MiB.", online["transitions"], online["mebibytes"]
            )

    @override(Algorithm)
    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state and ours: counters, debt of updates, online data, random state, evaluations."""
        self._load_due_pretrained()
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(_STATE, components, not_components):
            state[_STATE] = {
                **self._counters_of_phases(),
                "updates_owed": self._updates_owed,
                "store": self.store.get_state(with_online=self.config.store_buffer_in_checkpoints),
                "history": self._history.get_state(),
                "collection": self._collection_state(),
                "manifest": self._manifest(),
            }
        return state

    # --- Restoring ---------------------------------------------------------------------------------------------------

    @classmethod
    @override(Algorithm)
    def from_checkpoint(
        cls, path: Any, filesystem: FileSystem | None = None, *, config: CalQLConfig | None = None, **kwargs: Any
    ) -> Self:
        """Builds an algorithm from what `save_to_path` or Tune wrote, and restores its state.

        Args:
            path: Folder (relative ones work as well), URI, or Ray Train `Checkpoint`.
            filesystem: PyArrow filesystem of `path`; by default what the URI says.
            config: Settings to go on with, for example with other numbers of env runners or learners, or other learning
                rates; by default those of the checkpoint. Networks, spaces, data and rewards must be the same.
            **kwargs: Refused; they belong to RLlib's old API stack.

        Raises:
            FileNotFoundError: If there is no such folder, or the data are not where the config says.
            ValueError: If the folder is no checkpoint, or a damaged one, or the config does not fit it.
            TypeError: If there are other arguments, or `config` is no `CalQLConfig`.
        """
        if kwargs:
            names = ", ".join(f"`{name}`" for name in sorted(kwargs))
            raise TypeError(f"`from_checkpoint` takes `path`, `filesystem` and `config`, got {names}; drop them.")
        if config is not None and not isinstance(config, CalQLConfig):
            raise TypeError(f"`config` must be a `CalQLConfig`, got {type(config).__name__}.")
        return read_of_one_save(
            path, filesystem, lambda files: cls._restored(files, config), discard=lambda restored: restored.stop()
        )

    @classmethod
    def _restored(cls, files: CheckpointFiles, config: CalQLConfig | None) -> Self:
        algorithm_class, state = files.class_and_config_state()
        if not issubclass(algorithm_class, cls):
            raise ValueError(
                f"The checkpoint at {files.path!r} is of {algorithm_class.__name__}; use "
                f"`{algorithm_class.__name__}.from_checkpoint`."
            )
        try:
            with _restoring():
                restored: Self = algorithm_class(state if config is None else config.copy(copy_frozen=False))
        except FileNotFoundError as err:
            if config is not None:
                raise
            raise FileNotFoundError(
                f"{err} The config in the checkpoint at {files.source or files.path!r} names it; where it has been "
                "moved, give the config with the new path: `from_checkpoint(path, config=...)`."
            ) from err
        try:
            restored.restore_from_path(files.path, filesystem=files.filesystem)
        except BaseException:
            restored.stop()
            raise
        return restored

    @override(Algorithm)
    def restore_from_path(
        self, path: str | pathlib.Path, *, component: str | None = None, filesystem: Any = None, **kwargs: Any
    ) -> None:
        """Restores a checkpoint, also without env runners, and waits until runners have the weights.

        Args:
            path: Folder or URI.
            component: Restores this part only; `path` is then that part's folder.
            filesystem: PyArrow filesystem of `path`; by default what the URI says.
            **kwargs: RLlib's own.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is no checkpoint, a damaged one, or not one of this run; nothing has been changed then.
        """
        if component is None:
            read_of_one_save(path, filesystem, lambda files: self._restore(files, **kwargs))
        else:  # RLlib's algorithm looks into it whenever it is there.
            check_component(path, filesystem)
            self._restore_by_rllib(path, filesystem=filesystem, component=component, **kwargs)
        if self.env_runner_group is not None:
            self._after_restore()

    def _restore(self, files: CheckpointFiles, **kwargs: Any) -> None:
        manifest = files.manifest()
        check_resumable(manifest, self._manifest())
        try:
            self._restore_by_rllib(files.path, filesystem=files.filesystem, **kwargs)
        except Exception as err:
            if "files" in manifest:
                raise
            raise ValueError(
                f"The checkpoint at {files.source or files.path!r}, of a version without checksums, cannot be restored "
                f"and may be damaged ({type(err).__name__}: {err}); use another one."
            ) from err
        if self.learner_group.is_remote:
            # RLlib has the learner actors read it, and ignores their errors.
            self._set_learner_state(lambda learner, state: learner.set_state(state), files.learner_state())

    def _restore_by_rllib(self, path: str | pathlib.Path, **kwargs: Any) -> None:
        restore = Checkpointable.restore_from_path if self.env_runner_group is None else Algorithm.restore_from_path
        restore(self, path, **kwargs)

    @override(Algorithm)
    def set_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_state` returned.

        Raises:
            ValueError: If networks, spaces, data, rewards or the online capacity are not those of the state.
        """
        state = dict(state)
        own = state.pop(_STATE, None)
        if own is not None:
            check_resumable(own["manifest"], self._manifest())
        if self.env_runner_group is None and COMPONENT_LEARNER_GROUP in state:
            self.learner_group.set_state(state.pop(COMPONENT_LEARNER_GROUP))
        super().set_state(state)
        if own is None:
            return
        self._is_pretrained_due = False
        self.num_offline_updates = own[keys.NUM_OFFLINE_UPDATES_LIFETIME]
        self.num_online_updates = own[keys.NUM_ONLINE_UPDATES_LIFETIME]
        self.num_online_env_steps = own[keys.NUM_ONLINE_ENV_STEPS_LIFETIME]
        self.num_online_episodes = own[keys.NUM_ONLINE_EPISODES_LIFETIME]
        self._updates_owed = own["updates_owed"]
        num_missing = self.store.set_state(own["store"])
        if num_missing:
            logger.warning(
                "The checkpoint was written with `store_buffer_in_checkpoints=False`: the %d online transitions that "
                "the run had are missing, and online batches are drawn from those collected from now on.",
                num_missing,
            )
        self._history.set_state(own["history"])
        self._set_collection_state(own.get("collection", {}))
        self._after_restore()

    # --- Another run's networks --------------------------------------------------------------------------------------

    def _load_pretrained(self) -> None:
        """Takes over the networks of `config.pretrained`, for `setup`; at once, unless a restore may follow.

        A run that is restored needs that checkpoint no more, and it may be gone. Ray Tune restores a trial only after
        it has been set up, so there it is read before the first training step.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If it is none, or its networks or spaces are others; nothing has been changed then.
        """
        self._is_pretrained_due = self.config.pretrained is not None and not _is_restoring.get()
        if self._storage is None:
            self._load_due_pretrained(sync=False)

    def _load_due_pretrained(self, *, sync: bool = True) -> None:
        if not self._is_pretrained_due:
            return
        own = self._manifest()

        def read(files: CheckpointFiles) -> tuple[dict[str, Any], dict[str, Any]]:
            stored = files.manifest()
            check_networks(stored, own)
            return stored, files.learner_state()

        try:
            stored, learner_state = read_of_one_save(self.config.pretrained, None, read)
        except (FileNotFoundError, ValueError) as err:
            raise type(err)(f"`pretrained`: {err}") from err
        if changes := changes_of_units(stored, own):
            logger.warning(
                "The Q values of `pretrained` were learned in other units: %s. They are adapted only by training.",
                ", ".join(changes),
            )
        self._set_learner_state(_adopt, learner_state)
        self.num_offline_updates = stored[keys.NUM_OFFLINE_UPDATES_LIFETIME]
        self._is_pretrained_due = False
        if sync:
            self._after_restore()

    def _set_learner_state(self, func: Callable[[Any, dict[str, Any]], None], state: dict[str, Any]) -> None:
        """Calls `func` with every learner and the state; errors of remote ones are raised."""
        if self.learner_group.is_remote:
            reference = ray.put(state)
            results = self.learner_group.foreach_learner(lambda learner: func(learner, ray.get(reference)))
        else:
            results = self.learner_group.foreach_learner(lambda learner: func(learner, state))
        for result in results:
            if not result.ok:
                raise result.get()

    @override(Algorithm)
    def step(self) -> dict[str, Any]:
        """One iteration, RLlib's; begins with the networks of `pretrained`, where they are still due."""
        self._load_due_pretrained()
        results: dict[str, Any] = super().step()
        return results


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
def _restoring() -> Iterator[None]:
    token = _is_restoring.set(True)
    try:
        yield
    finally:
        _is_restoring.reset(token)
