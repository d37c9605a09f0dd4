"""The commands of `tuned_examples/own_system/README.md`, one after the other as they stand, with less training."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rllib_calql.experiments.experiment import read_experiments

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tuned_examples" / "own_system"
# Sizes are cut for the test; nothing else is touched.
_SHORTER = {
    "tank.yaml": [
        (r"offline_updates: \d+", "offline_updates: 20"),
        (r"updates_per_iteration: \d+", "updates_per_iteration: 10\n    updates_per_env_step: 0.05"),
        (r"lifetime: \d+", "lifetime: 120"),
        (r"evaluation_duration: \d+", "evaluation_duration: 1"),
    ],
    "train.py": [
        (r"offline_updates=\d[\d_]*", "offline_updates=20"),
        (r"updates_per_iteration=\d[\d_]*", "updates_per_iteration=10, updates_per_env_step=0.05"),
        (r"lifetime\": \d[\d_]*", 'lifetime": 120'),
        (r"evaluation_duration=\d+", "evaluation_duration=1"),
    ],
}


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", (FOLDER / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def copied_example(home: Path) -> None:
    """The example below a folder that stands for the clone, as it is in the repository but for the sizes."""
    folder = home / "tuned_examples" / "own_system"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("logs", "__pycache__", "*.png"))
    for name, replacements in _SHORTER.items():
        text = (folder / name).read_text()
        for pattern, shorter in replacements:
            text, number = re.subn(pattern, shorter, text)
            assert number == 1, (name, pattern)
        (folder / name).write_text(text)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_command_runs_as_it_stands(tmp_path: Path) -> None:
    copied_example(tmp_path)
    first, *others = commands()
    assert first == 'pip install ".[examples]"'
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_ADDRESS": "local",
    }
    shown: dict[str, str] = {}
    folder = tmp_path
    for command in others:
        if command.startswith("cd "):
            folder /= command.removeprefix("cd ")
            continue
        shorter = command.replace("--episodes 50", "--episodes 2")
        run = subprocess.run(
            ["bash", "-c", shorter], capture_output=True, text=True, timeout=200, cwd=folder, env=environment
        )
        assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}{run.stderr[-3000:]}"
        shown[command] = run.stdout + run.stderr
    assert "on the set-point" in shown["python convert_logs.py"]
    assert "300 batches, 36000 steps" in shown["python convert_logs.py"]
    evaluated = [text for command, text in shown.items() if command.startswith("rllib evaluate")]
    assert evaluated
    assert all(re.search(r"success rate +[01]\.\d\d", text) for text in evaluated)


def test_the_script_and_the_file_are_the_same_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "own_system"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("logs", "__pycache__"))
    (folder / "logs").mkdir()
    (folder / "logs" / "tank.parquet").touch()  # That it is there is looked for, not what it holds.
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    (from_file,) = read_experiments(folder / "tank.yaml")
    (from_script,) = read_experiments(folder / "train.py")
    one, other = from_file.config.to_dict(), from_script.config.to_dict()
    assert {name: (one[name], other[name]) for name in one if str(one[name]) != str(other[name])} == {}
    assert from_file.stop == from_script.stop
