"""`Saving`: what of the algorithm is in a checkpoint, how it is written, and how a run is resumed from it."""

from __future__ import annotations

import logging
import pathlib
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rllib_calql.checkpoints.folders import MARK
from rllib_calql.checkpoints.integrity import check_component, upload, write_manifest
from rllib_calql.checkpoints.manifest import check_resumable
from rllib_calql.checkpoints.pretrained import Learners, Pretrained, restoring
from rllib_calql.checkpoints.reading import (
    CheckpointFiles,
    clear_remote_checkpoint,
    read_of_one_save,
    replaced_folder,
)
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.system import activity

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

    from rllib_calql.store.replay import TransitionStore

logger = logging.getLogger(__name__)

STATE = "calql"  # The key of our part in the algorithm's state.

AlgorithmT = TypeVar("AlgorithmT")


class Stateful(Protocol):
    """A part of which something is in checkpoints."""

    def get_state(self) -> dict[str, Any]:
        """For the checkpoint."""
        ...

    def set_state(self, state: Mapping[str, Any]) -> None:
        """From the checkpoint."""
        ...


class Saving:
    """Writes checkpoints of an algorithm and restores them, by RLlib's means for RLlib's part.

    Args:
        lifetime: The counters.
        store: The data; of them, those collected online are in checkpoints.
        keeps_online_data: Whether they are (`store_buffer_in_checkpoints`).
        history: What evaluations said.
        collection: What else is kept of the collection.
        learners: Restored by this where they are remote.
        pretrained: Read before anything is saved, and not after a restore.
        manifest: Makes the manifest of the run as it stands.
        on_restored: Brings env runners in line with what was restored, and waits for it.
    """

    def __init__(
        self,
        *,
        lifetime: Lifetime,
        store: TransitionStore,
        keeps_online_data: bool,
        history: Stateful,
        collection: Sequence[Stateful],
        learners: Learners,
        pretrained: Pretrained,
        manifest: Callable[[], dict[str, Any]],
        on_restored: Callable[[], None],
    ) -> None:
        self._lifetime = lifetime
        self._store = store
        self._keeps_online_data = keeps_online_data
        self._history = history
        self._collection = collection
        self._learners = learners
        self._pretrained = pretrained
        self._manifest = manifest
        self._on_restored = on_restored

    # --- Saving ------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | pathlib.Path | None,
        *,
        state: dict[str, Any] | None,
        filesystem: FileSystem | None,
        write: Callable[..., Any],
        components: Callable[[], Iterable[tuple[str, Any]]],
    ) -> str:
        """Writes a checkpoint, see `CalQL.save_to_path`.

        Args:
            path: Folder, relative ones as well, or URI; by default a new folder for temporary files.
            state: What to write instead of the present state.
            filesystem: PyArrow file system of `path`; by default what the URI says.
            write: RLlib's `save_to_path`.
            components: RLlib's parts of the algorithm, which have folders of their own.

        Returns:
            The folder.

        Raises:
            RuntimeError: If somebody else is writing to the folder, or a remote learner could not write its part.
        """
        from pyarrow.fs import FileSystem, LocalFileSystem

        location = str(path or pathlib.Path(tempfile.gettempdir()) / str(uuid.uuid4()))
        if filesystem is None and "://" in location:
            filesystem, location = FileSystem.from_uri(location)
        if filesystem is not None and not isinstance(filesystem, LocalFileSystem):
            filesystem.create_dir(location, recursive=True)
            clear_remote_checkpoint(filesystem, location)
            with tempfile.TemporaryDirectory(prefix="rllib_calql_checkpoint_") as staged:
                self._write(pathlib.Path(staged), state, write, components)
                upload(pathlib.Path(staged), filesystem, location)
            return location
        target = pathlib.Path(location).expanduser().absolute()
        with replaced_folder(target) as folder:
            self._write(folder, state, write, components)
        return str(target)

    def _write(
        self,
        folder: pathlib.Path,
        state: dict[str, Any] | None,
        write: Callable[..., Any],
        components: Callable[[], Iterable[tuple[str, Any]]],
    ) -> None:
        from pyarrow.fs import LocalFileSystem

        activity.say("writing checkpoint")
        self._pretrained.load_if_due()
        own = state if state is None else state.get(STATE)
        manifest = self._manifest() if state is None else own and own["manifest"]
        write(str(folder), state=state, filesystem=LocalFileSystem())
        if self._learners.has_remote_learners and state is None:
            # RLlib has a learner actor write its own part, and ignores its errors.
            try:
                CheckpointFiles(LocalFileSystem(), str(folder)).learner_state()
            except (OSError, EOFError, ValueError, LookupError) as err:
                raise RuntimeError(f"A learner could not write its part of the checkpoint to '{folder}'.") from err
        _name_classes(folder)
        if manifest:
            write_manifest(folder, manifest, parts=[name for name, _ in components()])
        if manifest and manifest["online_data"]["in_checkpoint"]:
            online = manifest["online_data"]
            logger.info(
                "The checkpoint holds %d online transitions, %.1f MiB.", online["transitions"], online["mebibytes"]
            )

    def get_state(self) -> dict[str, Any]:
        """Our part of the algorithm's state: counters, debt of updates, online data, random state, evaluations."""
        return {
            **self._lifetime.get_state(),
            "store": self._store.get_state(with_online=self._keeps_online_data),
            "history": self._history.get_state(),
            "collection": {key: value for part in self._collection for key, value in part.get_state().items()},
            "manifest": self._manifest(),
        }

    # --- Restoring ---------------------------------------------------------------------------------------------------

    def restore(
        self, path: Any, *, component: str | None, filesystem: Any, by_rllib: Callable[..., Any], **kwargs: Any
    ) -> None:
        """Restores a checkpoint, see `CalQL.restore_from_path`.

        Args:
            path: Folder or URI.
            component: Restores this part only; `path` is then that part's folder.
            filesystem: PyArrow filesystem of `path`; by default what the URI says.
            by_rllib: RLlib's `restore_from_path`.
            **kwargs: RLlib's own.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it is no checkpoint, a damaged one, or not one of this run; nothing has been changed then.
        """
        if component is None:
            read_of_one_save(path, filesystem, lambda files: self._restore(files, by_rllib, **kwargs))
        else:  # RLlib's algorithm looks into it whenever it is there.
            check_component(path, filesystem)
            by_rllib(path, filesystem=filesystem, component=component, **kwargs)
        self._on_restored()

    def _restore(self, files: CheckpointFiles, by_rllib: Callable[..., Any], **kwargs: Any) -> None:
        activity.say("restoring the checkpoint")
        manifest = files.manifest()
        check_resumable(manifest, self._manifest())
        try:
            by_rllib(files.path, filesystem=files.filesystem, **kwargs)
        except Exception as err:
            if "files" in manifest:
                raise
            raise ValueError(
                f"The checkpoint at {files.source or files.path!r}, of a version without checksums, cannot be restored "
                f"and may be damaged ({type(err).__name__}: {err}); use another one."
            ) from err
        if self._learners.has_remote_learners:
            # RLlib has the learner actors read it, and ignores their errors.
            self._learners.set_learner_state(lambda learner, state: learner.set_state(state), files.learner_state())

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuses what `get_state` of another run returned.

        Raises:
            ValueError: If networks, spaces, data, rewards or the online capacity are not those of the state.
        """
        check_resumable(state["manifest"], self._manifest())

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_state` returned, after RLlib has restored its part."""
        self._pretrained.forget()
        self._lifetime.set_state(state)
        num_missing = self._store.set_state(state["store"])
        if num_missing:
            logger.warning(
                "The checkpoint was written with `store_buffer_in_checkpoints=False`: the %d online transitions that "
                "the run had are missing, and online batches are drawn from those collected from now on.",
                num_missing,
            )
        self._history.set_state(state["history"])
        for part in self._collection:
            part.set_state(state.get("collection", {}))
        self._on_restored()


def built_from_checkpoint(
    cls: type[AlgorithmT], path: Any, filesystem: FileSystem | None = None, *, config: Any = None
) -> AlgorithmT:
    """Builds an algorithm from a checkpoint and restores it, see `CalQL.from_checkpoint`.

    Args:
        cls: What the checkpoint has to be of.
        path: Folder (relative ones work as well), URI, or Ray Train `Checkpoint`.
        filesystem: PyArrow filesystem of `path`; by default what the URI says.
        config: Settings to go on with; by default those of the checkpoint.

    Raises:
        FileNotFoundError: If there is no such folder, or the data are not where the config says.
        ValueError: If the folder is no checkpoint, or a damaged one, or the config does not fit it.
    """
    built: AlgorithmT = read_of_one_save(
        path, filesystem, lambda files: _built(cls, files, config), discard=lambda built: built.stop()
    )
    return built


def _built(cls: type[Any], files: CheckpointFiles, config: Any) -> Any:
    algorithm_class, state = files.class_and_config_state()
    if not issubclass(algorithm_class, cls):
        raise ValueError(
            f"The checkpoint at {files.path!r} is of {algorithm_class.__name__}; use "
            f"`{algorithm_class.__name__}.from_checkpoint`."
        )
    try:
        with restoring():
            built = algorithm_class(state if config is None else config.copy(copy_frozen=False))
    except FileNotFoundError as err:
        if config is not None:
            raise
        raise FileNotFoundError(
            f"{err} The config in the checkpoint at {files.source or files.path!r} names it; where it has been "
            "moved, give the config with the new path: `from_checkpoint(path, config=...)`."
        ) from err
    try:
        built.restore_from_path(files.path, filesystem=files.filesystem)
    except BaseException:
        built.stop()
        raise
    return built


def _name_classes(folder: pathlib.Path) -> None:
    """Writes the class of each part of a checkpoint by its name.

    In an actor, as in a trial of Ray Tune, the class is one that Ray makes of ours, and a pickle would hold it whole: a
    version of this package in which a method is missing could not read it.
    """
    from ray import cloudpickle as pickle

    for mark in folder.rglob(MARK):
        content = pickle.loads(mark.read_bytes())
        named = getattr(content.get("class"), "__ray_actor_class__", None)
        if named is not None:
            mark.write_bytes(pickle.dumps({**content, "class": named}))
