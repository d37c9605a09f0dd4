"""What an algorithm says of its work, in the order of a run."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny import line_config

from rllib_calql.system import activity

pytestmark = pytest.mark.usefixtures("ray_session")


def test_every_kind_of_work_is_said_when_it_begins_and_counted_as_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works: list[activity.Work] = []
    say = activity.say

    def noting(text: str, **more: Any) -> activity.Work:
        works.append(say(text, **more))
        return works[-1]

    monkeypatch.setattr(activity, "say", noting)
    config = line_config(tmp_path, offline_updates=4, updates_per_iteration=4)
    config.evaluation(evaluation_interval=1, evaluation_duration=3)
    algo = config.build()
    for _ in range(3):
        result = algo.train()
    env_steps = algo.num_online_env_steps
    algo.save_to_path(tmp_path / "checkpoint")
    algo.stop()
    rewards: dict[str, float] = defaultdict(float)
    for row in pq.read_table(tmp_path / "line.parquet", columns=["eps_id", "rewards"]).to_pylist():
        rewards[row["eps_id"]] += row["rewards"]
    assert result["store"]["offline_return_mean"] == pytest.approx(sum(rewards.values()) / len(rewards))
    told = [work.told() for work in works]
    texts = [one.text for one in told]
    assert texts[:3] == [
        "building (networks on cpu)",
        f"reading data 0 % ({tmp_path}/line.parquet)",
        f"reading data 100 % ({tmp_path}/line.parquet)",
    ]
    offline, evaluating, first, update = texts[3:7]
    assert (offline, evaluating) == ("first updates", "evaluating, episode 3 of 3")
    assert first.startswith("collecting: ")
    assert update.startswith("updating: ")
    second = next(one for one in told[7:] if one.text.startswith("collecting"))
    assert told[3].counters == {"num_offline_updates_lifetime": 4}
    assert second.counters == {"num_online_env_steps_lifetime": env_steps}  # Both episodes, step by step.
    assert texts[-2:] == ["writing checkpoint", "ending the workers"]
