"""Policies as ONNX models: that ONNX Runtime alone runs them, their names, damage, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from policies import ASYMMETRIC, DICT, VECTOR, Box, Case, trained
from test_files import NOT_NEEDED, run_without

import rllib_calql.export.writing as writing
from rllib_calql import load_policy
from rllib_calql.export.reading import PolicyData
from rllib_calql.export.writing import checked_output
from rllib_calql.policy.file_format import sealed_onnx

onnx = pytest.importorskip("onnx", reason='pip install ".[test]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install ".[test]"')


def data_of(space: gym.Space, actions: Box = ASYMMETRIC) -> PolicyData:  # type: ignore[type-arg]
    made = trained(Case(space, actions), hiddens=(4,))
    made.runner.stop()
    return made.data


@pytest.fixture(scope="module")
def data() -> PolicyData:
    return data_of(DICT)


@pytest.fixture
def file(data: PolicyData, tmp_path: Path) -> Path:
    path = tmp_path / "policy.onnx"
    path.write_bytes(writing.WRITERS[".onnx"](data))
    return path


def test_the_model_is_valid_and_names_parts_types_and_a_free_batch(file: Path) -> None:
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file)
    assert {one.name: (one.type, one.shape) for one in session.get_inputs()} == {
        "observation/action": ("tensor(int32)", ["batch", 2]),  # `action` is an output.
        "ahead/0": ("tensor(int64)", ["batch", 2]),
        "ahead/1": ("tensor(int8)", ["batch", 2, 2]),
        "side": ("tensor(int64)", ["batch"]),
        "where/table": ("tensor(double)", ["batch", 2, 3]),
        "where/x": ("tensor(float)", ["batch", 5]),
    }
    assert {one.name: one.shape for one in session.get_outputs()} == {
        name: ["batch", 4] for name in ("action", "mean", "log_std")
    }
    stored = session.get_modelmeta().custom_metadata_map
    assert json.loads(stored["rllib_calql"])["action_space"]["low"] == [-0.5, 1.0, -7.0, 0.0]


def test_onnx_runtime_alone_runs_a_model(tmp_path: Path) -> None:
    data, file = data_of(VECTOR), tmp_path / "policy.onnx"
    file.write_bytes(writing.WRITERS[".onnx"](data))
    absent = (*(name for name in NOT_NEEDED if name != "onnxruntime"), "rllib_calql")
    code = f"""
import onnxruntime
session = onnxruntime.InferenceSession({str(file)!r})
observations = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
mean, log_std = session.run(["mean", "log_std"], {{"observation": observations}})
noise = np.random.default_rng(1).standard_normal((3, 3), np.float32)
free = [0, 2, 3]
sample = np.tanh(mean[:, free] + np.exp(log_std[:, free]) * noise)
print(np.concatenate([session.run(["action"], {{"observation": observations}})[0][:, free], sample]).tolist())
"""
    found = np.array(json.loads(run_without(absent, code)))
    policy, observations = load_policy(file), np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    free = [0, 2, 3]
    scale = np.abs(ASYMMETRIC.high - ASYMMETRIC.low)[free]
    assert np.abs((found[:3] - policy.compute_actions(observations)[:, free]) / scale).max() < 1e-6
    sampled = policy.compute_actions(observations, explore=True, rng=np.random.default_rng(1))[:, free]
    mapped = ASYMMETRIC.low[free] + (found[3:] + 1.0) * scale / 2.0
    assert np.abs((mapped - sampled) / scale).max() < 1e-6
    low = ASYMMETRIC.low[1]
    assert (policy.compute_actions(observations)[:, 1] == low).all()


def test_a_flipped_bit_and_a_cut_are_noticed_wherever_they_are(file: Path) -> None:
    content = file.read_bytes()
    places = range(0, len(content), 97)
    changed = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]
    for wrong in [*changed, *(content[:length] for length in range(0, len(content), 211))]:
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"policy\.onnx' is cut off, damaged, or no policy file"):
            load_policy(file)


def test_newer_and_foreign_models_are_refused(data: PolicyData, file: Path) -> None:
    newer = PolicyData({**data.metadata, "format": 2, "versions": {"rllib-calql": "9.0.0"}}, data.arrays)
    file.write_bytes(writing.WRITERS[".onnx"](newer))
    with pytest.raises(ValueError, match=r"format 2, written by rllib-calql 9\.0\.0"):
        load_policy(file)
    file.write_bytes(sealed_onnx(b"words"))
    with pytest.raises(ValueError, match="is no policy file that ONNX Runtime can use"):
        load_policy(file)
    identity = onnx.helper.make_node("Identity", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([identity], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    file.write_bytes(sealed_onnx(model.SerializeToString()))
    with pytest.raises(ValueError, match="its metadata are no JSON"):
        load_policy(file)
    text = json.dumps({"format": 1, **data.metadata})
    onnx.helper.set_model_props(model, {"rllib_calql": text})
    file.write_bytes(sealed_onnx(model.SerializeToString()))
    with pytest.raises(ValueError, match=r"cannot|can use: the model has the inputs \['x'\]"):
        load_policy(file)


def test_parts_that_have_the_same_path_are_refused() -> None:
    space = gym.spaces.Dict({"a/b": VECTOR, "a": gym.spaces.Dict({"b": VECTOR})})
    with pytest.raises(ValueError, match=r"several parts with the path 'a/b'; use keys without '/'"):
        writing.WRITERS[".onnx"](data_of(space))


def test_a_missing_package_is_named_with_its_command(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs the `onnx` package: pip install "rllib-calql\[export\]"'):
        checked_output(tmp_path / "other.onnx", force=False)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"policy\.onnx' needs ONNX Runtime: pip install onnxruntime"):
        load_policy(file)
