"""Policy files: damage, newer versions, crafted ones, and that NumPy alone runs them."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from policies import ACTIONS, DICT, IMAGE, SMALL_IMAGES, VECTOR, Case, trained

import rllib_calql
from rllib_calql import load_policy
from rllib_calql.export.reading import PolicyData
from rllib_calql.policy.file_format import packed, sealed
from rllib_calql.policy.policy import Policy


@pytest.fixture(scope="module")
def data() -> PolicyData:
    made = trained(Case(VECTOR, settings={"normalize_observations": True}), hiddens=(4, 4))
    made.runner.stop()
    return made.data


@pytest.fixture
def file(data: PolicyData, tmp_path: Path) -> Path:
    path = tmp_path / "policy.npz"
    path.write_bytes(packed(data.metadata, data.arrays))
    return path


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed_wherever_it_is(file: Path) -> None:
    content = file.read_bytes()
    for place in [*range(0, len(content), 13), *range(len(content) - 100, len(content))]:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"policy\.npz' (is cut off, damaged, or no|is no policy file)"):
            load_policy(file)
    file.write_bytes(content)
    load_policy(file)


def test_a_file_that_is_cut_off_or_goes_on_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    for length in [*range(1, len(content), 101), len(content) - 1]:
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"policy\.npz' (is cut off, damaged, or no|is no policy file)"):
            load_policy(file)
    file.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="is cut off, damaged, or no policy file"):
        load_policy(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        load_policy(file)


def test_a_newer_version_is_refused_with_the_remedy(data: PolicyData, file: Path) -> None:
    newer = {**data.metadata, "format": 2, "versions": {"rllib-calql": "9.0.0"}}
    file.write_bytes(packed(newer, data.arrays))
    with pytest.raises(ValueError, match=r"format 2, written by rllib-calql 9\.0\.0.*pip install -U rllib-calql"):
        load_policy(file)


def test_the_same_policy_gives_the_same_bytes(data: PolicyData, file: Path) -> None:
    assert packed(data.metadata, data.arrays) == file.read_bytes()


def test_numpy_lists_what_is_in_a_file(data: PolicyData, file: Path) -> None:
    with np.load(file, allow_pickle=False) as stored:
        assert set(stored.files) == {"metadata", *data.arrays}
        assert json.loads(stored["metadata"].tobytes())["format"] == 1
        np.testing.assert_array_equal(stored["head.weight"], data.arrays["head.weight"])


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere.npz", FileNotFoundError, r"There is no policy file .*nowhere\.npz'; `rllib export CHECKPOINT"),
        ("policy.pkl", ValueError, r"policy\.pkl' must end in \.npz"),
        (".", ValueError, "is a folder; if it is a checkpoint, `rllib export"),
        ("words.npz", ValueError, r"words\.npz' is no policy file; `rllib export"),
        (
            "foreign.npz",
            ValueError,
            r"foreign\.npz' is cut off, damaged, or no policy file: it does not end with the checksum",
        ),
    ],
)
def test_what_is_no_policy_file_is_refused(path: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "words.npz").write_text("a policy")
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    with pytest.raises(error, match=message):
        load_policy(tmp_path / path)


@pytest.mark.parametrize("path", [None, 3, b"PK"])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(TypeError, match="`path` must be the path of a policy file, got "):
        load_policy(path)


# --- Crafted files ----------------------------------------------------------------------------------------------------


class Touching:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def crafted(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive with a right checksum and any entries."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.comment = b" " * 71
    return sealed(stream.getvalue()[:-71])


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def header_of(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_a_crafted_file_runs_no_code_and_takes_no_memory(data: PolicyData, tmp_path: Path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "policy.npz"
    text = npy(np.frombuffer(json.dumps({"format": 1, **data.metadata}).encode(), np.uint8))
    objects = np.array([Touching(trap)], dtype=object)
    contents = [
        pickle.dumps(Touching(trap)),
        crafted({"metadata.npy": npy(objects)}),
        crafted({"metadata.npy": text, "head.weight.npy": npy(objects)}),
        crafted({"metadata.npy": text, "head.weight.npy": pickle.dumps(Touching(trap))}),
        crafted({"metadata.npy": text, "code.py": b"import os"}),
        crafted({"metadata.npy": text, "head.weight.npy": header_of((2**40, 2**20))}),
        crafted({"metadata.npy": text, "head.weight.npy": header_of((-1,))}),
        crafted({"metadata.npy": text, "head.weight.npy": npy(np.zeros(10**7, np.float32))}, zipfile.ZIP_DEFLATED),
        crafted({"metadata.npy": text}),
        crafted({"metadata.npy": npy(np.frombuffer(b"[" * 100_000, np.uint8))}),
        crafted({}),
    ]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"policy\.npz' (is no policy file|is cut off)"):
            load_policy(file)
    assert not trap.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("network"),
        lambda m: m.update(observation_space={"kind": "Box", "shape": [4], "dtype": "float32"}),
        lambda m: m.update(observation_space={"kind": "Box", "shape": "x", "dtype": "object"}),
        lambda m: m.update(observation_space={"kind": "Graph"}),
        lambda m: m.update(action_space={"kind": "Discrete", "n": 3}),
        lambda m: m["action_space"].update(low=[float("-inf")] * 3),
        lambda m: m["network"].update(activation="sin"),
        lambda m: m["network"].update(hiddens=[4, 5]),
        lambda m: m["network"].update(hiddens=None),
        lambda m: m["network"].update(image={"shape": [4, 4, 1], "convolutions": [], "features": 3}),
    ],
)
def test_metadata_that_do_not_fit_the_arrays_are_refused(
    change: Callable[[Any], None], data: PolicyData, tmp_path: Path
) -> None:
    metadata = json.loads(json.dumps({"format": 1, **data.metadata}))
    change(metadata)
    entries = {"metadata.npy": npy(np.frombuffer(json.dumps(metadata).encode(), np.uint8))}
    entries |= {f"{name}.npy": npy(array) for name, array in data.arrays.items()}
    (tmp_path / "policy.npz").write_bytes(crafted(entries))
    with pytest.raises(ValueError, match=r"policy\.npz' is no policy file that this version can use: "):
        load_policy(tmp_path / "policy.npz")


# --- Wrong observations -----------------------------------------------------------------------------------------------


def policy_for(space: gym.Space[Any], **networks: Any) -> Policy:
    from rllib_calql.policy.loading import numpy_policy

    made = trained(Case(space, networks=networks), hiddens=(4,))
    made.runner.stop()
    return numpy_policy(made.data.metadata, made.data.arrays)


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    image = policy_for(IMAGE, **SMALL_IMAGES)
    normed = policy_for(VECTOR, layer_norm=True)
    return {"vector": policy_for(VECTOR), "dict": policy_for(DICT), "image": image, "normed": normed}


def valid() -> dict[str, Any]:
    DICT.seed(0)
    return dict(DICT.sample())


def with_nan(shape: tuple[int, ...], place: Any) -> np.ndarray:
    array = np.zeros(shape, np.float32)
    array[place] = np.nan
    return array


@pytest.mark.parametrize(
    ("kind", "observation", "message"),
    [
        ("vector", np.zeros(4), r"must have the shape \(5,\) for Box\(\(5,\), float32\), got \(4,\)"),
        ("vector", np.zeros((1, 5), np.float32), r"must have the shape \(5,\).*got \(1, 5\)"),
        ("vector", with_nan((5,), 3), r"The observation holds nan at 3; all numbers must be finite"),
        ("vector", np.full(5, np.inf), r"holds inf at 0"),
        ("vector", np.full(5, 1e300), r"holds inf at 0"),
        ("vector", np.ma.masked_array(np.zeros(5), [0, 0, 1, 0, 0]), r"The observation has masked numbers; fill them"),
        ("vector", ["a"] * 5, r"must hold numbers for Box.*got values of type <U1"),
        ("vector", None, r"must hold numbers.*got values of type object"),
        ("vector", np.zeros(5, complex), r"must hold numbers.*complex128"),
        ("vector", {"a": np.zeros(5)}, r"must be one array for Box.*got a dict"),
        ("vector", [[1.0], [1.0, 2.0]], r"must be one array for Box.*got list"),
        ("image", np.zeros((14, 12, 3)), r"must hold integers for Box.*uint8\), got values of type float64"),
        ("image", np.full((14, 12, 3), 256), r"holds 256, which is no value of Box"),
        ("image", np.zeros((3, 14, 12), np.uint8), r"must have the shape \(14, 12, 3\).*got \(3, 14, 12\)"),
        ("dict", {**valid(), "side": 2}, r"part 'side' holds 2, which is no value of Discrete\(3, start=-1\)"),
        ("dict", {**valid(), "side": 0.5}, r"part 'side' must hold integers for Discrete.*float64"),
        (
            "dict",
            {**valid(), "spare": 1},
            r"keys \['action', 'ahead', 'side', 'where'\]; it has the unknown \['spare'\]",
        ),
        ("dict", {"side": 0}, r"it lacks \['action', 'ahead', 'where'\]"),
        ("dict", np.zeros(5), r"must be a dict with the keys .*, got an array of shape \(5,\)"),
        ("dict", {**valid(), "where": {"x": np.zeros(5)}}, r"part 'where' must be a dict .* lacks \['table'\]"),
        (
            "dict",
            {**valid(), "ahead": (np.array([1, 0]),)},
            r"part 'ahead' must be a tuple of 2 parts, got a tuple of 1",
        ),
        (
            "dict",
            {**valid(), "ahead": (np.array([3, 0]), np.zeros((2, 2), int))},
            r"part 'ahead/0' holds 3, which is no value of MultiDiscrete\(n=\[2, 3\], start=\[1, 0\]\)",
        ),
        ("dict", {**valid(), "ahead": (np.array([1, 0]), np.full((2, 2), 2))}, r"part 'ahead/1' holds 2"),
        (
            "dict",
            {**valid(), "where": {"x": np.zeros(5), "table": with_nan((2, 3), (1, 2))}},
            r"part 'where/table' holds nan at \(1, 2\)",
        ),
    ],
)
def test_a_wrong_observation_is_refused_by_what_is_expected_and_what_came(
    kind: str, observation: Any, message: str, policies: dict[str, Policy]
) -> None:
    with pytest.raises(ValueError, match=message):
        policies[kind](observation)


def test_wrong_batches_and_generators_are_refused(policies: dict[str, Policy]) -> None:
    with pytest.raises(ValueError, match=r"must have the shape \(B, 5\).*got \(5,\)"):
        policies["vector"].compute_actions(np.zeros(5, np.float32))
    several = {**valid(), "side": np.zeros(2, int), "action": np.zeros((3, 2), int)}
    several["where"] = {"x": np.zeros((2, 5)), "table": np.zeros((2, 2, 3))}
    several["ahead"] = (np.array([[1, 0]] * 2), np.zeros((2, 2, 2), int))
    with pytest.raises(ValueError, match=r"as many observations each, got \{'action': 3, 'ahead/0': 2"):
        policies["dict"].compute_actions(several)
    with pytest.raises(ValueError, match=r"holds nan at 3 in row 1 of the batch; all numbers must be finite"):
        policies["vector"].compute_actions(with_nan((2, 5), (1, 3)))
    with pytest.raises(TypeError, match=r"`rng` must be a NumPy generator.*got int"):
        policies["vector"](np.zeros(5), explore=True, rng=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`rng` must be a NumPy generator.*got int"):
        policies["vector"].compute_random_action(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("explore", ["no", None, 2, 0.0, np.random.default_rng(0), np.array([True, False])])
def test_explore_is_true_or_false(explore: Any, policies: dict[str, Policy]) -> None:
    with pytest.raises(TypeError, match="`explore` must be True or False, got "):
        policies["vector"](np.zeros(5), explore)


def test_a_batch_of_no_observations_has_no_actions(policies: dict[str, Policy]) -> None:
    def rows(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: rows(inner) for key, inner in part.items()}
        return tuple(map(rows, part)) if isinstance(part, tuple) else np.asarray(part)[None][:0]

    batches = {"vector": np.zeros((0, 5)), "dict": rows(valid()), "image": np.zeros((0, 14, 12, 3), np.uint8)}
    for kind, batch in batches.items():
        for explore in (False, True):
            assert policies[kind].compute_actions(batch, explore).shape == (0, 3)


def test_large_numbers_give_an_action_or_an_error_but_never_nan(policies: dict[str, Policy]) -> None:
    observation = np.array([1.0, -1.0, 0.0, 0.0, 1.0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(policies["vector"](1e30 * observation)).all()
    for explore in (False, True):
        with (
            pytest.raises(ValueError, match=r"The network overflows: .* too large for it\. Check their units"),
            np.errstate(over="ignore", invalid="ignore"),
        ):
            policies["normed"](3e38 * observation, explore)


@pytest.mark.parametrize(
    "observation", [[0, 0, 0, 0, 0], np.zeros(5, np.int64), np.zeros(5, np.float64), np.zeros(10, np.float32)[::2]]
)
def test_numbers_of_other_types_are_converted_as_environments_do(observation: Any, policies: dict[str, Policy]) -> None:
    expected = policies["vector"](np.zeros(5, np.float32))
    np.testing.assert_array_equal(policies["vector"](observation), expected)


def test_metadata_are_a_copy(policies: dict[str, Policy]) -> None:
    before = policies["vector"].metadata
    policies["vector"].metadata["action_space"]["low"][0] = 9.0
    assert policies["vector"].metadata == before
    assert before["action_space"] == {
        "kind": "Box", "shape": [3], "dtype": "float32", "low": [-1.0] * 3, "high": [1.0] * 3
    }  # fmt: skip


# --- NumPy alone ------------------------------------------------------------------------------------------------------

ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import numpy as np
{code}
"""
NOT_NEEDED = (
    *("ray", "torch", "gymnasium", "scipy", "pyarrow", "yaml", "click", "rich", "tree", "pandas"),
    *("onnx", "onnxruntime", "matplotlib"),
)


def run_without(absent: tuple[str, ...], code: str) -> str:
    """What code prints in an interpreter that cannot import these packages."""
    root = str(Path(rllib_calql.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(absent=absent, code=f"sys.path.insert(0, {root!r})\n{code}")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path.home(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numpy_alone_runs_a_policy_file(file: Path) -> None:
    observations = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    code = f"""
import rllib_calql
policy = rllib_calql.load_policy({str(file)!r})
observations = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
greedy = [policy(observation) for observation in observations]
sampled = policy.compute_actions(observations, explore=True, rng=np.random.default_rng(1))
print(np.concatenate([greedy, sampled]).tolist(), "ray" in sys.modules)
"""
    *numbers, has_ray = run_without(NOT_NEEDED, code).rsplit(" ", 1)
    policy = load_policy(file)
    sampled = policy.compute_actions(observations, explore=True, rng=np.random.default_rng(1))
    expected = np.concatenate([[policy(observation) for observation in observations], sampled])
    np.testing.assert_allclose(json.loads(numbers[0]), expected, rtol=1e-6)
    assert has_ray.strip() == "False"
    assert ACTIONS.contains(expected[0])
