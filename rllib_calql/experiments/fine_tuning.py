"""`FineTuning`: a checkpoint that goes on learning from episodes that come as files, without its environment.

A round reads the folder, adds what is new, makes the updates that it owes, and replaces the checkpoint in the output
folder, whole, by one that knows which episodes are in it. So whatever interrupts a round, the next one begins with the
checkpoint of before or after it, and nothing is counted twice or lost.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rllib_calql.algorithm import CalQL
from rllib_calql.checkpoints.folders import beside
from rllib_calql.checkpoints.reading import CheckpointFiles, read_of_one_save
from rllib_calql.collection.intake import AddedEpisodes, ReadEpisode, TakenEpisodes, read_episodes, taken_in
from rllib_calql.common import metrics as keys
from rllib_calql.common.spaces import is_flat_or_image
from rllib_calql.config import CalQLConfig, KeptInCheckpoints
from rllib_calql.policy.loading import load_policy
from rllib_calql.policy.whole_files import told
from rllib_calql.system.file_lock import LockedError, held_lock

FINE_TUNED_FROM = "fine_tuned_from"  # Of manifests: path and fingerprint of the checkpoint that it began with.
_OUTPUT = "{name}-fine-tuned"
_MODULE = "learner_group/learner/rl_module/default_policy/class_and_ctor_args.pkl"
_UPDATES_AT_ONCE = 50  # Between two looks at signals and progress.
_SAVE_EVERY_S = 300.0


@dataclass(frozen=True)
class Start:
    """What a round begins with.

    Attributes:
        files: Of the checkpoint.
        config: Its config.
        manifest: Its manifest.
        observation_space: The environment's.
        action_space: The environment's.
        taken: Episodes that are in it.
        updates_owed: Updates that it still owes.
        num_offline_updates_left: Updates of its offline phase that were not made.
    """

    files: CheckpointFiles
    config: CalQLConfig
    manifest: Mapping[str, Any]
    observation_space: gym.Space[Any]
    action_space: gym.spaces.Box
    taken: TakenEpisodes
    updates_owed: float
    num_offline_updates_left: int


def default_output(checkpoint: str) -> Path:
    """Where the new checkpoint goes if nobody says it: beside what the user named, or there if it is one of these."""
    path = Path(os.path.abspath(checkpoint))
    return path.with_name(_OUTPUT.format(name=path.name))


def is_fine_tuned(files: CheckpointFiles) -> bool:
    """Whether a checkpoint was made by fine-tuning."""
    return files.raw_manifest() is not None and FINE_TUNED_FROM in files.manifest()


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Keeps others from fine-tuning to the same folder meanwhile.

    Raises:
        LockedError: If somebody does.
        OSError: If nothing can be written beside the folder.
    """
    with ExitStack() as stack:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held_lock(beside(output, "fine-tune.lock")))
        except LockedError as error:
            raise ValueError(
                f"'{output}' is being fine-tuned: {error.holder}. Wait for its end, or choose another `--output`."
            ) from error
        except OSError as error:
            remedy = "choose another folder by `--output`"
            raise told(error, f"Nothing can be written beside '{output}'", remedy) from error
        yield


class FineTuning:
    """Rounds of fine-tuning from one source of episodes to one output folder.

    Args:
        checkpoint: Files of the checkpoint that the first round begins with.
        output: Folder of the new checkpoint, which later rounds begin with.
        updates_per_env_step: Updates for each env step that is added; None for the checkpoint's own.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If one is damaged, of another algorithm, or if the output is none of this checkpoint.
    """

    def __init__(self, checkpoint: CheckpointFiles, output: Path, *, updates_per_env_step: float | None = None) -> None:
        self.output = output
        self.origin = {
            "path": checkpoint.path,
            "fingerprint": _fingerprint(checkpoint),
        }
        self._updates_per_env_step = updates_per_env_step
        self._algorithm: CalQL | None = None
        is_there = output.exists() or beside(output, "new").exists() or beside(output, "old").exists()
        begins = checkpoint
        if is_there and not _is_same(checkpoint, output):
            begins = self._own(checkpoint)
        elif is_there:
            self.origin = dict(checkpoint.manifest()[FINE_TUNED_FROM])
        start = read_of_one_save(begins.path, begins.filesystem, self._read)
        self.start = replace(start, files=begins)

    def _own(self, checkpoint: CheckpointFiles) -> CheckpointFiles:
        """The checkpoint of earlier rounds in the output folder; `checkpoint` itself if that is empty."""
        folder = self.output
        if folder.is_dir() and not any(folder.iterdir()) and not beside(folder, "old").exists():
            return checkpoint
        if Path(checkpoint.path).resolve() == folder.resolve():
            raise ValueError(
                f"`--output` '{folder}' is the checkpoint itself, which stays as it is; choose another folder."
            )
        try:
            own = CheckpointFiles.find(folder)
        except ValueError as error:
            raise ValueError(f"`--output` '{folder}' is there already, and cannot be gone on with: {error}") from error
        origin = own.manifest().get(FINE_TUNED_FROM)
        if origin is None or origin["fingerprint"] != self.origin["fingerprint"]:
            what = f"was fine-tuned from '{origin['path']}' as it was then" if origin else "is that of a training"
            raise ValueError(
                f"The checkpoint in '{folder}' {what}, not of '{checkpoint.path}' as it is now. To go on with it, "
                "give it as RUN_OR_CHECKPOINT; to begin with the other, choose another `--output`."
            )
        return own

    @property
    def num_offline_updates_left_out(self) -> int:
        """Updates of the offline phase that the checkpoint lacks, and that are not made."""
        return self.start.num_offline_updates_left

    @property
    def config(self) -> CalQLConfig:
        """Of the algorithm, with its environment."""
        return self.start.config

    def read(self, episodes: Any) -> tuple[list[ReadEpisode], int]:
        """Episodes that are new, all of them checked, and how many are known.

        Raises:
            FileNotFoundError: If there is no such file or folder.
            ImportError: If the format needs a package that is missing.
            ValueError: Naming the episode that is broken, unfinished, or of other spaces or units.
        """
        start = self.start
        read = read_episodes(
            episodes, start.config, observation_space=start.observation_space, action_space=start.action_space
        )
        new, known = self._taken.divided(read)
        return new, len(known)

    @property
    def _taken(self) -> TakenEpisodes:
        return self.start.taken if self._algorithm is None else self._algorithm._parts.intake.taken

    @property
    def updates_owed(self) -> int:
        """Updates that are to be made, those of earlier rounds that were interrupted."""
        owed = self.start.updates_owed if self._algorithm is None else self._algorithm.lifetime.updates_owed
        return int(owed)

    def round(
        self,
        new: list[ReadEpisode],
        *,
        say: Callable[[str], None],
        on_progress: Callable[[int, int], None],
        is_stopped: Callable[[], bool],
    ) -> tuple[AddedEpisodes | None, int]:
        """Adds episodes, makes what is owed, and saves. What is interrupted is saved, too, and goes on next time.

        Args:
            new: As `read` gives them.
            say: Called with what is going on.
            on_progress: Called with updates made and updates in all.
            is_stopped: Whether to save and return.

        Returns:
            What was added, None if nothing was, and updates made.
        """
        if self._algorithm is None:
            say("building the networks, reading the offline data")
            self._algorithm = self._built()
        algorithm = self._algorithm
        added = algorithm.add_episodes(new) if new else None
        total, made, saved = self.updates_owed, 0, time.monotonic()
        say(f"making {total:,} updates")
        while made < total and not is_stopped():
            now = algorithm.make_owed_updates(most=min(_UPDATES_AT_ONCE, total - made))
            if not now:
                break  # Batches need rows that are not there.
            made += now
            on_progress(made, total)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
        say("writing the checkpoint")
        self.save()
        return added, made

    def save(self) -> None:
        """Replaces the checkpoint in the output folder.

        Raises:
            OSError: If it cannot be written; the one before stays as it is.
        """
        assert self._algorithm is not None
        try:
            self._algorithm.save_to_path(self.output)
        except OSError as error:
            remedy = "the one before is as it was; give the command again once it can be written, and nothing is lost"
            raise told(error, f"The checkpoint cannot be written to '{self.output}'", remedy) from error

    @property
    def counters(self) -> Mapping[str, int]:
        """Of the run's lifetime."""
        if self._algorithm is not None:
            return self._algorithm.lifetime.counters()
        return {name: int(value) for name, value in self.start.manifest.items() if name.startswith("num_")}

    def newest(self) -> Any:
        """Path of the checkpoint as it stands, and its file system."""
        if self._algorithm is not None:
            return str(self.output), None
        return self.start.files.path, self.start.files.filesystem

    def policy_is_current(self, file: Path) -> bool:
        """Whether a policy file is that of the checkpoint as it stands."""
        path, filesystem = self.newest()
        try:
            policy = load_policy(file)
        except (OSError, ValueError, ImportError):
            return False
        about: Mapping[str, Any] = policy.metadata.get("checkpoint") or {}
        return bool(about.get("fingerprint") == _fingerprint(CheckpointFiles.find(path, filesystem)))

    def close(self) -> None:
        """Ends the algorithm, if there is one."""
        if self._algorithm is not None:
            self._algorithm.stop()
            with suppress(OSError):
                os.rmdir(self._algorithm.logdir)  # Ray's, in `~/ray_results`, and empty.

    def _read(self, files: CheckpointFiles) -> Start:
        manifest, config = files.manifest(), files.config()
        state = files.read("algorithm_state.pkl")
        own = state.get("calql", {})
        if self._updates_per_env_step is not None:
            config.fine_tuning(updates_per_env_step=self._updates_per_env_step)
        left = max(0, config.num_offline_updates - int(manifest[keys.NUM_OFFLINE_UPDATES_LIFETIME]))
        if left:  # The phase is over where the checkpoint is.
            config.fine_tuning(offline_updates=config.num_offline_updates - left)
        observation_space, action_space = _spaces(files, manifest)
        return Start(
            files=files,
            config=config,
            manifest=manifest,
            observation_space=observation_space,
            action_space=action_space,
            taken=taken_in(own.get("collection", {})),
            updates_owed=float(own.get("updates_owed", 0.0)),
            num_offline_updates_left=left,
        )

    def _built(self) -> CalQL:
        start = self.start
        run = start.config.copy(copy_frozen=False)
        run.environment(None, observation_space=start.observation_space, action_space=start.action_space)
        run.env_runners(num_env_runners=0, num_envs_per_env_runner=1)
        run.env_runner_cls = None
        run.evaluation_interval = None
        run.evaluation_num_env_runners = 0
        run.offline_evaluation_interval = None
        run.fine_tuning(max_online_env_steps=None, sample_async=False)
        if run.num_learners <= 1:  # In this process.
            run.learners(num_learners=0)
        carried = {name: start.manifest[name] for name in ("environment", "spaces") if name in start.manifest}
        run._kept_in_checkpoints = KeptInCheckpoints(start.config, {**carried, FINE_TUNED_FROM: self.origin})
        algorithm: CalQL = CalQL.from_checkpoint(start.files.path, start.files.filesystem, config=run)
        return algorithm


def _is_same(checkpoint: CheckpointFiles, output: Path) -> bool:
    return Path(checkpoint.path).resolve() == output.resolve() and is_fine_tuned(checkpoint)


def _fingerprint(files: CheckpointFiles) -> str:
    return f"sha256:{hashlib.sha256(files.raw_manifest() or b'').hexdigest()}"


def _spaces(files: CheckpointFiles, manifest: Mapping[str, Any]) -> tuple[gym.Space[Any], gym.spaces.Box]:
    """The environment's, without the environment: of flat observations and images the module knows it."""
    content = files.read(_MODULE)
    arguments = _arguments(content)
    seen, action_space = arguments["observation_space"], arguments["action_space"]
    stored = manifest["spaces"]["observation_space"]
    exact = stored.get("exact")
    if exact is None or (is_flat_or_image(seen) and exact["kind"] == "Box" and tuple(exact["shape"]) == seen.shape):
        if exact is None and stored.get("structure", {}).get("kind") not in ("Box", "image"):
            raise ValueError(
                f"The observation space of the checkpoint, {stored['space']}, is not kept whole in it; train it with "
                "this version, or use keys that are strings or integers."
            )
        return seen, action_space
    return _space_of(exact), action_space


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    args, kwargs = content["ctor_args_and_kwargs"]
    names = ("observation_space", "action_space")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _space_of(description: Mapping[str, Any]) -> gym.Space[Any]:
    """A space of which `described_space` says the same; bounds of numbers are those of their type."""
    kind = description["kind"]
    if kind == "Dict":
        parts = zip(description["keys"], description["parts"], strict=True)
        return gym.spaces.Dict({key: _space_of(part) for key, part in parts})
    if kind == "Tuple":
        return gym.spaces.Tuple([_space_of(part) for part in description["parts"]])
    if kind == "Discrete":
        return gym.spaces.Discrete(description["n"], start=description["start"])
    if kind == "MultiDiscrete":
        return gym.spaces.MultiDiscrete(np.array(description["n"]), start=np.array(description["start"]))
    shape, dtype = tuple(description["shape"]), np.dtype(description["dtype"])
    if kind == "MultiBinary":
        return gym.spaces.MultiBinary(shape)
    if dtype.kind == "f":
        return gym.spaces.Box(-math.inf, math.inf, shape, dtype.type)
    if dtype.kind == "b":
        return gym.spaces.Box(0, 1, shape, dtype.type)
    info = np.iinfo(dtype)
    high = info.max - 1 if dtype == np.uint8 else info.max  # Bytes up to 255 would be taken for a picture.
    return gym.spaces.Box(info.min, high, shape, dtype.type)
