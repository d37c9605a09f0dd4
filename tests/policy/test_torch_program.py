"""Policies as programs of `torch.export`: torch alone runs them, and `load_policy` reads none of the program."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from policies import ASYMMETRIC, DICT, VECTOR, Case, trained
from test_files import NOT_NEEDED, Touching, run_without

from rllib_calql import load_policy
from rllib_calql.export.reading import PolicyData
from rllib_calql.export.writing import WRITERS
from rllib_calql.policy.file_format import packed, policy_within, sealed, with_policy


@pytest.fixture(scope="module")
def data() -> PolicyData:
    made = trained(Case(DICT, ASYMMETRIC), hiddens=(4,))
    made.runner.stop()
    return made.data


@pytest.fixture(scope="module")
def content(data: PolicyData) -> bytes:
    return WRITERS[".pt"](data)


@pytest.fixture
def file(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "policy.pt"
    path.write_bytes(content)
    return path


def replaced(content: bytes, ending: str, entry: bytes) -> bytes:
    """The archive with another entry, under a right checksum."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(stream, "w") as after:
        for info in before.infolist():
            after.writestr(info, entry if info.filename.endswith(ending) else before.read(info))
        after.comment = b" " * 71
    return sealed(stream.getvalue()[:-71])


def test_torch_alone_runs_a_program(tmp_path: Path) -> None:
    made, file = trained(Case(VECTOR, ASYMMETRIC), hiddens=(4,)), tmp_path / "policy.pt"
    made.runner.stop()
    file.write_bytes(WRITERS[".pt"](made.data))
    absent = ("ray", "gymnasium", "rllib_calql")  # torch itself asks which others there are.
    code = f"""
import torch
with open({str(file)!r}, "rb") as stream:
    program = torch.export.load(stream).module()
observations = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
print(program({{"observation": torch.from_numpy(observations)}})["action"].tolist())
"""
    found = np.array(json.loads(run_without(absent, code)))
    observations = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = load_policy(file).compute_actions(observations)
    scale = np.maximum(ASYMMETRIC.high - ASYMMETRIC.low, 1.0)
    assert (np.abs(found - expected) / scale).max() < 1e-6


def test_a_program_takes_any_number_of_observations_and_names_in_any_order(data: PolicyData, content: bytes) -> None:
    program = torch.export.load(io.BytesIO(content)).module()
    names = {
        "observation/action": torch.zeros(1, 2, dtype=torch.int32),  # `action` is an output.
        "ahead/0": torch.zeros(1, 2, dtype=torch.int64),
        "ahead/1": torch.zeros(1, 2, 2, dtype=torch.int8),
        "side": torch.ones(1, dtype=torch.int64),
        "where/table": torch.zeros(1, 2, 3, dtype=torch.float64),
        "where/x": torch.zeros(1, 5),
    }
    one = program(names)
    assert {name: tuple(part.shape) for name, part in one.items()} == dict.fromkeys(
        ("action", "mean", "log_std"), (1, 4)
    )
    many = program({name: part.repeat(7, *[1] * (part.dim() - 1)) for name, part in reversed(names.items())})
    torch.testing.assert_close(many["action"], one["action"].repeat(7, 1))


def test_a_policy_is_read_without_torch(file: Path, data: PolicyData) -> None:
    code = f"import rllib_calql\nprint(rllib_calql.load_policy({str(file)!r}).metadata['action_space']['kind'])"
    assert run_without(NOT_NEEDED, code).strip() == "Box"
    assert load_policy(file).metadata["action_space"] == data.metadata["action_space"]


def test_a_flipped_bit_and_a_cut_are_noticed_wherever_they_are(file: Path) -> None:
    content = file.read_bytes()
    changed = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(0, len(content), 701)]
    for wrong in [*changed, *(content[:length] for length in range(0, len(content), 997)), content + b"\0"]:
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"policy\.pt' (is cut off, damaged, or no|is no policy file|is empty)"):
            load_policy(file)


def test_a_crafted_program_runs_no_code(content: bytes, data: PolicyData, tmp_path: Path) -> None:
    trap, file = tmp_path / "trap", tmp_path / "policy.pt"
    pickled = pickle.dumps(Touching(trap))
    # A pickle where torch keeps one, and the program itself: read by `torch.export.load` only.
    for ending in ("sample_inputs/model.pt", "models/model.json"):
        file.write_bytes(replaced(content, ending, pickled))
        load_policy(file)
    npz = packed(data.metadata, data.arrays)
    newer = packed({**data.metadata, "format": 2}, data.arrays)
    twice = with_policy(with_policy(content, npz), npz)
    plain = io.BytesIO()
    torch.save({"weights": torch.zeros(2)}, plain)
    for wrong in (replaced(content, ".npz", pickled), twice, pickled, plain.getvalue(), sealed(plain.getvalue())):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"policy\.pt' is (no policy file|cut off)"):
            load_policy(file)
    file.write_bytes(replaced(content, ".npz", newer))
    with pytest.raises(ValueError, match="is a policy file of format 2"):
        load_policy(file)
    assert policy_within(content, "the file") == npz
    assert not trap.exists()
