"""`Evaluation`, one row of a study's results, and the file of all of them. Knows neither Ray nor RLlib."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

EVALUATIONS_FILE = "evaluations.parquet"
STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the greedy policy, with what the learner reported last before it.

    Attributes:
        task: Name of the task.
        algorithm: Name of the algorithm.
        seed: Seed of the trial.
        num_offline_updates: Gradient updates of the offline phase so far.
        num_online_updates: Gradient updates of the online phase so far.
        num_online_env_steps: Env steps stored so far.
        num_episodes: Episodes of this evaluation.
        return_mean: Their mean undiscounted return, in the environment's rewards.
        success_rate: Share of successful ones, where the environment reports success.
        normalized_score: Where the data have reference scores, see `EvaluationHistory.normalized_score`.
        calibration_gap: Mean of Q(s, a) minus the reference value over offline rows; over all rows without such.
        bound_rate: Share of the sampled policy actions whose Q lies below the reference value, mean over critics.
        q_data: Mean Q of the batches' own actions, mean over critics.
        reference_value: Mean reference value of the batches.
        time_s: Seconds since the trial began, evaluations included.
    """

    task: str
    algorithm: str
    seed: int
    num_offline_updates: int
    num_online_updates: int
    num_online_env_steps: int
    num_episodes: int
    return_mean: float
    success_rate: float | None = None
    normalized_score: float | None = None
    calibration_gap: float | None = None
    bound_rate: float | None = None
    q_data: float | None = None
    reference_value: float | None = None
    time_s: float = 0.0

    @property
    def score(self) -> float:
        """Success rate, else normalised score / 100, else the return."""
        if self.success_rate is not None:
            return self.success_rate
        return self.return_mean if self.normalized_score is None else self.normalized_score / 100.0


_TYPES = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "float | None": pa.float64()}
_SCHEMA = pa.schema(
    [pa.field(f.name, _TYPES[str(f.type)], nullable="None" in str(f.type)) for f in dataclasses.fields(Evaluation)]
)


def write_results(folder: Path, evaluations: Iterable[Evaluation], study: Mapping[str, Any]) -> None:
    """Writes the evaluations as one tidy Parquet file, and beside it what the study is, as JSON.

    Args:
        folder: Made if it does not exist.
        evaluations: One row each.
        study: Settings and versions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = [dataclasses.asdict(evaluation) for evaluation in evaluations]
    table = pa.Table.from_pylist(columns, schema=_SCHEMA)
    partial = folder / f"{EVALUATIONS_FILE}.partial"
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, folder / EVALUATIONS_FILE)
    write_json(folder / STUDY_FILE, study)


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_results(folder: Path) -> tuple[list[Evaluation], dict[str, Any]]:
    """Reads what `write_results` wrote.

    Raises:
        ValueError: If there is nothing of the kind.
    """
    try:
        rows = pq.read_table(folder / EVALUATIONS_FILE).to_pylist()
        study = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))
        return [Evaluation(**row) for row in rows], study
    except (OSError, TypeError, pa.ArrowException, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{folder}' holds no results of a study ({EVALUATIONS_FILE} and {STUDY_FILE}): {error}"
        ) from error
