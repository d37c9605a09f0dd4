"""What steps log, kept for a few steps and reduced together: the means are those of each step reduced by itself."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from rllib_calql.common import metrics as keys
from rllib_calql.learning.losses import CriticLoss, SampledValues
from rllib_calql.learning.step_records import OfCritics, StepLog, StepRecord
from rllib_calql.networks.steps import KindOfStep

NUM_CRITICS, NUM_ACTIONS = 2, 3
CONSERVATIVE, PLAIN = KindOfStep(), KindOfStep(is_conservative=False, moves_actor=False)


def record_of(number: int, kind: KindOfStep, batch_size: int = 4) -> StepRecord:
    """A step with numbers of its own, its first row online in every other step."""
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, batch_size, generator=generator)

    of_source = (NUM_CRITICS, NUM_ACTIONS)
    sampled = SampledValues(draw(*of_source), draw(*of_source), draw(*of_source), draw(3), draw(3), action_dim=2)
    bounds = draw(*of_source) > 0.0, draw(*of_source) > 0.5
    is_offline = torch.ones(batch_size)
    is_offline[0] = float(number % 2)
    terms = CriticLoss(draw(NUM_CRITICS), draw(NUM_CRITICS), *bounds) if kind == CONSERVATIVE else None
    return StepRecord(
        scalars={keys.QF_LOSS: torch.tensor(float(number))},
        of_rows={keys.TARGET_Q: draw()} | ({keys.LOG_PROB: draw()} if kind == CONSERVATIVE else {}),
        of_bound_rows={keys.REFERENCE_VALUE_MEAN: torch.where(is_offline > 0.0, draw(), -torch.inf)},
        critics=OfCritics(
            draw(NUM_CRITICS),
            sampled if kind == CONSERVATIVE else None,
            terms or CriticLoss(draw(NUM_CRITICS)),
            draw(),
            is_offline,
        ),
        clipped=draw().abs(),
    )


def of_one_step(record: StepRecord) -> dict[str, float]:
    """Some of what is logged, by NumPy."""
    critics = record.critics
    assert critics is not None
    assert record.clipped is not None
    q, offline = critics.q_data.double().numpy(), critics.is_offline.numpy() > 0.0
    bound = next(iter(record.of_bound_rows.values())).double().numpy()
    found = {
        keys.QF_LOSS: record.scalars[keys.QF_LOSS].item(),
        keys.TARGET_Q: record.of_rows[keys.TARGET_Q].double().numpy().mean(),
        keys.REFERENCE_VALUE_MEAN: bound[np.isfinite(bound)].mean(),
        keys.TD_LOSS_OF_CRITIC.format(c=2): critics.terms.td[1].double().numpy().mean(),
        keys.CALIBRATION_GAP: (q.mean(axis=0) - critics.returns_to_go.double().numpy()).mean(),
        keys.CLIPPED_OFFLINE: record.clipped.double().numpy()[offline].mean(),
    }
    if critics.sampled is not None:
        of_second = [values[1].double().numpy() for values in critics.sampled[:3]]
        found[keys.Q_STD_OF_CRITIC.format(c=2)] = np.concatenate(of_second).std(axis=0).mean()
        assert critics.terms.bound_next is not None
        found[keys.BOUND_RATE_NEXT_OF_CRITIC.format(c=1)] = critics.terms.bound_next[0].double().numpy().mean()
    return found


@pytest.mark.parametrize("num_steps", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("period", [0, 1, 3])
def test_means_over_steps_of_any_kinds_are_those_of_each_step_by_itself(num_steps: int, period: int) -> None:
    log = StepLog()
    expected = defaultdict(list)
    for number in range(num_steps):
        kind = CONSERVATIVE if period and number % period == 0 else PLAIN
        record = record_of(number, kind)
        log.add(kind, record)
        for name, value in of_one_step(record).items():
            expected[name].append(value)
    means = log.pop()
    for name, values in expected.items():
        assert means[name] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-6), name
    assert log.pop() == {}


def test_a_part_of_a_batch_that_is_empty_in_one_step_has_no_mean_in_that_call() -> None:
    log = StepLog()
    log.add(PLAIN, record_of(1, PLAIN))  # All of it offline.
    log.add(PLAIN, record_of(3, PLAIN))
    assert keys.CALIBRATION_GAP_ONLINE not in log.pop()
    log.add(PLAIN, record_of(2, PLAIN))
    assert math.isfinite(log.pop()[keys.CALIBRATION_GAP_ONLINE])


def test_no_graph_is_kept() -> None:
    log, weight = StepLog(), torch.tensor(2.0, requires_grad=True)
    record = record_of(0, CONSERVATIVE)
    assert record.critics is not None
    of_critics = record.critics._replace(q_data=record.critics.q_data * weight)
    log.add(CONSERVATIVE, record._replace(critics=of_critics, scalars={keys.QF_LOSS: weight * 3.0}))
    (kept,) = log._kept[CONSERVATIVE]
    assert kept.critics is not None
    assert kept.critics.q_data.grad_fn is None
    assert kept.scalars[keys.QF_LOSS].grad_fn is None


def test_large_steps_are_not_kept_and_small_ones_are_up_to_sixteen() -> None:
    log = StepLog()
    log.add(CONSERVATIVE, record_of(0, CONSERVATIVE, batch_size=30_000))
    assert log._kept[CONSERVATIVE] == []
    most = 0
    for number in range(40):
        log.add(CONSERVATIVE, record_of(number, CONSERVATIVE))
        most = max(most, len(log._kept[CONSERVATIVE]))
    assert most == 15
