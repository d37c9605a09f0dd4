"""`rllib fine-tune`, interrupted wherever it may be, and waiting for episodes; its rounds are in experiments/."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from logged_episodes import write_episode
from tiny import line_config

from rllib_calql import CalQL, load_policy
from rllib_calql.commands.fine_tune import _Rounds
from rllib_calql.commands.main import main
from rllib_calql.experiments import fine_tuning
from rllib_calql.system.stop_signals import StopSignals


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


def test_a_folder_that_never_rests_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rllib_calql.commands.fine_tune._POLL_S", 0.001)
    monkeypatch.setattr("rllib_calql.commands.fine_tune._RESTLESS_S", 0.05)
    num_looks = itertools.count()
    monkeypatch.setattr("rllib_calql.commands.fine_tune._listing", lambda episodes: [next(num_looks)])
    taken: list[Any] = []
    monkeypatch.setattr(_Rounds, "_round", lambda self, new, num_known: taken.append((new, num_known)))
    tuning: Any = SimpleNamespace(read=lambda episodes: (["an episode"], 2))
    silent: Any = SimpleNamespace(stage=lambda text: None)
    with ExitStack() as stack:
        loop = _Rounds(tuning, str(tmp_path), None, StopSignals(), silent, stack, verbose=False)
        loop.wait()
    assert taken == [(["an episode"], 2)]


@pytest.mark.parametrize("is_there", [False, True])
def test_watching_begins_where_nothing_can_be_read_yet(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(episodes: str) -> Any:
        raise ValueError("a file is torn")

    logs = tmp_path / "logs"
    if is_there:
        logs.mkdir()
        (logs / "torn.npz").write_bytes(b"PK")
    taken, told = [], []
    monkeypatch.setattr("rllib_calql.commands.fine_tune._POLL_S", 0.001)
    monkeypatch.setattr(_Rounds, "_round", lambda self, new, num_known: taken.append((new, num_known)))
    tuning: Any = SimpleNamespace(read=read)
    silent: Any = SimpleNamespace(stage=lambda text: None, print=lambda text, timed: told.append(text))
    with ExitStack() as stack:
        loop = _Rounds(tuning, str(logs), None, StopSignals(), silent, stack, verbose=False)
        loop.first(is_watching=True)
        assert (taken, told) == ([([], 0)], ["Not added: a file is torn"] * is_there)
        tuning.read = lambda episodes: (["an episode"], 0)
        logs.mkdir(exist_ok=True)
        (logs / "whole.npz").write_bytes(b"PK")
        loop.wait()
    assert taken[1:] == [(["an episode"], 0)]


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


def test_an_empty_folder_changes_nothing(pre: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = done(pre, "--episodes", tmp_path / "empty")
    assert "There is no new episode" in result.output
    assert not (tmp_path / "pre-fine-tuned").exists()
