"""`rllib fine-tune`: what is new is taken once, whatever interrupts it, and Python does the same to the bit."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from click.testing import CliRunner, Result
from logged_episodes import write_episode
from tiny import LineEnv, assert_identical, line_config

from rllib_calql import CalQL, load_policy
from rllib_calql.checkpoints.reading import CheckpointFiles
from rllib_calql.commands.main import main
from rllib_calql.common.encoding import flat_size
from rllib_calql.experiments import fine_tuning
from rllib_calql.policy.spaces import described_space


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint at the switch, of a run with an environment."""
    folder = tmp_path_factory.mktemp("pretrained")
    algo = line_config(folder, offline_updates=5, updates_per_iteration=5).build()
    algo.train()
    path = Path(algo.save_to_path(folder / "pre"))
    algo.stop()
    return path


@pytest.fixture
def pre(pretrained: Path, tmp_path: Path) -> Path:
    """A name of its own for it, so that every test has an output of its own."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "pre").symlink_to(pretrained)
    return tmp_path / "runs" / "pre"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["fine-tune", *map(str, arguments)])


def content(folder: Path) -> dict[str, str]:
    """Digest of every file in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What learning goes on from."""
    files = CheckpointFiles.find(checkpoint)
    own = files.read("algorithm_state.pkl")["calql"]
    del own["manifest"]
    learner = files.learner_state()
    return {"own": own, "networks": learner["rl_module"], "optimisers": learner["optimizer"]}


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((checkpoint / "calql.json").read_text())
    return loaded


# --- Rounds -----------------------------------------------------------------------------------------------------------


def test_rounds_take_what_is_new_and_make_what_it_owes(
    pre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[CalQL] = []
    setup = CalQL.setup
    monkeypatch.setattr(CalQL, "setup", lambda self, config: (built.append(self), setup(self, config))[1])
    logs, policy, output = tmp_path / "logs", tmp_path / "policy.npz", pre.with_name("pre-fine-tuned")
    before = content(pre.resolve())
    arguments = (pre, "--episodes", logs, "--export", policy)
    for number in (1, 2):
        write_episode(logs, start=number, length=60)
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        assert not Path(built[-1].logdir).exists()
        assert "added             1 episode, 60 env steps, return 1830, 2% interventions" in done.output
        manifest = manifest_of(output)
        assert manifest["num_online_episodes_lifetime"] == number
        assert manifest["num_online_env_steps_lifetime"] == manifest["num_online_updates_lifetime"] == 60 * number
        about = load_policy(policy).metadata["checkpoint"]
        assert about["fingerprint"] == f"sha256:{hashlib.sha256((output / 'calql.json').read_bytes()).hexdigest()}"
    written = content(output)
    policy.unlink()
    again = run(output, *arguments[1:])  # The output itself is gone on with as well.
    assert again.exit_code == 0
    assert "There is no new episode" in again.output
    assert "2 were added before" in again.output
    assert load_policy(policy)([0.5]).shape == (1,)
    assert content(output) == written
    assert content(pre.resolve()) == before
    # The same in Python, in an algorithm with its environment.
    algo = CalQL.from_checkpoint(pre)
    for length in (1, 2):
        algo.add_episodes(sorted(map(str, logs.iterdir()))[length - 1])
        algo.make_owed_updates()
    python = algo.save_to_path(tmp_path / "python")
    algo.stop()
    assert_identical(state_of(output), state_of(Path(python)))
    config = CheckpointFiles.find(output).config()
    assert (config.env, config.observation_space, config.updates_per_env_step) == (LineEnv, None, 1)


def test_a_checkpoint_in_the_midst_of_the_offline_phase_goes_online_there(tmp_path: Path) -> None:
    algo = line_config(tmp_path, offline_updates=10, updates_per_iteration=5).build()
    algo.train()
    algo.save_to_path(tmp_path / "early")
    algo.stop()
    write_episode(tmp_path / "logs")
    arguments = ("--episodes", tmp_path / "logs", "--output", tmp_path / "out", "--updates-per-env-step", 0.5)
    done = run(tmp_path / "early", *arguments)
    assert done.exit_code == 0, done.output
    assert "Warning: its offline phase lacks 5 updates" in done.output
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["phase"], manifest["num_online_updates_lifetime"]) == ("online", 1)  # Of 1.5 owed.
    write_episode(tmp_path / "logs", start=3)
    assert run(tmp_path / "early", *arguments).exit_code == 0
    assert manifest_of(tmp_path / "out")["num_online_updates_lifetime"] == 3


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_end_with_2_and_leave_nothing(pre: Path, tmp_path: Path) -> None:
    logs, other = tmp_path / "logs", tmp_path / "other.npz"
    write_episode(logs)
    np.savez(other, a=np.zeros(1))
    (file,) = logs.iterdir()
    bad = {name: tmp_path / name for name in ("torn", "units", "columns")}
    for folder in bad.values():
        folder.mkdir()
    (bad["torn"] / "a.npz").write_bytes(file.read_bytes()[:-50])
    columns = dict(np.load(file))
    np.savez(bad["units"] / "a.npz", **(columns | {"executed_actions": 100.0 * columns["executed_actions"]}))
    np.savez(bad["columns"] / "a.npz", observations=columns["observations"])
    for arguments, message in (
        ((tmp_path / "none", "--episodes", logs), "none' does not exist"),
        ((logs, "--episodes", logs), "is not a checkpoint of an algorithm"),
        ((pre, "--episodes", tmp_path / "none"), "`--episodes` '.*none' does not exist"),
        ((pre, "--episodes", logs, "--export", other), "`--export` replaces policy files only"),
        ((pre, "--episodes", logs, "--export", "policy.txt"), "`--export`: The file must end in .npz"),
        ((pre, "--episodes", logs, "--output", logs), "`--output` '.*logs' is there already, and cannot be gone on"),
        ((pre, "--episodes", logs, "--output", pre), "is the checkpoint itself, which stays as it is"),
        ((pre, "--episodes", bad["torn"]), "a.npz' is not a readable NumPy"),
        ((pre, "--episodes", bad["units"]), r"action \[50.0\] is outside the bounds"),
        ((pre, "--episodes", bad["columns"]), "has no column `actions`"),
        (("", "--episodes", logs), "The name of the run or checkpoint is empty"),
        ((pre, "--episodes", ""), "`--episodes` is empty; name the folder"),
        ((f"file://{pre}", "--episodes", logs), "`--output` must name a folder"),
        ((pre, "--episodes", logs, "--updates-per-env-step", "nan"), "nan is not a finite number"),
        ((pre, "--episodes", logs, "--updates-per-env-step", "inf"), "inf is not a finite number"),
        ((pre, "--episodes", f"file://{logs}", "--watch"), "`--watch` looks at a folder of this machine"),
        (
            (pre, "--episodes", logs, "--output", other / "out"),
            r"Nothing can be written beside '.*out': .*; choose ano",
        ),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert re.search(message, done.output), done.output
        assert "Traceback" not in done.output
    assert [path.name for path in pre.parent.iterdir()] == ["pre"]


def test_a_full_disk_is_told_with_what_is_left_and_the_remedy(
    pre: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_episode(tmp_path / "logs")

    def full(algorithm: CalQL, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CalQL, "save_to_path", full)
        done = run(pre, "--episodes", tmp_path / "logs")
    assert done.exit_code == 1
    message = r"cannot be written to '.*pre-fine-tuned': No space left on device; the one before is as it was; give"
    assert re.search(message, done.output), done.output
    assert "Traceback" not in done.output
    assert [path.name for path in pre.parent.iterdir()] == ["pre"]


def test_an_output_of_another_checkpoint_is_not_gone_on_with(pre: Path, tmp_path: Path) -> None:
    tuning = fine_tuning.FineTuning(CheckpointFiles.find(pre), tmp_path / "out")
    tuning.round([], say=lambda text: None, on_progress=lambda done, total: None, is_stopped=lambda: False)
    tuning.close()
    other = tmp_path / "other"
    algo = CalQL.from_checkpoint(pre)
    algo.save_to_path(other)
    algo.stop()
    (other / "calql.json").write_text((other / "calql.json").read_text() + "\n")
    with pytest.raises(
        ValueError, match=r"was fine-tuned from '.*pre.*' as it was then, not of '.*other' as it is now"
    ):
        fine_tuning.FineTuning(CheckpointFiles.find(other), tmp_path / "out")
    with (
        fine_tuning.only_one(tmp_path / "out"),
        pytest.raises(ValueError, match="out' is being fine-tuned: Process"),
        fine_tuning.only_one(tmp_path / "out"),
    ):
        pass


# --- Spaces without an environment ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Dict(
            {
                "b": gym.spaces.Box(-1.0, 1.0, (2,), np.float64),
                "a": gym.spaces.Tuple([gym.spaces.Discrete(3, start=1), gym.spaces.Box(0, 9, (2,), np.uint8)]),
            }
        ),
        gym.spaces.Tuple([gym.spaces.MultiDiscrete([2, 3]), gym.spaces.MultiBinary(2)]),
        gym.spaces.Discrete(4),
        gym.spaces.Box(-5, 5, (2, 2), np.int32),
        gym.spaces.Box(0, 1, (2,), np.bool_),
    ],
)
def test_a_space_is_made_of_what_a_checkpoint_says(space: gym.Space[Any]) -> None:
    made = fine_tuning._space_of(described_space(space))
    assert described_space(made) == described_space(space)
    assert flat_size(made) == flat_size(space)
    assert made.contains(space.sample())
