"""What `precision` does to the products of an update, and that it is told where it brings nothing."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from small_learners import make_learner

from rllib_calql.networks.precision import check_precision, float32_products, product_dtype

MODULE = "default_policy"


@pytest.fixture(autouse=True)
def _modern_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic is the same on every processor, and networks here are tiny."""
    processor(monkeypatch, "AVX512", has_units=True, has_avx512=True)


def rows(num_rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "obs": rng.normal(size=(num_rows, 3)).astype(np.float32),
        "new_obs": rng.normal(size=(num_rows, 3)).astype(np.float32),
        "actions": rng.uniform(-0.9, 0.9, size=(num_rows, 2)).astype(np.float32),
        "rewards": rng.normal(size=num_rows).astype(np.float32),
        "terminateds": np.zeros(num_rows, np.float32),
        "returns_to_go": rng.normal(size=num_rows).astype(np.float32),
        "is_offline": np.ones(num_rows, np.float32),
    }


def update(learner: Any, num_updates: int) -> dict[str, np.ndarray]:
    """Makes updates on one batch of 32 rows each, and returns all parameters."""
    from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

    num_rows = 32 * num_updates
    batch = MultiAgentBatch({MODULE: SampleBatch(rows(num_rows))}, num_rows)
    learner.update(batch=batch, minibatch_size=32)
    return {name: tensor.numpy().copy() for name, tensor in learner._calql_module.state_dict().items()}


def test_fp32_and_medium_keep_all_types_and_bf16_halves_hidden_layers() -> None:
    assert [product_dtype(name) for name in ("fp32", "medium", "bf16")] == [None, None, torch.bfloat16]


@pytest.mark.parametrize(("name", "inside"), [("fp32", "highest"), ("medium", "medium"), ("bf16", "highest")])
def test_torchs_own_setting_holds_inside_an_update_only(
    monkeypatch: pytest.MonkeyPatch, name: str, inside: str
) -> None:
    learner = make_learner(precision=name)
    seen = []
    module = learner._calql_module
    original = module._forward_train

    def spy(batch: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return original(batch)

    monkeypatch.setattr(module, "_forward_train", spy)
    torch.set_float32_matmul_precision("high")
    try:
        update(learner, 2)
        assert seen == [inside, inside]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_torchs_own_setting_is_restored_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), float32_products("medium"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


def test_bf16_reaches_policy_critics_and_targets_and_trains_to_nearly_the_same_parameters() -> None:
    parameters = {}
    for name in ("fp32", "bf16"):
        learner = make_learner(precision=name, hiddens=(32, 32), critic_lr=1e-3, actor_lr=1e-3)
        module = learner._calql_module
        assert {network.product_dtype for network in (module.policy, module.critic, module.target_critic)} == {
            product_dtype(name)
        }
        before = {key: tensor.numpy().copy() for key, tensor in module.state_dict().items()}
        parameters[name] = update(learner, 20)
    for key, exact in parameters["fp32"].items():
        rounded = parameters["bf16"][key]
        assert rounded.dtype == np.float32
        if key.startswith("obs_"):
            continue
        moved = np.linalg.norm(exact - before[key])
        assert not np.array_equal(exact, rounded)
        assert np.linalg.norm(exact - rounded) < 0.2 * moved  # Adam makes much of the sign of small gradients.


def test_checkpoints_move_between_precisions() -> None:
    one, other = make_learner(precision="bf16"), make_learner(precision="fp32", seed=1)
    update(one, 3)
    other.set_state(one.get_state())
    for (name, a), (_, b) in zip(
        one._calql_module.state_dict().items(), other._calql_module.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert other._calql_module.critic.product_dtype is None


def processor(monkeypatch: pytest.MonkeyPatch, capability: str, *, has_units: bool, has_avx512: bool) -> None:
    """Pretends to run on another one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_avx512)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "has_units", "has_avx512", "medium", "bf16"),
    [
        ("AVX512", True, True, None, None),
        ("AVX512", False, True, "products remain in float32", "updates are slower than in float32"),
        ("SVE256", False, True, None, None),
        ("AVX2", False, False, "products remain in float32", ValueError),
    ],
)
def test_processors_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capability: str, has_units: bool, has_avx512: bool, medium: Any, bf16: Any
) -> None:
    processor(monkeypatch, capability, has_units=has_units, has_avx512=has_avx512)
    assert check_precision("fp32", CPU) is None
    for name, expected in (("medium", medium), ("bf16", bf16)):
        if expected is ValueError:
            with pytest.raises(ValueError, match=r'50 times slower.*Set precision="fp32"'):
                check_precision(name, CPU)
        elif expected is None:
            assert check_precision(name, CPU) is None
        else:
            assert expected in (check_precision(name, CPU) or "")


def test_gpus_before_ampere_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "Old GPU has no units" in (check_precision("bf16", CUDA) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert check_precision("bf16", CUDA) is None


@pytest.mark.parametrize("name", ["fp32", "medium"])
def test_a_learner_says_once_that_nothing_is_gained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    processor(monkeypatch, "AVX2", has_units=False, has_avx512=False)
    with caplog.at_level(logging.WARNING, logger="rllib_calql"):
        make_learner(precision=name)
    told = [record.getMessage() for record in caplog.records if "`precision`" in record.getMessage()]
    assert len(told) == (name == "medium")
    assert all("products remain in float32" in message for message in told)


def test_a_learner_refuses_what_would_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, "AVX2", has_units=False, has_avx512=False)
    with pytest.raises(ValueError, match="50 times slower"):
        make_learner(precision="bf16")
