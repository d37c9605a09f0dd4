"""Checkpoints with damaged, missing or foreign files, and of other versions: an error that says which, or the state."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from damaged_checkpoints import content_replaced, damage_every_file, files_of, flipped, is_same, state_of
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from ray import cloudpickle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from small_learners import make_learner
from tiny import line_config, write_line_data

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.checkpoints import integrity, versions
from rllib_calql.checkpoints.reading import CheckpointFiles, config_of
from rllib_calql.commands.main import main

pytestmark = pytest.mark.usefixtures("ray_session")

WEIGHTS = "learner_group/learner/rl_module/default_policy/module_state.pkl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def config_at(folder: Path) -> Callable[[], CalQLConfig]:
    return lambda: line_config(folder, offline_updates=3, updates_per_iteration=3)


@pytest.fixture(scope="module")
def run(config_at: Callable[[], CalQLConfig], folder: Path, ray_session: None) -> Iterator[tuple[CalQL, Path, Any]]:
    """An algorithm, a checkpoint of its online phase, and its state then; it has been trained since."""
    algo = config_at().build()
    algo.train()
    algo.train()
    path = Path(algo.save_to_path(folder / "saved"))
    saved = state_of(algo)
    algo.train()
    yield algo, path, saved
    algo.stop()


@pytest.fixture
def checkpoint(run: tuple[CalQL, Path, Any], tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(run[1], tmp_path / "checkpoint"))


def flip(path: Path, bit: int = 1000) -> None:
    path.write_bytes(flipped(path.read_bytes(), bit % (8 * path.stat().st_size)))


def edit_manifest(checkpoint: Path, **changes: Any) -> None:
    """Gives the manifest other content, as a version that writes it would; None removes an entry."""
    content = json.loads((checkpoint / "calql.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None and name != "digest"}
    if "files" in content:
        content["digest"] = integrity._digest(content)
    (checkpoint / "calql.json").write_text(json.dumps(content))


def as_of_an_earlier_version(checkpoint: Path) -> None:
    edit_manifest(checkpoint, files=None, save=None, format=None)


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_damage_to_any_file_is_an_error_that_names_it_and_changes_nothing(run: tuple[CalQL, Path, Any]) -> None:
    algo, path, saved = run
    trials = damage_every_file(algo, path, saved, num_bits=2)
    assert trials.wrong == []
    assert trials.num_named + trials.num_exact == 5 * len(files_of(path))
    assert trials.num_named >= 4.9 * len(files_of(path))
    algo.restore_from_path(path)
    assert is_same(state_of(algo), saved)
    algo.train()


def test_all_damaged_files_are_named_before_anything_is_unpickled(
    run: tuple[CalQL, Path, Any], checkpoint: Path, config_at: Callable[[], CalQLConfig]
) -> None:
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / "env_runner" / "state.pkl").unlink()
    (checkpoint / "env_runner" / "state.pkl").mkdir()
    payload = checkpoint.with_name("executed")
    (checkpoint / "class_and_ctor_args.pkl").write_bytes(b"cos\nmkdir\n(V" + str(payload).encode() + b"\ntR.")
    message = (
        rf"The checkpoint at '{checkpoint}' is damaged: 'class_and_ctor_args.pkl' has \d+ bytes instead of \d+, "
        f"'env_runner/state.pkl' is missing, '{WEIGHTS}' is missing; use another one"
    )
    for read in (
        CalQL.from_checkpoint,
        run[0].restore_from_path,
        run[0].load_checkpoint,  # Ray Tune's.
        config_of,
        lambda path: config_at().fine_tuning(pretrained=path).build(),
    ):
        with pytest.raises(ValueError, match=message):
            read(checkpoint)
    outcome = CliRunner().invoke(main, ["evaluate", str(checkpoint)])
    assert outcome.exit_code == 1
    assert f"'{WEIGHTS}' is missing" in outcome.output
    assert not payload.exists()


def test_a_flipped_bit_in_the_weights_is_neither_restored_nor_evaluated_nor_pretrained_from(
    checkpoint: Path, config_at: Callable[[], CalQLConfig]
) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    flip(checkpoint / WEIGHTS, 8 * content.index(b"policy.head.weight") // 2)
    message = rf"is damaged: '{WEIGHTS}' has other content than was saved; use another one\."
    for cls in (CalQL, Algorithm):
        with pytest.raises(ValueError, match=message):
            cls.from_checkpoint(str(checkpoint))
    with pytest.raises(ValueError, match="^`pretrained`: The checkpoint at .*" + message):
        config_at().fine_tuning(pretrained=checkpoint).build()
    outcome = CliRunner().invoke(main, ["evaluate", str(checkpoint), "--episodes", "1"])
    assert outcome.exit_code == 1
    assert f"'{WEIGHTS}' has other content than was saved" in outcome.output
    assert "Traceback" not in outcome.output


def test_a_part_is_checked_as_well_when_it_is_restored_alone(run: tuple[CalQL, Path, Any], checkpoint: Path) -> None:
    algo, _, saved = run
    flip(checkpoint / "algorithm_state.pkl")
    part = "learner_group/learner/rl_module"
    algo.restore_from_path(checkpoint / part, component=part)
    weights = state_of(algo)[0]["rl_module"]
    assert is_same(weights, saved[0]["rl_module"])
    flip(checkpoint / WEIGHTS)
    with pytest.raises(ValueError, match=rf"checkpoint at '{checkpoint}' is damaged: '{WEIGHTS}' has other content"):
        algo.restore_from_path(checkpoint / part, component=part)
    assert is_same(state_of(algo)[0]["rl_module"], weights)
    algo.train()


@pytest.mark.parametrize("part", ["learner_group", "algorithm_state.pkl", "env_runner"])
def test_files_of_two_saves_are_never_taken_for_one(run: tuple[CalQL, Path, Any], checkpoint: Path, part: str) -> None:
    later = Path(run[0].save_to_path(checkpoint.with_name("later")))
    if part == "env_runner":  # Its files do not change from save to save.
        (later / part / "state.pkl").write_bytes(b"other")
    if (checkpoint / part).is_dir():
        shutil.rmtree(checkpoint / part)
        shutil.copytree(later / part, checkpoint / part)
    else:
        shutil.copy(later / part, checkpoint / part)
    with pytest.raises(ValueError, match=rf"is damaged: .*'{part}.* than was saved|'{part}.*instead of"):
        run[0].restore_from_path(checkpoint)


def test_files_of_others_are_tolerated_and_those_that_rllib_would_read_are_not(
    run: tuple[CalQL, Path, Any], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algo, _, saved = run
    names = ["notes/state.pkl", ".metadata.json", "rllib_calql_whole.pkl", "learner_group/backup/state.pkl"]
    for path in (*checkpoint.rglob("*.pkl"), *checkpoint.rglob("*.json")):  # As macOS, editors and people do.
        name = path.relative_to(checkpoint)
        names += [str(name.with_name(other)) for other in (f"._{name.name}", f"{name.stem}.bak{name.suffix}")]
    for folder in [".", *{str(Path(name).parent) for name in files_of(checkpoint)}]:
        names += [f"{folder}/{name}" for name in (".DS_Store", "Thumbs.db", "notes.txt", "old.msgpack", "state2.pkl")]
    for name in names:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"of others")
    algo.restore_from_path(checkpoint)
    assert is_same(state_of(algo), saved)
    algo.train()
    as_of_an_earlier_version(shutil.copytree(checkpoint, checkpoint.with_name("earlier")))
    algo.restore_from_path(checkpoint.with_name("earlier"))
    assert is_same(state_of(algo), saved)
    algo.train()
    here = versions.versions_here()
    with monkeypatch.context() as later:  # Where a version is another one, what RLlib will read is read for its errors.
        later.setattr(versions, "versions_here", lambda: here | {"python": "9.9.9"})
        algo.restore_from_path(checkpoint)
    algo.train()
    connector = "env_runner/env_to_module_connector/AddStatesFromEpisodesToBatch/state.pkl"
    for name in (
        "algorithm_state.msgpack",
        "eval_env_runner/state.pkl",
        "learner_group/learner/state.msgpack",
        f"{Path(WEIGHTS).with_suffix('.msgpack')}",
        f"eval_{connector}",
    ):
        (checkpoint / name).parent.mkdir(exist_ok=True, parents=True)
        (checkpoint / name).write_bytes(b"of another save")
        with pytest.raises(ValueError, match=rf"is damaged: '{name}' is not of this save"):
            algo.restore_from_path(checkpoint)
        (checkpoint / name).unlink()


def test_every_file_that_rllib_opens_is_known(run: tuple[CalQL, Path, Any]) -> None:
    opened: set[str] = set()

    class Watched:
        """A file system that notes what is read."""

        def __getattr__(self, name: str) -> Any:
            return getattr(LocalFileSystem(), name)

        def open_input_stream(self, path: str) -> Any:
            opened.add(Path(path).relative_to(run[1]).as_posix())
            return LocalFileSystem().open_input_stream(path)

    Algorithm.restore_from_path(run[0], run[1], filesystem=Watched())
    MultiRLModule.from_checkpoint(run[1] / "learner_group" / "learner" / "rl_module", filesystem=Watched())
    run[0].train()
    assert {"algorithm_state.pkl", "env_runner/state.pkl", "learner_group/learner/state.pkl", WEIGHTS} <= opened
    assert [name for name in opened if not integrity.is_read_by_rllib(name)] == []


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"versions": ' + "[" * 100_000, "9" * 5000, "[]", "null", '{"versions": 3}', "NaN"]
)
def test_a_manifest_that_is_no_manifest_is_named(run: tuple[CalQL, Path, Any], checkpoint: Path, content: str) -> None:
    (checkpoint / "calql.json").write_text(content)
    for read in (run[0].restore_from_path, CalQL.from_checkpoint):
        with pytest.raises(ValueError, match=rf"checkpoint at '{checkpoint}' is damaged: 'calql.json' is "):
            read(checkpoint)
    outcome = CliRunner().invoke(main, ["evaluate", str(checkpoint)])
    assert outcome.exit_code == 1
    assert "'calql.json' is " in outcome.output


def test_on_a_file_system_without_renaming_damage_is_named_and_mixtures_are_refused(
    run: tuple[CalQL, Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algo = run[0]
    remote = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
    algo.save_to_path("saved", filesystem=remote)
    algo.restore_from_path("saved", filesystem=remote)
    flip(tmp_path / "saved" / WEIGHTS)
    with pytest.raises(ValueError, match=rf"checkpoint at 'saved' is damaged: '{WEIGHTS}' has other content"):
        algo.restore_from_path("saved", filesystem=remote)
    algo.save_to_path("saved", filesystem=remote)
    algo.restore_from_path("saved", filesystem=remote)
    real = integrity.shutil.copyfileobj

    def copy(source: Any, stream: Any, length: int) -> None:
        real(source, stream, length)
        if Path(source.name).name == "calql.json":  # The other one comes last.
            monkeypatch.setattr(integrity.shutil, "copyfileobj", real)
            algo.save_to_path("saved", filesystem=remote)

    monkeypatch.setattr(integrity.shutil, "copyfileobj", copy)
    with pytest.raises(RuntimeError, match="Another process has written a checkpoint to 'saved' at the same time"):
        algo.save_to_path("saved", filesystem=remote)
    algo.restore_from_path("saved", filesystem=remote)


def test_a_restore_during_saves_is_of_one_of_them(run: tuple[CalQL, Path, Any], tmp_path: Path) -> None:
    algo = run[0]
    path = Path(algo.save_to_path(tmp_path / "checkpoint"))
    counters = algo.lifetime.counters()
    later = tmp_path / "later"
    algo.train()
    algo.save_to_path(later)
    real, calls = CalQL.set_state, []

    def set_state(self: CalQL, state: dict[str, Any]) -> None:
        real(self, state)
        if not calls:  # Another process saves while this one restores.
            shutil.rmtree(path)
            shutil.copytree(later, path)
        calls.append(state["calql"]["num_online_env_steps_lifetime"])

    CalQL.set_state = set_state  # type: ignore[method-assign]
    try:
        algo.restore_from_path(path)
    finally:
        CalQL.set_state = real  # type: ignore[method-assign]
    assert len(calls) == 2
    assert calls[0] == counters["num_online_env_steps_lifetime"] < calls[1] == algo.num_online_env_steps


# --- Other versions ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_version_before_checksums_restores_and_its_damage_is_named_where_it_can_be_seen(
    run: tuple[CalQL, Path, Any], checkpoint: Path
) -> None:
    algo, _, saved = run
    as_of_an_earlier_version(checkpoint)
    algo.restore_from_path(checkpoint)
    assert is_same(state_of(algo), saved)
    algo.train()
    for name in files_of(checkpoint):
        content = (checkpoint / name).read_bytes()
        for damaged in (None, b"", content[: len(content) // 2]):
            if not name.endswith(".pkl") or (damaged is None and "class_and_ctor" in name and "/" in name):
                continue  # Not needed for a restore.
            if damaged is None and name.startswith(("env_runner", "learner_group/learner/rl_module/module_state")):
                continue  # Parts that not every checkpoint has.
            with content_replaced(checkpoint / name, damaged), pytest.raises(ValueError, match=f"'{name}'"):
                algo.restore_from_path(checkpoint)
    rng, errors = random.Random(0), []
    content = (checkpoint / "algorithm_state.pkl").read_bytes()
    for _ in range(20):  # Damage inside numbers stays unseen.
        with content_replaced(checkpoint / "algorithm_state.pkl", flipped(content, rng.randrange(8 * len(content)))):
            try:
                algo.restore_from_path(checkpoint)
            except ValueError as err:
                errors.append(str(err))
    assert len(errors) > 3
    assert all("'algorithm_state.pkl'" in error or "of a version without checksums" in error for error in errors)
    algo.restore_from_path(checkpoint)
    algo.train()


def test_a_run_from_before_observations_were_clipped_goes_on_without(tmp_path: Path) -> None:
    state = CalQLConfig().offline_data(normalize_observations=True, observation_clip=3.0).get_state()
    files = CheckpointFiles(LocalFileSystem(), str(tmp_path))
    for was, clip in (("later", 3.0), ("earlier", None)):
        if was == "earlier":
            del state["observation_clip"]
        content = {"class": CalQL, "ctor_args_and_kwargs": ((state,), {})}
        (tmp_path / "class_and_ctor_args.pkl").write_bytes(cloudpickle.dumps(content))
        assert files.config().observation_clip == clip
    module = make_learner(normalize_observations=True).module["default_policy"]
    settings = {name: value for name, value in module.model_config.items() if name != "observation_clip"}
    restored = type(module)(
        observation_space=module.observation_space, action_space=module.action_space, model_config=settings
    )
    assert float(restored._normalise(torch.full((1, 3), 1e3)).max()) == 1e3


@pytest.mark.parametrize(
    ("package", "was", "now", "message"),
    [
        ("numpy", "2.3.1", "1.26.4", r"it was made with NumPy 2.3.1, whose arrays NumPy 1.26.4 here cannot read; pip"),
        ("numpy", "1.26.4", "2.3.1", None),
        ("rllib-calql", "0.2.0", "0.1.9", r"with rllib-calql 0.2.0, which is newer than 0.1.9 here; pip install \"rll"),
        ("rllib-calql", "0.1.9", "0.1.0", None),
        ("rllib-calql", "0.1.0", "0.2.0", None),
        ("torch", "2.13.0", "2.6.0", None),
        ("python", "3.12.1", "3.11.9", None),
    ],
)
def test_versions_are_compared_where_they_matter(
    run: tuple[CalQL, Path, Any],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    was: str,
    now: str,
    message: str | None,
) -> None:
    here = versions.versions_here()
    for is_earlier in (False, True):
        edit_manifest(checkpoint, versions=here | {package: was})
        monkeypatch.setattr(versions, "versions_here", lambda: here | {package: now})
        if is_earlier:
            as_of_an_earlier_version(checkpoint)
        if message is None:
            run[0].restore_from_path(checkpoint)
        else:
            with pytest.raises(ValueError, match=message):
                run[0].restore_from_path(checkpoint)


def test_an_error_while_unpickling_names_the_file_and_the_versions_that_differ(
    run: tuple[CalQL, Path, Any], checkpoint: Path
) -> None:
    name = "learner_group/learner/state.pkl"
    (checkpoint / name).write_bytes(b"\x80\x04\x8c\x0emissing_module\x8c\x09Something\x93.")
    sums = json.loads((checkpoint / "calql.json").read_text())["files"]
    sums[name] = integrity._measured(checkpoint / name)
    edit_manifest(checkpoint, files=sums, versions=versions.versions_here() | {"python": "3.9.1"})
    message = rf"'{name}' in .* No module named 'missing_module'\. .*python 3\.9\.1 \(here"
    with pytest.raises(ImportError, match=message):
        run[0].restore_from_path(checkpoint)


def test_a_newer_format_is_refused(run: tuple[CalQL, Path, Any], checkpoint: Path) -> None:
    edit_manifest(checkpoint, format=integrity.FORMAT + 1)
    with pytest.raises(ValueError, match=r"is of a newer rllib-calql, [\d.]+; install that"):
        run[0].restore_from_path(checkpoint)


# --- Data that moved --------------------------------------------------------------------------------------------------


def test_data_that_were_moved_are_an_error_that_says_how_to_name_their_new_place(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=3, updates_per_iteration=3).build()
    algo.train()
    path = algo.save_to_path(tmp_path / "checkpoint")
    algo.stop()
    moved = (tmp_path / "line.parquet").rename(tmp_path / "moved.parquet")
    message = rf"line\.parquet'.*checkpoint at '{path}' names it.*`from_checkpoint\(path, config=\.\.\.\)`"
    with pytest.raises(FileNotFoundError, match=message):
        CalQL.from_checkpoint(path)
    write_line_data(tmp_path / "line.parquet")  # For `line_config` alone.
    config = line_config(tmp_path, offline_updates=3).offline_data(input_=str(moved))
    restored = CalQL.from_checkpoint(path, config=config)
    assert restored.num_offline_updates == 3
    restored.stop()
