"""`rllib fine-tune`: what is new is taken, once, into a checkpoint that takes the place of the one before it, whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from logged_episodes import write_episode
from tiny import LineEnv, assert_identical, line_config, run_state

from rllib_calql import CalQL, EpisodeLog, load_policy
from rllib_calql.commands.main import main
from rllib_calql.experiments import fine_tuning


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """At the switch, of a config that makes two updates for each env step."""
    folder = tmp_path_factory.mktemp("fine_tune")
    config = line_config(folder, offline_updates=2, updates_per_iteration=2, updates_per_env_step=2)
    algo = config.build()
    algo.train()
    algo.save_to_path(folder / "pre")
    algo.stop()
    return folder / "pre"


@pytest.fixture
def pre(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy, since new checkpoints go beside it."""
    return Path(shutil.copytree(checkpoint, tmp_path / "pre"))


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    write_episode(folder)
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["fine-tune", *(str(argument) for argument in arguments)], catch_exceptions=False)


def done(*arguments: Any) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def counted(folder: Path) -> dict[str, Any]:
    """Counters of a checkpoint, and the online rows in it."""
    algo = CalQL.from_checkpoint(folder)
    counters = {name: value for name, value in algo.lifetime.counters().items() if "online" in name}
    rewards = algo.store.online_column("rewards").tolist()
    owed = algo.lifetime.updates_owed
    algo.stop()
    return {**counters, "rewards": rewards, "owed": owed}


def content_of(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_round_does_what_python_does_and_leaves_the_first_checkpoint_as_it_is(
    pre: Path, logs: Path, tmp_path: Path
) -> None:
    before = content_of(pre)
    result = done(pre, "--episodes", logs, "--export", tmp_path / "policy.npz")
    assert "added             1 episodes, 3 env steps, return 6, 33% interventions" in result.stdout
    assert "updates           6" in result.stdout
    assert f"checkpoint        {tmp_path / 'pre-fine-tuned'}" in result.stdout
    assert content_of(pre) == before
    tuned, by_hand = CalQL.from_checkpoint(tmp_path / "pre-fine-tuned"), CalQL.from_checkpoint(pre)
    by_hand.add_episodes(logs)
    assert by_hand.make_owed_updates() == 6
    assert tuned.config.env is LineEnv  # It can go on in its environment.
    ours, theirs = run_state(tuned), run_state(by_hand)
    for part in ("store", "lifetime"):
        if part in ours:
            assert_identical(ours[part], theirs[part])
    assert tuned.lifetime.counters() == by_hand.lifetime.counters()
    assert_identical(tuned.get_module().get_state(), by_hand.get_module().get_state())
    policy = load_policy(tmp_path / "policy.npz")
    assert policy.metadata["checkpoint"]["num_online_updates_lifetime"] == 6
    tuned.stop()
    by_hand.stop()


def test_given_again_it_takes_only_what_is_new(pre: Path, logs: Path, tmp_path: Path) -> None:
    policy, tuned = tmp_path / "policy.npz", tmp_path / "pre-fine-tuned"
    done(pre, "--episodes", logs, "--export", policy)
    first = policy.read_bytes(), content_of(tuned)
    policy.unlink()
    result = done(pre, "--episodes", logs, "--export", policy)
    assert "There is no new episode" in result.output
    assert "1 were added before" in result.output
    assert (policy.read_bytes(), content_of(tuned)) == first
    write_episode(logs, length=2, start=5.0)
    result = done(tuned, "--episodes", logs, "--updates-per-env-step", 3)  # The output itself goes on, as well.
    assert "added             1 episodes, 2 env steps" in result.stdout
    assert "updates           6" in result.stdout
    found = counted(tuned)
    assert found["rewards"] == [1, 2, 3, 1, 2]
    assert found["num_online_env_steps_lifetime"] == 5
    assert found["num_online_updates_lifetime"] == 12
    assert found["owed"] == 0
    assert not (tmp_path / "pre-fine-tuned-fine-tuned").exists()


class Killed(BaseException):
    """What ends a process, as far as one process can show it; `tests/benchmarks/fine_tune_kills.py` sends SIGKILL."""


@pytest.mark.parametrize("moment", ["adding", "third update", "saving", "saved", "exporting"])
def test_whatever_interrupts_it_nothing_is_counted_twice_or_lost(
    moment: str, pre: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, tuned = tmp_path / "policy.npz", tmp_path / "pre-fine-tuned"
    done(pre, "--episodes", logs, "--export", policy)
    write_episode(logs, length=2, start=5.0)

    def killed(*arguments: Any, **keywords: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "adding":
            patch.setattr(CalQL, "add_episodes", killed)
        elif moment == "third update":
            patch.setattr(fine_tuning, "_UPDATES_AT_ONCE", 2)
            patch.setattr(fine_tuning, "_SAVE_EVERY_S", 0.0)  # So a part of the round is in a checkpoint.
            made = CalQL.make_owed_updates
            calls = iter([made, killed])
            patch.setattr(CalQL, "make_owed_updates", lambda *args, **kwargs: next(calls)(*args, **kwargs))
        elif moment == "saving":
            patch.setattr(os, "rename", killed)
            patch.setattr(os, "replace", killed)
        elif moment == "saved":
            save = fine_tuning.FineTuning.save
            patch.setattr(fine_tuning.FineTuning, "save", lambda self: (save(self), killed()))
        else:
            patch.setattr("rllib_calql.export.writing.export_policy", killed)
        with pytest.raises(Killed):
            run(pre, "--episodes", logs, "--export", policy)
    done(pre, "--episodes", logs, "--export", policy)
    found = counted(tuned)
    assert found["rewards"] == [1, 2, 3, 1, 2]
    assert found["num_online_env_steps_lifetime"] == 5
    assert found["num_online_updates_lifetime"] == 10
    assert found["owed"] == 0
    assert load_policy(policy).metadata["checkpoint"]["num_online_updates_lifetime"] == 10


def test_watching_takes_episodes_as_they_come_and_ends_with_ctrl_c(
    pre: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rllib_calql.commands.fine_tune._POLL_S", 0.05)
    read, save = fine_tuning.FineTuning.read, fine_tuning.FineTuning.save
    is_saved, is_refused = threading.Event(), threading.Event()
    (whole,) = logs.iterdir()

    def watched_read(tuning: fine_tuning.FineTuning, episodes: Any) -> Any:
        try:
            return read(tuning, episodes)
        except ValueError:
            is_refused.set()
            raise

    def watched_save(tuning: fine_tuning.FineTuning) -> None:
        save(tuning)
        is_saved.set()

    monkeypatch.setattr(fine_tuning.FineTuning, "read", watched_read)
    monkeypatch.setattr(fine_tuning.FineTuning, "save", watched_save)

    def person() -> None:
        is_saved.wait(60.0)
        is_saved.clear()
        torn = logs / f"torn{whole.suffix}"
        torn.write_bytes(whole.read_bytes()[:-40])
        is_refused.wait(60.0)
        torn.unlink()
        write_episode(logs, length=2, start=5.0)
        is_saved.wait(60.0)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=person)
    thread.start()
    result = run(pre, "--episodes", logs, "--watch")
    thread.join(timeout=10.0)
    assert result.exit_code == 0, result.output
    assert result.output.count("Not added: ") == 1
    assert counted(tmp_path / "pre-fine-tuned")["rewards"] == [1, 2, 3, 1, 2]


def test_ctrl_c_saves_what_was_made_and_the_same_command_makes_the_rest(
    pre: Path, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "_UPDATES_AT_ONCE", 1)
        made = CalQL.make_owed_updates

        def interrupting(self: CalQL, **keywords: Any) -> int:
            os.kill(os.getpid(), signal.SIGINT)
            return made(self, **keywords)

        patch.setattr(CalQL, "make_owed_updates", interrupting)
        result = run(pre, "--episodes", logs)
    assert result.exit_code == 130
    assert "Interrupted. 5 updates are left; the same command makes them." in result.output
    result = done(pre, "--episodes", logs)
    assert "updates           5" in result.stdout
    assert counted(tmp_path / "pre-fine-tuned")["num_online_updates_lifetime"] == 6


def test_wrong_input_is_refused_and_nothing_is_written(pre: Path, logs: Path, tmp_path: Path) -> None:
    def refused(*arguments: Any) -> str:
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        assert not (tmp_path / "pre-fine-tuned").exists()
        return " ".join(result.output.split())

    assert "'nowhere' does not exist; name the folder that `EpisodeLog` writes to" in refused(
        pre, "--episodes", "nowhere"
    )
    assert "does not exist; give the folder of a run" in refused(tmp_path / "none", "--episodes", logs)
    assert "`--export`: The file must end in .npz, .onnx or .pt" in refused(
        pre, "--episodes", logs, "--export", tmp_path / "policy.pkl"
    )
    (tmp_path / "notes.npz").write_text("mine")
    assert "`--export` replaces policy files only" in refused(
        pre, "--episodes", logs, "--export", tmp_path / "notes.npz"
    )
    assert "is the checkpoint itself, which stays as it is" in refused(pre, "--episodes", logs, "--output", pre)
    assert "0.0 is not in the range x>0" in refused(pre, "--episodes", logs, "--updates-per-env-step", 0)
    other = tmp_path / "other"
    write_episode(other)
    (episode,) = other.iterdir()
    episode.write_bytes(episode.read_bytes()[:-40])
    assert episode.name in refused(pre, "--episodes", other)
    wide = tmp_path / "wide"
    with EpisodeLog(wide) as log:
        log.reset(np.zeros(2, np.float32))
        log.step(np.zeros(1, np.float32), 1.0, True, False, np.zeros(2, np.float32))
    assert "observations have 2 numbers, the environment's have 1" in refused(pre, "--episodes", wide)


def test_an_output_of_another_checkpoint_is_not_gone_on_with(pre: Path, logs: Path, tmp_path: Path) -> None:
    done(pre, "--episodes", logs)
    other = shutil.copytree(tmp_path / "pre-fine-tuned", tmp_path / "other")
    result = run(other, "--episodes", logs, "--output", tmp_path / "pre-fine-tuned")
    assert result.exit_code == 2
    assert "choose another `--output`" in " ".join(result.output.split())


def test_an_empty_folder_and_a_checkpoint_in_the_midst_of_its_offline_phase(
    checkpoint: Path, logs: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    algo = line_config(checkpoint.parent, offline_updates=4, updates_per_iteration=2).build()
    algo.train()
    algo.save_to_path(tmp_path / "early")
    algo.stop()
    result = done(tmp_path / "early", "--episodes", empty)
    assert "There is no new episode" in result.output
    assert not (tmp_path / "early-fine-tuned").exists()
    result = done(tmp_path / "early", "--episodes", logs)
    assert "Warning: its offline phase lacks 2 updates, which are not made" in result.output
    assert counted(tmp_path / "early-fine-tuned")["num_online_updates_lifetime"] == 3
