"""The check on a GPU, `tests/benchmarks/gpu.py`, in small sizes on the CPU: whether the script itself works."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.usefixtures("ray_session")
def test_the_check_on_a_gpu_runs_on_a_cpu_as_far_as_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.json"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(output), "--device", "cpu", "--small"])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    found = json.loads(output.read_text())
    assert not [name for name in found if name.endswith("_error")]
    # Twice on the same processor: with the same noise the same, and with noise of their own but one seed as well.
    assert found["one_update"]["relative_difference_of_change"] == 0.0
    assert found["learning"]["ratio_of_standard_deviations"] == 1.0
    assert found["learning"]["device"]["std"] > 0.0
    assert found["replay"] == found["tests"] == {"skipped": "needs a GPU"}
    rows = {row["precision"]: row for row in found["speeds"]}
    assert rows.keys() == {"fp32", "medium", "bf16"}
    assert rows["fp32"]["launched, store on host"] > 0.0
