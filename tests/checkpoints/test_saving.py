"""`Saving` and `Pretrained` without an algorithm: what is written, what is checked, who gets what back."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rllib_calql.checkpoints.manifest import hold_out_of, remark_on_hold_out
from rllib_calql.checkpoints.pretrained import Pretrained, restoring
from rllib_calql.checkpoints.saving import Saving
from rllib_calql.checkpoints.versions import versions_here
from rllib_calql.common.lifetime import Lifetime
from rllib_calql.store.split import Split, split_episodes

MODULE = "learner_group/learner/rl_module/default_policy"


class Part:
    """A part with a state."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def get_state(self) -> dict[str, Any]:
        """It."""
        return dict(self.state)

    def set_state(self, state: Any) -> None:
        """What of it concerns this part."""
        self.state = {name: state.get(name) for name in self.state}


class Store(Part):
    """A store whose online rows may be left out."""

    def get_state(self, *, with_online: bool = True) -> dict[str, Any]:
        """Rows."""
        return {"rows": 7 if with_online else 0}

    def set_state(self, state: Any) -> int:  # type: ignore[override]
        """The number of missing rows."""
        self.state = dict(state)
        return 7 - int(state["rows"])


class Learners:
    """Stands for the updater: one local learner."""

    has_remote_learners = False

    def __init__(self) -> None:
        self.got: dict[str, Any] = {}

    def set_learner_state(self, func: Callable[[Any, dict[str, Any]], None], state: dict[str, Any]) -> None:
        """Calls it with a learner that keeps what it is given."""
        learner = SimpleNamespace(
            get_state=lambda components: {"calql": {"seed": "own"}},
            set_state=self.got.update,
            _named_optimizers=["actor"],
        )
        func(learner, state)


class Run:
    """All that is saved of a run, and what happened to it."""

    def __init__(
        self,
        *,
        keeps_online_data: bool = True,
        gamma: float = 0.9,
        pretrained: Any = None,
        split: Split | None = None,
        data: str = "a",
    ) -> None:
        self.split, self.data = split, data
        self.lifetime = Lifetime(offline_updates=5, updates_per_env_step=1.0, warmup_env_steps=0)
        self.store, self.history, self.keeper = Store(), Part(at_switch=1.5), Part(num_discarded=2)
        self.learners, self.gamma, self.aligned = Learners(), gamma, 0
        self.pretrained = Pretrained(
            pretrained, learners=self.learners, lifetime=self.lifetime, manifest=self.manifest, on_loaded=self.align
        )
        self.saving = Saving(
            lifetime=self.lifetime,
            store=self.store,  # type: ignore[arg-type]
            keeps_online_data=keeps_online_data,
            history=self.history,
            collection=[self.keeper],
            learners=self.learners,
            pretrained=self.pretrained,
            manifest=self.manifest,
            on_restored=self.align,
        )

    def align(self) -> None:
        """Counts."""
        self.aligned += 1

    def manifest(self) -> dict[str, Any]:
        """The least that is compared."""
        return {
            "phase": "offline",
            **self.lifetime.counters(),
            "networks": {},
            "spaces": {},
            "lagrangian": False,
            "rewards": {"gamma": self.gamma},
            "offline_data": {"transitions": 3, "fingerprint": self.data},
            **({} if self.split is None else {"hold_out": hold_out_of(self.split)}),
            "online_data": {"transitions": 7, "mebibytes": 0.0, "in_checkpoint": True},
            "versions": versions_here(),
        }

    def save(self, path: Path) -> str:
        """By the files that RLlib writes."""

        def write(folder: str, *, state: Any, filesystem: Any) -> None:
            content = {
                "class_and_ctor_args.pkl": {},
                "rllib_checkpoint.json": {},
                "learner_group/state.pkl": {},
                "learner_group/learner/state.pkl": {"optimizer": {"actor": 1, "other": 2}, "calql": {"seed": "stored"}},
                f"{MODULE}/module_state.pkl": {"weight": 3},
                f"{MODULE}/class_and_ctor_args.pkl": {},
                "algorithm_state.pkl": {"calql": self.saving.get_state()},
            }
            for name, value in content.items():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / name).write_bytes(pickle.dumps(value))

        return self.saving.save(path, state=None, filesystem=None, write=write, components=lambda: [])

    def restore(self, path: str) -> None:
        """By what RLlib would read."""

        def by_rllib(folder: str, *, filesystem: Any) -> None:
            state = pickle.loads((Path(folder) / "algorithm_state.pkl").read_bytes())
            self.saving.set_state(state["calql"])

        self.saving.restore(path, component=None, filesystem=None, by_rllib=by_rllib)


def test_every_part_gets_its_state_back_and_runners_are_told(tmp_path: Path) -> None:
    run, restored = Run(), Run()
    run.lifetime.count_updates(5, online=False)
    run.lifetime.count_episode(4)
    restored.history.state, restored.keeper.state = {"at_switch": None}, {"num_discarded": 0}
    restored.restore(run.save(tmp_path / "checkpoint"))
    assert restored.lifetime.get_state() == run.lifetime.get_state()
    assert (restored.store.state, restored.history.state) == ({"rows": 7}, {"at_switch": 1.5})
    assert restored.keeper.state == {"num_discarded": 2}
    assert restored.aligned > 0


def test_online_data_that_are_left_out_are_missed_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Run(keeps_online_data=False).save(tmp_path / "checkpoint")
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        Run().restore(path)
    assert "the 7 online transitions that the run had are missing" in caplog.text


def test_a_checkpoint_in_other_units_changes_nothing(tmp_path: Path) -> None:
    run, other = Run(), Run(gamma=0.8)
    run.lifetime.count_updates(5, online=False)
    path = run.save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"made with `gamma` 0\.9, this run has 0\.8"):
        other.restore(path)
    assert (other.lifetime.num_offline_updates, other.store.state, other.aligned) == (0, {}, 0)


def test_another_runs_networks_are_taken_over_once_with_the_own_seed(tmp_path: Path) -> None:
    source = Run()
    source.lifetime.count_updates(5, online=False)
    run = Run(pretrained=source.save(tmp_path / "checkpoint"), gamma=0.8)
    assert run.pretrained.load_if_due()
    assert not run.pretrained.load_if_due()
    assert run.learners.got["optimizer"] == {"actor": 1}
    assert run.learners.got["calql"] == {"seed": "own"}
    assert (run.lifetime.phase, run.store.state, run.aligned) == ("online", {}, 1)


def test_a_run_that_is_restored_does_not_read_its_pretrained_networks(tmp_path: Path) -> None:
    with restoring():
        run = Run(pretrained=tmp_path / "gone")
    assert not run.pretrained.load_if_due()
    due = Run(pretrained=tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="`pretrained`: There is no checkpoint at"):
        due.pretrained.load_if_due()
    due.pretrained.forget()
    assert not due.pretrained.load_if_due()


def split_of(fraction: float, seed: int = 0) -> Split:
    split = split_episodes(np.full(20, 3), fraction=fraction, seed=seed)
    assert split is not None
    return split


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            (0.1, 0),
            (0.2, 0),
            r"made with `validation_fraction=0\.1` and `validation_seed=0`, this run has `.*=0\.2` and",
        ),
        ((0.1, 0), (0.1, 4), "this run has `validation_fraction=0.1` and `validation_seed=4`"),
        ((0.1, 3), None, "this run has `validation_fraction=0.0`, so .*restore with `.*=0.1` and `validation_seed=3`"),
        (None, (0.1, 3), "made with `validation_fraction=0.0`, this run has `.*=0.1` and `.*=3`, so .*restore with `v"),
    ],
)
def test_a_checkpoint_with_other_held_out_episodes_changes_nothing(
    tmp_path: Path, before: tuple[float, int] | None, now: tuple[float, int] | None, message: str
) -> None:
    run = Run(split=None if before is None else split_of(*before))
    other = Run(split=None if now is None else split_of(*now))
    path = run.save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message):
        other.restore(path)
    assert (other.store.state, other.aligned) == ({}, 0)


def test_a_checkpoint_with_the_same_held_out_episodes_is_restored(tmp_path: Path) -> None:
    run = Run(split=split_of(0.1, 3))
    path = run.save(tmp_path / "checkpoint")
    restored = Run(split=split_of(0.11, 3))  # Both are 2 of 20.
    restored.restore(path)
    assert restored.store.state == {"rows": 7}


@pytest.mark.parametrize(
    ("before", "now", "data", "remark"),
    [
        (
            (0.1, 0),
            (0.2, 0),
            "a",
            "It was trained on the same data with `validation_fraction=0.1` and .*, so it has seen",
        ),
        (None, (0.2, 0), "a", "It was trained on the same data without a hold-out, so it has seen"),
        (
            (0.2, 0),
            (0.2, 1),
            "a",
            "It was trained on the same data with `validation_fraction=0.2` and .*, so it has seen",
        ),
        ((0.1, 0), (0.1, 0), "a", None),
        ((0.2, 0), (0.1, 0), "a", None),  # These are some of those.
        ((0.1, 0), None, "a", None),
        (None, (0.2, 0), "b", None),
    ],
)
def test_networks_that_saw_what_is_held_out_are_said_to(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    before: tuple[float, int] | None,
    now: tuple[float, int] | None,
    data: str,
    remark: str | None,
) -> None:
    source = Run(split=None if before is None else split_of(*before))
    split = None if now is None else split_of(*now)
    run = Run(pretrained=source.save(tmp_path / "checkpoint"), split=split, data=data)
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        assert run.pretrained.load_if_due()
    if remark is None:
        assert run.pretrained.remark is None
    else:
        assert re.match(remark, run.pretrained.remark or "")
        assert (run.pretrained.remark or "") in caplog.text


def test_networks_of_the_same_episodes_with_other_rewards_are_said_to_have_seen_them() -> None:
    held_out = {"validation_fraction": 0.1, "validation_seed": 0, "episodes": 2, "fingerprint": "two"}
    own = {"offline_data": {"fingerprint": "scaled"}, "behaviour": "same", "hold_out": held_out}
    seen = {"offline_data": {"fingerprint": "raw"}, "behaviour": "same", "hold_out": None}
    assert "so it has seen the episodes that are held out here" in str(remark_on_hold_out(seen, own))
    assert remark_on_hold_out({**seen, "behaviour": "other"}, own) is None
    # Manifests of earlier versions know no more than all transitions together.
    earlier = {name: value for name, value in seen.items() if name != "behaviour"}
    assert remark_on_hold_out(earlier, own) is None
    assert remark_on_hold_out({**earlier, "offline_data": {"fingerprint": "scaled"}}, own) is not None
