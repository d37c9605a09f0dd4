"""`rllib export` and `export_policy`: from a checkpoint to a file, and what is refused before and while it is read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from click.testing import CliRunner, Result
from policies import DICT, VECTOR, Case, trained
from tiny import line_config

from rllib_calql import CalQLConfig, export_policy, load_policy
from rllib_calql.checkpoints.integrity import write_manifest
from rllib_calql.commands.main import main
from rllib_calql.export.reading import _observation_space, policy_data
from rllib_calql.networks.rl_module import CalQLTorchRLModule
from rllib_calql.policy.spaces import described_space


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Of a policy that went through both phases, evaluated after each."""
    folder = tmp_path_factory.mktemp("export")
    config = line_config(folder, offline_updates=2, updates_per_iteration=2)
    config.evaluation(evaluation_interval=1, evaluation_duration=2)
    algo = config.build()
    algo.train()
    algo.save_to_path(folder / "checkpoint")
    observations = np.linspace(-5.0, 5.0, 20, dtype=np.float32)[:, None]
    module = algo.get_module()
    import torch
    from ray.rllib.core.columns import Columns

    actions = module.forward_inference({Columns.OBS: torch.from_numpy(observations)})[Columns.ACTIONS].numpy()
    np.savez(folder / "acted.npz", observations=observations, actions=2.0 * actions)  # Bounds of +-2.
    algo.stop()
    return folder / "checkpoint"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_checkpoint_becomes_a_file_that_acts_as_it_did(checkpoint: Path, tmp_path: Path) -> None:
    done = run("export", checkpoint, tmp_path / "policy.npz")
    assert done.exit_code == 0, done.output
    assert f"policy            {tmp_path / 'policy.npz'}" in done.stdout
    policy = load_policy(tmp_path / "policy.npz")
    acted = np.load(checkpoint.parent / "acted.npz")
    np.testing.assert_allclose(policy.compute_actions(acted["observations"]), acted["actions"], rtol=1e-6, atol=2e-6)
    about = policy.metadata
    assert about["checkpoint"]["num_offline_updates_lifetime"] == 2
    assert about["checkpoint"]["fingerprint"].startswith("sha256:")
    assert about["scores"]["episode_return_mean"] < 0.0
    assert about["versions"]["checkpoint"]["numpy"] == np.__version__
    assert about["observation_space"] == {"kind": "Box", "shape": [1], "dtype": "float32"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.npz"]


def test_a_file_is_replaced_only_by_force(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "policy.npz"
    file.write_text("mine")
    done = run("export", checkpoint, file)
    assert (done.exit_code, file.read_text()) == (2, "mine")
    assert "is there already; choose another name, or replace it with `--force`" in done.output
    assert run("export", checkpoint, file, "--force").exit_code == 0
    load_policy(file)
    with pytest.raises(FileExistsError, match="is there already"):
        export_policy(checkpoint, file)
    assert export_policy(checkpoint, file, force=True) == file


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("policy.pkl", "must end in .npz, .onnx or .pt"),
        ("policy", "must end in .npz, .onnx or .pt"),
        ("nowhere/policy.npz", "There is no folder"),
    ],
)
def test_a_wrong_output_is_refused_before_the_checkpoint_is_read(
    output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.rllib", None)  # Importing it would fail.
    done = run("export", tmp_path, tmp_path / output)
    assert done.exit_code == 2
    assert message in done.output


def test_wrong_arguments_in_python_are_told_by_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"A checkpoint is a folder.*got CalQLConfig; give the folder that `algo.save_to"
    ):
        export_policy(CalQLConfig(), tmp_path / "policy.npz")
    with pytest.raises(TypeError, match="`output` must be the path of a file, got NoneType"):
        export_policy(tmp_path, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`force` must be True or False, got 'no'"):
        export_policy(tmp_path, tmp_path / "policy.npz", force="no")  # type: ignore[arg-type]


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "policy.npz").mkdir()
    done = run("export", tmp_path, tmp_path / "policy.npz")
    assert done.exit_code == 2
    assert "is a folder; name a file in it" in done.output


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    done = run("export", tmp_path / "nowhere", tmp_path / "policy.npz")
    assert done.exit_code == 2
    assert "does not exist; give the folder of a run" in done.output
    done = run("export", tmp_path, tmp_path / "policy.npz")
    assert done.exit_code == 2
    assert "not a checkpoint of an algorithm" in done.output
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    state = damaged / "learner_group/learner/rl_module/default_policy/module_state.pkl"
    state.write_bytes(state.read_bytes()[:-7])
    done = run("export", damaged, tmp_path / "policy.npz")
    assert done.exit_code == 1
    assert "is damaged" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "policy.npz").exists()


def test_a_checkpoint_without_types_of_observations_gets_the_usual_ones(checkpoint: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(checkpoint, older)
    content = json.loads((older / "calql.json").read_text())
    del content["spaces"]["observation_space"]["exact"]
    own = {key: value for key, value in content.items() if key not in ("format", "save", "files", "digest")}
    write_manifest(older, own)
    policy = load_policy(export_policy(older, tmp_path / "older.npz"))
    policy(np.zeros(1, np.float32))


def test_structures_without_types_are_read_as_the_data_give_them() -> None:
    from rllib_calql.common.encoding import encoded_space
    from rllib_calql.common.spaces import description_of

    found = _observation_space({"structure": description_of(DICT), "space": str(DICT)}, encoded_space(DICT))
    expected = described_space(DICT)
    assert found["keys"] == expected["keys"]
    assert found["parts"][2] == expected["parts"][2]  # Discrete, with its start.
    assert found["parts"][0] == {"kind": "Box", "shape": [2], "dtype": "float32"}


# --- What no file can hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env_to_module_connector": lambda *_: None}, "sets `env_to_module_connector`, whose code no policy file"),
        ({"module_to_env_connector": lambda *_: None}, "sets `module_to_env_connector`, whose code no policy file"),
        (
            {"add_default_connectors_to_module_to_env_pipeline": False},
            "sets `add_default_connectors_to_module_to_env_pipeline=False`",
        ),
    ],
)
def test_connectors_of_the_user_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    from rllib_calql.export.reading import _refuse_connectors

    with pytest.raises(ValueError, match=message):
        _refuse_connectors(CalQLConfig().env_runners(**settings))
    _refuse_connectors(CalQLConfig())


def test_a_module_of_another_class_and_a_diverged_one_are_refused() -> None:
    made = trained(Case(VECTOR), hiddens=(4,))
    made.runner.stop()
    module = made.runner.module
    module.policy.head.weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"has diverged: 'head\.weight' is not finite"):
        policy_data(module, observation_space=described_space(VECTOR))

    class Own(CalQLTorchRLModule):
        """A user's."""

    module.__class__ = Own
    with pytest.raises(ValueError, match=r"is a Own \(`rl_module_spec`\), whose own code no policy file can hold"):
        policy_data(module, observation_space=described_space(VECTOR))


def test_observations_with_keys_of_other_types_are_refused() -> None:
    space = gym.spaces.Dict({(0, 1): VECTOR})
    with pytest.raises(ValueError, match="keys of a Dict must be strings or integers"):
        described_space(space)
    with pytest.raises(ValueError, match="have keys that no policy file can hold"):
        _observation_space({"exact": None, "space": str(space)}, VECTOR)
