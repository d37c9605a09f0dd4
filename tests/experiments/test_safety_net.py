"""Checkpoints that nobody asked for: when they are written, which stay, and which is the best."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
from ray import tune
from ray.train._internal.session import _TrainingResult
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial
from ray.tune.result import SHOULD_CHECKPOINT

from rllib_calql.experiments import run_state
from rllib_calql.experiments.best_checkpoint import BEST_FILE, BestMetric, read_best
from rllib_calql.experiments.experiment import read_experiments
from rllib_calql.experiments.reading.errors import ExperimentError
from rllib_calql.experiments.run_checkpoints import choose_checkpoint, drop_results_made_again, tell_where_it_goes_on
from rllib_calql.experiments.safety_net import SafetyNet, SafetyNetCallback
from rllib_calql.experiments.tune_callbacks import KeepLogs

LOCAL = pyarrow.fs.LocalFileSystem()


def make_trial(storage: Path, name: str = "trial", **config: Any) -> Trial:
    trial = Trial("CalQL", config=config, stub=True, storage=StorageContext(str(storage), "run"))
    trial.storage.trial_dir_name = name
    Path(trial.storage.trial_fs_path).mkdir(parents=True, exist_ok=True)
    return trial


def evaluated(episode_return: float, success_rate: float | None = None) -> dict[str, Any]:
    runners = {"episode_return_mean": episode_return}
    return {"evaluation": {"env_runners": runners | ({} if success_rate is None else {"success_rate": success_rate})}}


class Training:
    """What Tune does with a trial and the callback, by a clock that the test sets."""

    def __init__(self, trial: Trial, net: SafetyNet, **more: Any) -> None:
        self.trial, self.now, self.said, self.iteration = trial, 0.0, [], 0  # type: ignore[var-annotated]
        self.trials = [trial]
        self.callback = SafetyNetCallback(net, announce=self.said.append, clock=lambda: self.now, **more)
        self.callback.on_trial_start(0, [trial], trial)

    def iterate(self, seconds: float, *, save_s: float = 0.0, is_asked_for: bool = False, **result: Any) -> bool:
        """One iteration, and the checkpoint after it if one is due. Returns whether there was one."""
        self.now += seconds
        self.iteration += 1
        made = {"training_iteration": self.iteration, "timestamp": int(self.now)} | result
        self.callback.on_trial_result(0, [self.trial], self.trial, made)
        self.trial.run_metadata.last_result = made
        if not (is_due := bool(made.get(SHOULD_CHECKPOINT))) and not is_asked_for:
            return False
        self.now += save_s
        self.save(made)
        return is_due

    def save(self, result: dict[str, Any]) -> None:
        """As `TuneController._process_trial_save`."""
        number = self.trial.storage.current_checkpoint_index + 1
        path = Path(self.trial.storage.trial_fs_path, f"checkpoint_{number:06d}")
        path.mkdir()
        (path / "class_and_ctor_args.pkl").write_bytes(b"weights")
        run_state.mark_whole(LOCAL, str(path), result)
        checkpoint = tune.Checkpoint(str(path), LOCAL)
        self.callback.on_checkpoint(0, [self.trial], self.trial, checkpoint=checkpoint)
        self.trial.run_metadata.checkpoint_manager.register_checkpoint(_TrainingResult(checkpoint, result))
        self.trial.storage.current_checkpoint_index = number
        self.callback.on_trial_save(0, self.trials, self.trial)


def kept(trial: Trial) -> list[int]:
    return [number for number, _ in run_state.numbered_checkpoints(LOCAL, str(trial.storage.trial_fs_path))]


# --- When -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iteration_s", "save_s"), [(1.0, 0.5), (7.0, 3.0), (95.0, 20.0), (250.0, 10.0)])
def test_a_kill_at_any_moment_costs_at_most_ten_minutes_of_training(
    tmp_path: Path, iteration_s: float, save_s: float
) -> None:
    training = Training(make_trial(tmp_path), SafetyNet())
    saved, costs = 0.0, []
    while training.now < 4_000:
        end = training.now + iteration_s
        if training.iterate(iteration_s, save_s=save_s):
            costs.append(training.now - saved)  # Of a kill just before the new one was whole.
            saved = end
    assert costs[0] <= max(30.0, iteration_s) + save_s
    assert max(costs) <= 600.0
    # They are not written more often than that takes: one more iteration would have been too many.
    assert min(costs[1:]) > 600.0 - 1.3 * iteration_s - 2 * save_s


def test_iterations_longer_than_ten_minutes_are_each_followed_by_a_checkpoint(tmp_path: Path) -> None:
    training = Training(make_trial(tmp_path), SafetyNet())
    assert [training.iterate(700.0) for _ in range(3)] == [True, True, True]


def test_the_first_checkpoint_comes_within_the_first_minute_and_a_resumed_run_has_one(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    training = Training(trial, SafetyNet())
    moments = [training.now for _ in range(100) if training.iterate(2.0)]
    assert len(moments) == 1
    assert moments[0] <= 30.0
    resumed = Training(trial, SafetyNet())
    assert not any(resumed.iterate(2.0) for _ in range(100))


def test_the_last_result_before_the_switch_is_saved_and_stays(tmp_path: Path) -> None:
    trial = make_trial(tmp_path, offline_updates=30)
    training = Training(trial, SafetyNet(every_s=1e9, frequency=None))
    phases = [("offline", 10), ("offline", 20), ("offline", 30), ("online", 30), ("online", 30)]
    due = [training.iterate(0.0, phase=phase, num_offline_updates_lifetime=done) for phase, done in phases]
    assert due == [False, False, True, False, False]
    for _ in range(5):
        training.iterate(0.0, is_asked_for=True, phase="online", num_offline_updates_lifetime=30)
    assert kept(trial) == [0, 4, 5]


def test_the_net_can_be_taken_away_by_either_key_and_then_the_best_one_alone_is_saved(tmp_path: Path) -> None:
    for number, net in enumerate((SafetyNet(every_s=math.inf), SafetyNet(frequency=0))):
        training = Training(make_trial(tmp_path / str(number), offline_updates=1), net)
        offline = {"phase": "offline", "num_offline_updates_lifetime": 1}
        assert not any(training.iterate(500.0, **offline) for _ in range(5))
        assert training.iterate(500.0, **evaluated(1.0))


def test_no_checkpoint_is_asked_for_where_one_is_on_its_way_or_the_end_is_to_have_none(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    training = Training(trial, SafetyNet(at_end=False))
    trial.temporary_state.saving_to = object()  # Population based training has asked for one.
    assert not training.iterate(700.0)
    trial.temporary_state.saving_to = None
    assert not training.iterate(700.0, done=True)
    assert training.iterate(700.0)


def test_checkpoints_that_take_long_are_told_once(tmp_path: Path) -> None:
    training = Training(make_trial(tmp_path), SafetyNet(every_s=100.0))
    for _ in range(3):
        training.iterate(100.0, save_s=20.0)
    (message,) = training.said
    assert message.startswith("Writing a checkpoint took 20 s, more than a tenth of `checkpoint_every_s` (100); raise")


# --- Which ------------------------------------------------------------------------------------------------------------


def test_the_newest_two_and_the_best_stay_by_default(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    training = Training(trial, SafetyNet())
    for episode_return in (-9.0, -1.0, -5.0, -6.0, -7.0):
        training.iterate(1.0, is_asked_for=True, **evaluated(episode_return))
    assert kept(trial) == [1, 3, 4]
    known = trial.run_metadata.checkpoint_manager._checkpoint_results
    assert [result.metrics["training_iteration"] for result in known] == [2, 4, 5]


def test_what_checkpoint_config_asks_for_stays_and_num_to_keep_counts_without_the_best(tmp_path: Path) -> None:
    every_second = make_trial(tmp_path, "a")
    training = Training(every_second, SafetyNet(frequency=2, keep_best=None))
    for _ in range(7):
        training.iterate(1.0, is_asked_for=True)
    assert kept(every_second) == [1, 3, 5, 6]  # Iterations 2, 4 and 6, and the newest two.

    only_one = make_trial(tmp_path, "b", offline_updates=2)
    training = Training(only_one, SafetyNet(frequency=1, num_to_keep=1))
    for iteration in range(1, 6):
        phase = {"phase": "offline" if iteration <= 2 else "online", "num_offline_updates_lifetime": min(2, iteration)}
        training.iterate(1.0, is_asked_for=True, **phase, **evaluated(5.0 if iteration == 3 else 0.0))
    assert kept(only_one) == [2, 4]


def test_a_checkpoint_that_another_trial_goes_on_from_or_that_the_scheduler_may_copy_is_not_removed(
    tmp_path: Path,
) -> None:
    trial, other = make_trial(tmp_path, "a"), make_trial(tmp_path, "b")
    scheduler: Any = SimpleNamespace(_trial_state={})
    training = Training(trial, SafetyNet(keep_best=None), scheduler=scheduler)
    for _ in range(2):
        training.iterate(1.0, is_asked_for=True)
    first, second = (result.checkpoint for result in trial.run_metadata.checkpoint_manager._checkpoint_results)
    scheduler._trial_state[trial] = SimpleNamespace(last_checkpoint=first)
    other.run_metadata.checkpoint_manager.register_checkpoint(_TrainingResult(second, {}))
    training.trials = [trial, other]
    for _ in range(3):
        training.iterate(1.0, is_asked_for=True)
    assert kept(trial) == [0, 1, 3, 4]


# --- The best ---------------------------------------------------------------------------------------------------------


def test_success_goes_before_return_which_decides_between_equals() -> None:
    by = BestMetric()
    results = [evaluated(9.0), evaluated(-5.0, 0.5), evaluated(-4.0, 0.5), evaluated(-9.0, 0.75)]
    scores = [by.score(result) for result in results]
    assert None not in scores
    assert scores == sorted(scores)  # type: ignore[type-var]
    assert by.score(evaluated(math.nan)) is None
    assert by.score({"evaluation": {"env_runners": {}}}) is None
    assert by.score({}) is None
    loss = BestMetric("learners/default_policy/qf_loss", "min")
    small, great = ({"learners": {"default_policy": {"qf_loss": value}}} for value in (0.5, 2.0))
    assert loss.score(small) > loss.score(great)  # type: ignore[operator]


def test_the_best_evaluation_asks_for_a_checkpoint_and_is_told_with_what_it_was_chosen_from(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    training = Training(trial, SafetyNet(every_s=1e6))
    due = []
    for steps, episode_return in ((1_000, -120.0), (2_000, -79.59), (3_000, -110.6), (4_000, -79.59)):
        at = {"phase": "online", "num_offline_updates_lifetime": 50, "num_online_env_steps_lifetime": steps}
        due.append(training.iterate(1.0, **at, **evaluated(episode_return)))
        training.iterate(1.0)
        if steps == 1_000:
            described = training.callback.describe_best(trial) or ""
            assert described.startswith("return -120.00 at 1,000 env steps, the only evaluation: ")
    assert due == [True, True, False, False]  # Of equals the first stays.
    training.iterate(1.0, is_asked_for=True)
    assert training.callback.describe_best(trial) == (
        f"return -79.59 at 2,000 env steps, best of 4 evaluations: {trial.storage.trial_fs_path}/checkpoint_000001"
    )


def test_an_evaluation_that_rllib_repeats_counts_once(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    training = Training(trial, SafetyNet(every_s=1e6))
    for number in range(3):
        for episodes in (2.0, 4.0):  # RLlib's counters change where it repeats an evaluation.
            evaluation = {
                "episode_return_mean": 1.0,
                "episode_duration_sec_mean": 0.1 + number,
                "num_episodes_lifetime": episodes,
            }
            training.iterate(1.0, evaluation={"env_runners": evaluation})
    training.iterate(1.0, is_asked_for=True)
    assert "best of 3 evaluations" in (training.callback.describe_best(trial) or "")


def test_values_by_data_count_at_their_own_interval_and_are_not_missed_before_the_first(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    training = Training(trial, SafetyNet(every_s=1e6, keep_best=BestMetric("evaluation/fqe/value")))
    values = (None, 0.5, 0.5, 0.25, 0.25)  # Every second iteration, and repeated in between.
    for number, value in enumerate(values):
        fitted = {} if value is None else {"fqe": {"value": value, "value_low": value - 1}}
        training.iterate(1.0, evaluation={"held_out": {"td_loss": 0.1 * number}, **fitted})
    assert not training.said
    assert "evaluation/fqe/value 0.5 at" in (training.callback.describe_best(trial) or "")
    training.iterate(1.0, is_asked_for=True)
    assert "best of 2 evaluations" in (training.callback.describe_best(trial) or "")


def test_a_kill_while_the_best_one_is_replaced_leaves_the_former_or_the_new_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = make_trial(tmp_path)
    training = Training(trial, SafetyNet(every_s=1e6, num_to_keep=1))
    training.iterate(1.0, **evaluated(1.0))
    folder = str(trial.storage.trial_fs_path)

    class Killed(BaseException):
        """Ends the process."""

    def killed(*args: Any) -> None:
        raise Killed

    # The checkpoint is whole, the note of it is not written yet.
    with monkeypatch.context() as patched:
        patched.setattr("rllib_calql.experiments.best_checkpoint.write_whole", killed)
        with pytest.raises(Killed):
            training.iterate(1.0, **evaluated(2.0))
    former = read_best(LOCAL, folder)
    assert former is not None
    assert (former.checkpoint, former.episode_return) == ("checkpoint_000000", 1.0)
    # The resume finds the new one on disk, as `_take_newest_checkpoint` does.
    result = {"training_iteration": 2, **evaluated(2.0)}
    new = tune.Checkpoint(f"{folder}/checkpoint_000001", LOCAL)
    trial.run_metadata.checkpoint_manager.register_checkpoint(_TrainingResult(new, result))
    trial.storage.current_checkpoint_index = 1
    resumed = Training(trial, SafetyNet(every_s=1e6, num_to_keep=1))
    best = read_best(LOCAL, folder)
    assert best is not None
    assert (best.checkpoint, best.episode_return, best.num_evaluations) == ("checkpoint_000001", 2.0, 2)
    resumed.iteration = 2
    assert not resumed.iterate(1.0, **evaluated(1.5))
    assert resumed.iterate(1.0, **evaluated(3.0))
    # The former ones were removed only after the note of the new one.
    assert kept(trial) == [2]
    assert "best of 4 evaluations" in (resumed.callback.describe_best(trial) or "")


def test_a_best_checkpoint_that_lost_files_or_was_chosen_by_another_metric_is_chosen_anew(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    training = Training(trial, SafetyNet(every_s=1e6))
    for iteration, episode_return in enumerate((3.0, 1.0, 2.0), start=1):
        training.iterate(1.0, is_asked_for=True, **evaluated(episode_return), loss=float(iteration))
    folder = Path(trial.storage.trial_fs_path)
    by_loss = BestMetric("loss", "min")
    assert Training(trial, SafetyNet(keep_best=by_loss)).callback.best_of(trial).checkpoint == "checkpoint_000000"  # type: ignore[union-attr]
    assert json.loads((folder / BEST_FILE).read_text())["metric"] == "loss"
    (folder / "checkpoint_000000" / "class_and_ctor_args.pkl").unlink()
    assert read_best(LOCAL, str(folder)) is None
    (folder / BEST_FILE).write_text('{"checkpoint": "../../other"')
    assert read_best(LOCAL, str(folder)) is None


def test_a_metric_that_results_do_not_have_is_told_at_the_first_evaluation(tmp_path: Path) -> None:
    training = Training(make_trial(tmp_path), SafetyNet(keep_best=BestMetric("evaluation/env_runners/succes_rate")))
    training.iterate(1.0)
    assert not training.said
    training.iterate(1.0, **evaluated(1.0, 0.5))
    training.iterate(1.0, **evaluated(1.0, 0.5))
    (message,) = training.said
    assert re.fullmatch(
        r"`keep_best` judges by `evaluation/env_runners/succes_rate`, which results do not have; did you mean "
        r"`evaluation/env_runners/success_rate`.*\? No checkpoint is kept as the best one\.",
        message,
    )


# --- In experiment files ----------------------------------------------------------------------------------------------

EXPERIMENT = "e: {run: CalQL, env: Pendulum-v1, stop: {training_iteration: 1}, %s}"


def read(tmp_path: Path, text: str) -> Any:
    (tmp_path / "e.yaml").write_text(EXPERIMENT % text)
    return read_experiments(tmp_path / "e.yaml")[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("config: {}", SafetyNet()),
        ("checkpoint_every_s: 60", SafetyNet(every_s=60.0)),
        ("checkpoint_every_s: false, keep_best: false", SafetyNet(every_s=math.inf, keep_best=None)),
        ("checkpoint_config: {checkpoint_frequency: 5, num_to_keep: 3}", SafetyNet(frequency=5, num_to_keep=3)),
        (
            "checkpoint_config: {checkpoint_frequency: 0, checkpoint_at_end: false}",
            SafetyNet(frequency=0, at_end=False),
        ),
        (
            "config: {evaluation_interval: 2}, keep_best: evaluation/env_runners/normalized_score",
            SafetyNet(keep_best=BestMetric("evaluation/env_runners/normalized_score")),
        ),
        ("keep_best: {metric: q_out_of_range, mode: min}", SafetyNet(keep_best=BestMetric("q_out_of_range", "min"))),
    ],
)
def test_the_net_is_set_in_the_experiment_file(tmp_path: Path, text: str, expected: SafetyNet) -> None:
    assert read(tmp_path, text).safety_net == expected


def test_a_python_file_sets_the_net_by_variables_of_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "e.py").write_text(
        "from rllib_calql import CalQLConfig\n"
        "config = CalQLConfig().environment('Pendulum-v1')\n"
        "stop = {'training_iteration': 1}\n"
        "checkpoint_every_s, keep_best, checkpoint_config = 5, False, {'num_to_keep': 4}\n"
    )
    (experiment,) = read_experiments(tmp_path / "e.py")
    assert experiment.safety_net == SafetyNet(every_s=5.0, keep_best=None, num_to_keep=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoint_every_s: 0", r"`checkpoint_every_s` of experiment 'e' must be seconds > 0, or false .*; got 0\."),
        ("checkpoint_every_s: often", r"`checkpoint_every_s` .* got 'often'"),
        ("checkpoint_evry_s: 5", r"Unknown key `checkpoint_evry_s` .*did you mean `checkpoint_every_s`"),
        ("keep_best: true", r"`keep_best` of experiment 'e' judges by evaluations, but nothing is evaluated; set"),
        ("keep_best: evaluation/env_runners/success_rate", r"judges by `evaluation/.*`, but nothing is evaluated"),
        ("keep_best: 3", r"`keep_best` of experiment 'e' must be true, false, a metric's path like .*; got 3\."),
        ("keep_best: {mode: min}", r"`keep_best` of experiment 'e' must be true, false, .*; got \{'mode': 'min'\}"),
        ("keep_best: {metric: a, mode: least}", r"`mode` in `keep_best` .* must be one of max, min; got 'least'"),
        ("keep_best: {metrik: a}", r"Unknown key `metrik` in `keep_best` .*did you mean `metric`"),
        ("checkpoint_config: {num_to_keep: 0}", r"`num_to_keep` in `checkpoint_config` .* >= 1 .*, got 0"),
        ("checkpoint_config: {checkpoint_frequency: 1.5}", r"`checkpoint_frequency` in .* whole number >= 0"),
        ("checkpoint_config: {checkpoint_at_end: maybe}", r"`checkpoint_at_end` in .* true or false, got 'maybe'"),
        ("checkpoint_config: 5", r"`checkpoint_config` of experiment 'e' must be a mapping"),
    ],
)
def test_a_net_that_makes_no_sense_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        read(tmp_path, text)


# --- Which checkpoint stands for a run --------------------------------------------------------------------------------


def trained(tmp_path: Path, name: str, *returns: float, net: SafetyNet | None = None) -> Trial:
    trial = make_trial(tmp_path, name)
    training = Training(trial, net or SafetyNet())
    for episode_return in returns:
        training.iterate(1.0, is_asked_for=True, **evaluated(episode_return))
    return trial


def test_a_run_stands_for_its_newest_whole_checkpoint_or_the_best_of_all_trials(tmp_path: Path) -> None:
    trained(tmp_path, "a", 1.0, 9.0, 3.0)
    trained(tmp_path, "b", 5.0, 2.0, 3.0, 4.0)
    run = tmp_path / "run"
    newest = choose_checkpoint(str(run), best=False)
    assert (newest.path, newest.reason) == (f"{run}/b/checkpoint_000003", "the newest of 2 trials: iteration 4")
    best = choose_checkpoint(str(run), best=True)
    assert best.path == f"{run}/a/checkpoint_000001"
    assert best.reason == "the best of the best of 2 trials, a: return 9.00 at 0 env steps, best of 3 evaluations"
    assert choose_checkpoint(str(run / "b"), best=True).path == f"{run}/b/checkpoint_000000"
    (run / "b" / "checkpoint_000003" / "class_and_ctor_args.pkl").write_bytes(b"cut")
    assert choose_checkpoint(f"file://{run}", best=False).path == f"{run}/b/checkpoint_000002"
    itself = choose_checkpoint(newest.path, best=False)
    assert (itself.path, itself.reason) == (newest.path, "")


def test_a_folder_without_the_checkpoint_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "a", 1.0, net=SafetyNet(keep_best=None))
    run = tmp_path / "run"
    with pytest.raises(ValueError, match=r"/run' has no best checkpoint: its run evaluated nothing .*; drop `--best`"):
        choose_checkpoint(str(run), best=True)
    with pytest.raises(
        ValueError, match=r"`--best` chooses from the checkpoints .* is a single one; .* give '.*/run/a'"
    ):
        choose_checkpoint(str(run / "a" / "checkpoint_000000"), best=True)
    with pytest.raises(ValueError, match=r"is not a checkpoint of an algorithm, nor a run .* Did you mean '.*/run'\?"):
        choose_checkpoint(str(tmp_path), best=False)
    with pytest.raises(FileNotFoundError, match=r"'.*/nowhere' does not exist; give the folder"):
        choose_checkpoint(str(tmp_path / "nowhere"), best=False)


# --- What a resume says -----------------------------------------------------------------------------------------------


def test_a_resume_says_from_where_each_trial_goes_on_and_what_is_made_again(tmp_path: Path) -> None:
    saved, new, ended = (make_trial(tmp_path, name) for name in ("saved", "new", "ended"))
    training = Training(saved, SafetyNet())
    counters = {"phase": "online", "num_offline_updates_lifetime": 5_000, "num_online_env_steps_lifetime": 1_200}
    for _ in range(5):
        training.iterate(10.0, **counters)
    training.save({"training_iteration": 5, "timestamp": 50, **counters})
    lines = [json.dumps({"training_iteration": iteration}) + "\n" for iteration in range(1, 8)]
    for trial in (saved, new, ended):
        Path(trial.storage.trial_fs_path, "result.json").write_text("".join(lines))
        table = 'a,training_iteration\n1,4\n"2,5",5\n3,6\n4,'
        Path(trial.storage.trial_fs_path, "progress.csv").write_text(table)
    ended.set_status(Trial.TERMINATED)
    said: list[str] = []
    tell_where_it_goes_on([saved, new, ended], "run", said.append, clock=lambda: 590.0)
    assert [line.replace(str(saved), "SAVED").replace(str(new), "NEW") for line in said] == [
        "Trial 'SAVED' goes on from 'checkpoint_000001' (iteration 5, online, 5,000 updates and 1,200 env steps, 9:00 "
        "old); iterations 6 to 7 are made again.",
        "Trial 'NEW' has no checkpoint, it begins anew; iterations 1 to 7 are made again.",
    ]
    for trial in (saved, new, ended):
        drop_results_made_again(trial)
    left = [Path(trial.storage.trial_fs_path, "result.json").read_text() for trial in (saved, new, ended)]
    assert left == ["".join(lines[:5]), "", "".join(lines)]
    tables = [Path(trial.storage.trial_fs_path, "progress.csv").read_text() for trial in (saved, new, ended)]
    # The rows that a sudden end has kept from the table are those of the log.
    assert tables == [
        'a,training_iteration\n,1\n,2\n,3\n1,4\n"2,5",5\n',
        "a,training_iteration\n",
        'a,training_iteration\n,1\n,2\n,3\n1,4\n"2,5",5\n3,6\n,7\n',
    ]


def test_the_results_before_a_checkpoint_are_in_the_storage_with_it(tmp_path: Path) -> None:
    local, stored = tmp_path / "staging" / "result.json", tmp_path / "storage" / "result.json"
    for path in (local, stored):
        path.parent.mkdir()
    storage = SimpleNamespace(
        storage_filesystem=LOCAL,
        trial_fs_path=str(stored.parent),
        trial_driver_staging_path=str(local.parent),
        syncer=SimpleNamespace(wait=lambda: None),
    )
    trial: Any = SimpleNamespace(trial_id="t", storage=storage)
    keep = KeepLogs()
    for iteration in range(1, 4):
        with local.open("a") as log:
            log.write(f'{{"training_iteration": {iteration}}}\n')
        keep.on_trial_save(0, [trial], trial)
        assert stored.read_text() == local.read_text()


def test_a_run_without_any_checkpoint_is_said_to_begin_anew(tmp_path: Path) -> None:
    started, not_started = make_trial(tmp_path), make_trial(tmp_path, "other")
    not_started.storage.trial_dir_name = None
    said: list[str] = []
    tell_where_it_goes_on([started, not_started], "a", said.append)
    assert said == [
        "The run 'a' was stopped before its first checkpoint; it begins anew.",
        f"Trial '{started}' has no checkpoint, it begins anew.",
    ]
