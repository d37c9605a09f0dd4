"""`Evaluation`, one row of a study's results, and the files of a study. Knows neither Ray nor RLlib."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rllib_calql.system.parsed_json import parsed_json

EVALUATIONS_FILE = "evaluations.parquet"
STUDY_FILE = "study.json"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.md"
PICTURE_FILES = ("learning_curves.png", "regret.png", "dip.png", "calibration_gap.png", "bound_rate.png")
_PARTIAL = ".partial"  # At the end of the name of a file that is being written.


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
        success_rate: Mean success of its episodes, where the environment reports success.
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


def evaluation_of(row: Mapping[str, Any]) -> Evaluation:
    """An evaluation as `dataclasses.asdict` made a mapping of it, checked.

    Raises:
        TypeError: If a column is missing, unknown, or of another type.
    """
    one = Evaluation(**row)
    for column in dataclasses.fields(Evaluation):
        value = getattr(one, column.name)
        admitted = {"str": (str,), "int": (int,)}.get(str(column.type), (int, float))
        is_missing = value is None and "None" in str(column.type)
        if not is_missing and (not isinstance(value, admitted) or isinstance(value, bool)):
            raise TypeError(f"`{column.name}` is {value!r}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise TypeError(f"`{column.name}` has more than 64 bits")
    return one


def write_results(folder: Path, evaluations: Iterable[Evaluation], study: Mapping[str, Any]) -> None:
    """Writes the evaluations as one tidy Parquet file, and beside it what the study is, as JSON.

    Args:
        folder: Made if it does not exist.
        evaluations: One row each.
        study: Settings and versions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = [dataclasses.asdict(evaluation) for evaluation in evaluations]
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(columns, schema=_SCHEMA), content, compression="zstd")
    write_whole(folder / EVALUATIONS_FILE, content.getvalue())
    write_json(folder / STUDY_FILE, study)


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or, after a sudden end, as it was. A symbolic link is replaced."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    # Made here, so that nothing that another user put there is written to.
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_own_file(name: str) -> bool:
    """Whether a study, or its report, writes a file of this name to its folder."""
    names = (EVALUATIONS_FILE, STUDY_FILE, REPORT_FILE, SUMMARY_FILE, *PICTURE_FILES)
    return name in names or (name.endswith(_PARTIAL) and name.startswith(tuple(f"{own}." for own in names)))


def read_results(folder: Path) -> tuple[list[Evaluation], dict[str, Any]]:
    """Reads what `write_results` wrote.

    Raises:
        ValueError: If there is nothing of the kind, or a file of it is damaged; the message names the file.
    """
    for name in (EVALUATIONS_FILE, STUDY_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"'{folder}' holds no results of a study ({EVALUATIONS_FILE} and {STUDY_FILE}): there is no {name}."
            )
    path = folder / EVALUATIONS_FILE
    try:
        rows = [Evaluation(**row) for row in pq.read_table(path).cast(_SCHEMA).to_pylist()]
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"'{path}' is damaged, or no file of a study: {error}") from error
    return rows, read_study_file(folder)


def read_study_file(folder: Path) -> dict[str, Any]:
    """What the study in a folder is.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    path = folder / STUDY_FILE
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise ValueError(f"'{path}' is damaged, or no file of a study: it does not say the study's `name`.")
    return content


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: If it is missing or damaged, naming it.
    """
    try:
        return parsed_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged, or no file of a study: {error}") from error
