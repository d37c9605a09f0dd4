"""Recorded steps equal those that Python launches; on a GPU for real, elsewhere with a recorder that calls again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from small_learners import make_learner
from tiny import ONLINE_SIDE

from rllib_calql.learning.graphed_steps import GraphedSteps, graphed_steps
from rllib_calql.learning.learner import FITS_REFERENCE, ONLINE, REFERENCE_QUANTILE, CalQLTorchLearner
from rllib_calql.learning.step_losses import ScheduledWeight

MODULE, BATCH_SIZE = "default_policy", 8
CPU = torch.device("cpu")


class CallingAgain:
    """A recorder for processors that have no graphs: a replay calls the function. Recording has no effect."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.num_recorded = self.num_replayed = self.num_warm_ups = 0

    def warm_up(self, function: Callable[[], object]) -> None:
        """Calls it."""
        self.num_warm_ups += 1
        function()

    def record(self, function: Callable[[], object]) -> Callable[[], None]:
        """Returns what calls it."""
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            function()

        return replay


def batch_of(num_steps: int, seed: int = 0, batch_size: int = BATCH_SIZE) -> MultiAgentBatch:
    rng = np.random.default_rng(seed)
    num_rows = num_steps * batch_size
    columns = {
        "obs": rng.normal(size=(num_rows, 3)),
        "new_obs": rng.normal(size=(num_rows, 3)),
        "actions": rng.uniform(-0.9, 0.9, size=(num_rows, 2)),
        "rewards": rng.normal(size=num_rows),
        "terminateds": (rng.random(num_rows) < 0.2).astype(float),
        "returns_to_go": rng.normal(size=num_rows),
        "is_offline": np.ones(num_rows),
    }
    batch = SampleBatch({name: column.astype(np.float32) for name, column in columns.items()})
    return MultiAgentBatch({MODULE: batch}, num_rows)


def update(learner: CalQLTorchLearner, num_steps: int, *, seed: int = 0, online: bool = False, **kwargs: Any) -> Any:
    results = learner.update(
        batch=batch_of(num_steps, seed, **kwargs),
        minibatch_size=kwargs.get("batch_size", BATCH_SIZE),
        timesteps={ONLINE: online, "num_env_steps_sampled_lifetime": 0},
    )
    return {name: float(value.peek()) for name, value in results[MODULE].items() if hasattr(value, "peek")}


def pair(recorder: CallingAgain, **settings: Any) -> tuple[CalQLTorchLearner, CalQLTorchLearner]:
    """The same learner twice, the second with recorded steps."""
    plain, graphed = make_learner(**settings), make_learner(**settings)
    graphed._graphed = GraphedSteps(graphed._step_of_rows, recorder, CPU)
    return plain, graphed


def assert_equal(one: CalQLTorchLearner, other: CalQLTorchLearner) -> None:
    for (name, a), b in zip(
        one._calql_module.state_dict().items(), other._calql_module.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert torch.equal(one.curr_log_alpha[MODULE], other.curr_log_alpha[MODULE])
    assert torch.equal(one.log_alpha_prime, other.log_alpha_prime)
    assert one._num_updates == other._num_updates


def test_recorded_steps_tell_the_share_of_clipped_observations_of_both_parts() -> None:
    settings = {"normalize_observations": True, "observation_clip": 0.5, "seed": 3}
    plain, graphed = pair(recorder := CallingAgain(), **settings)
    batch = batch_of(6)
    columns = batch.policy_batches[MODULE]
    columns["is_offline"] = (np.arange(6 * BATCH_SIZE) % 2).astype(np.float32)
    is_clipped = np.abs(columns["obs"]) > 0.5  # The statistics are still 0 and 1.
    for learner in (plain, graphed):
        results = learner.update(batch=batch, minibatch_size=BATCH_SIZE, timesteps={ONLINE: True})[MODULE]
        for part, rows in (("offline", slice(1, None, 2)), ("online", slice(0, None, 2))):
            assert results[f"clipped_observations_{part}"].peek() == pytest.approx(is_clipped[rows].mean(), rel=1e-6)
    assert recorder.num_replayed
    assert_equal(plain, graphed)


def test_recorded_steps_equal_plain_ones_through_both_phases_cloning_and_sparse_targets() -> None:
    recorder = CallingAgain()
    plain, graphed = pair(recorder, bc_updates=7, target_update_period=3, lagrangian=True)
    for online in (False, True):
        for seed in (0, 1):
            metrics = [update(learner, 12, seed=seed, online=online) for learner in (plain, graphed)]
            assert metrics[0] == metrics[1]
            assert_equal(plain, graphed)
    # Cloning with and without a step of the targets (too few of the first for a record), then plain steps of both
    # kinds in both phases. Three warm-ups each.
    assert recorder.num_recorded == 5
    assert recorder.num_warm_ups + recorder.num_replayed == 48
    assert recorder.num_warm_ups == 2 + 3 * 5


def test_recorded_steps_equal_plain_ones_with_every_setting_of_the_online_side() -> None:
    recorder = CallingAgain()
    plain, graphed = pair(recorder, input_="rows.parquet", offline_updates=1, **ONLINE_SIDE)
    for learner in (plain, graphed):
        learner.update(batch=batch_of(8), minibatch_size=BATCH_SIZE, timesteps={ONLINE: False, FITS_REFERENCE: True})
    assert_equal(plain, graphed)
    assert (recorder.num_recorded, graphed.num_reference_updates) == (1, 8)
    for online in (False, True):
        metrics = [update(learner, 16, online=online) for learner in (plain, graphed)]
        assert metrics[0] == metrics[1]
        assert_equal(plain, graphed)
    assert recorder.num_recorded == 5  # Of the fit; with a step of the actor and without, in both phases.


def test_a_recorded_step_finds_the_quantile_where_a_new_one_was_put() -> None:
    plain, graphed = pair(CallingAgain(), reference_value="quantile")
    for quantile in (-3.0, 0.5, 40.0):
        shares = []
        for learner in (plain, graphed):
            timesteps = {ONLINE: False, REFERENCE_QUANTILE: quantile}
            results = learner.update(batch=batch_of(6), minibatch_size=BATCH_SIZE, timesteps=timesteps)[MODULE]
            assert results["reference_value_mean"].peek() == pytest.approx(quantile)
            shares.append(results["bound_rate_cql_q1_current_actions"].peek())
        assert shares == [float(quantile > 0.0)] * 2  # Critics begin at 0.
        assert_equal(plain, graphed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scheduled_weight_changes_where_a_recording_finds_it(dtype: torch.dtype) -> None:
    weight = ScheduledWeight([[0, 3.0], [10, 1.0], [10, 0.5]], CPU)
    recorded = weight._scheduled
    seen = []
    for env_steps in (0, 5, 9, 10, 11):
        weight.move(env_steps)
        value = weight.of(dtype)
        assert isinstance(value, torch.Tensor)
        assert value.dtype == dtype
        seen.append(float(value))
    assert weight._scheduled is recorded
    assert seen == pytest.approx([3.0, 2.0, 1.2, 0.5, 0.5], rel=1e-6)
    assert ScheduledWeight(0.7, CPU).of(dtype) == 0.7


def test_fewer_and_more_mini_batches_reuse_the_buffers_or_renew_them() -> None:
    recorder = CallingAgain()
    plain, graphed = pair(recorder)
    for num_steps in (6, 2, 6):
        for learner in (plain, graphed):
            update(learner, num_steps, seed=num_steps)
        assert_equal(plain, graphed)
    assert recorder.num_recorded == 1
    for num_steps, batch_size in ((9, BATCH_SIZE), (4, 2 * BATCH_SIZE)):
        for learner in (plain, graphed):
            update(learner, num_steps, batch_size=batch_size)
        assert_equal(plain, graphed)
    assert recorder.num_recorded == 3  # Larger buffers, then another batch size.


def test_what_cannot_be_recorded_is_launched_by_python_after_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    recorder = CallingAgain(fails=True)
    plain, graphed = pair(recorder)
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        for _ in range(3):
            for learner in (plain, graphed):
                update(learner, 5)
            assert_equal(plain, graphed)
    told = [record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert told == [
        "An update cannot be recorded as a CUDA graph, so Python launches every kernel, which is slower: "
        "operation not permitted when stream is capturing"
    ]
    assert recorder.num_warm_ups == 3


def test_a_restored_state_is_not_replayed_over() -> None:
    recorder = CallingAgain()
    plain, graphed = pair(recorder)
    update(graphed, 6)
    state = graphed.get_state()
    update(graphed, 3)
    for learner in (plain, graphed):
        learner.set_state(state)
        update(learner, 6, seed=5)
    assert_equal(plain, graphed)
    assert recorder.num_recorded == 2


def test_processors_without_graphs_get_none() -> None:
    assert graphed_steps(lambda rows: None, torch.Generator(), "cpu") is None
    assert make_learner()._graphed is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"input_": "rows.parquet", "offline_updates": 1, **ONLINE_SIDE}])
def test_on_a_gpu_recorded_steps_follow_plain_ones(settings: dict[str, Any]) -> None:
    learners = []
    for _ in range(2):
        learner = make_learner(num_gpus_per_learner=1, **settings)
        assert learner._graphed is not None
        learners.append(learner)
    plain, graphed = learners
    plain._graphed = None
    for seed in range(3):
        metrics = [update(learner, 20, seed=seed) for learner in learners]
        for name, value in metrics[0].items():
            assert metrics[1][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert graphed._graphed is not None
    assert graphed._graphed._replays
    for a, b in zip(
        plain._calql_module.state_dict().values(), graphed._calql_module.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
