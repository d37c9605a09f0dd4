"""Fixtures: one Ray for the session, one folder for data sets. Files with slow tests and those with Ray come first."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from forked_workers import started_by_forks

# Networks of these sizes are up to six times slower on two threads, and more so where several tests share the cores.
# Processes that tests start inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


TESTS = Path(__file__).parent
# Workers unpickle the environments of these tests.
IMPORTABLE = os.pathsep.join(
    sorted({str(file.parent) for file in [*TESTS.rglob("test_*.py"), TESTS / "support" / "tiny.py"]})
)


def pytest_configure(config: pytest.Config) -> None:
    """Lets pytest-xdist keep the order of the files, in place of beginning with those that have many tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that take longest, so that no worker is left with one of them alone at the end."""
    weights: Counter[Path] = Counter()
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        weights[item.path] += 10 * is_slow + ("ray_session" in getattr(item, "fixturenames", ()))
    items.sort(key=lambda item: -weights[item.path])


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with two CPUs, started once."""
    if not ray.is_initialized():
        with started_by_forks():
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": {"PYTHONPATH": IMPORTABLE}},
            )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _minari_root(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets of the tests live in one folder of the session, never in the user's."""
    root = tmp_path_factory.getbasetemp() / "minari"
    root.mkdir(exist_ok=True)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
