"""The README's code blocks run, its commands are the ones CI uses, and its tables agree with the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rllib_calql import CalQLConfig
from rllib_calql.experiments.experiment import read_experiments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Sizes are cut for the test; nothing else is touched.
_SHORTER = [
    (r"offline_updates=\d[\d_]*", "offline_updates=4, updates_per_iteration=2"),
    (r"num_offline_updates_lifetime\": 2_000", 'num_offline_updates_lifetime": 4'),
    (r"evaluation_duration=10", "evaluation_duration=1"),
    (r"range\(5\)", "range(3)"),
]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def _python_programs() -> list[str]:
    """Each block by itself; one marked `continues` with the one before it."""
    programs: list[str] = []
    for tag, code in re.findall(r"^```python( continues)?\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL):
        if tag:
            programs[-1] += code
        else:
            programs.append(code)
    return programs


@pytest.mark.slow
@pytest.mark.parametrize("program", _python_programs(), ids=lambda code: code.count("\n"))
def test_python_blocks_run(program: str, tmp_path: Path) -> None:
    for pattern, shorter in _SHORTER:
        program = re.sub(pattern, shorter, program)
    script = tmp_path / "block.py"
    script.write_text(f"import ray\nray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n{program}")
    environment = {**os.environ, "RAY_ADDRESS": "local"}  # Whatever else runs on the machine.
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_yaml_blocks_are_valid_experiments(tmp_path: Path) -> None:
    blocks = _blocks("yaml")
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"experiment_{number}.yaml"
        path.write_text(block)
        (experiment,) = read_experiments(path)
        assert experiment.stop == {"num_online_env_steps_lifetime": 2000}
        assert experiment.config.actor_lr == 3e-4


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = dict(re.findall(r"<!-- command: (.*?) -->\n```bash\n(.*?)\n```", README))
    assert commands == {
        "main job": 'pip install ".[examples]" && rllib train file tuned_examples/pointmaze_umaze.yaml',
        "test": 'pip install -e ".[test]" && python -m pytest -n 2 --dist loadfile',
    }
    assert "<!-- command: test -->" in (ROOT / ".ci" / "run").read_text()


def test_the_table_of_settings_lists_every_setting_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `?(.*?)`? \| ", README.split("## Settings")[1].split("## Metrics")[0], flags=re.M
    )
    config = CalQLConfig()
    documented = dict(rows)
    for name, text in documented.items():
        value = config.model_config[name] if name in config._model_config else getattr(config, name)
        assert text == ('"' + value + '"' if isinstance(value, str) else str(value)), name
    import inspect

    own = {
        name
        for method in (CalQLConfig.training, CalQLConfig.offline_data, CalQLConfig.fine_tuning)
        for name in inspect.signature(method).parameters
    } - {"self", "kwargs"}
    assert own | set(config._model_config) == set(documented)
