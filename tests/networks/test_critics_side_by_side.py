"""Several critics in the kernel: alone, in groups, in parts on threads; gradients of parameters and of actions."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from plain_networks import is_by_kernel, plain_critic, random, randomise
from torch import Tensor

from rllib_calql.networks import critic_kernel, side_by_side
from rllib_calql.networks.actor_critic import EnsembleCritic

NUM_CRITICS, OBS_DIM, ACTION_DIM = 5, 3, 2
NUM_STATES, NUM_ACTIONS, WIDTH = 6, 4, 8
WORK = NUM_CRITICS * NUM_STATES * NUM_ACTIONS * WIDTH**2


@pytest.fixture(params=[NUM_CRITICS, 3, 1], ids=["alone", "in groups", "all at once"])
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Groups of critics that share products, where a critic's rows are one block."""
    monkeypatch.setattr(critic_kernel, "_LEAST_WORK_OF_THREADS", WORK + (request.param == 1))
    monkeypatch.setattr(critic_kernel, "_WORK_OF_A_GROUP", WORK // request.param)
    return int(request.param)


@pytest.fixture(params=[1, 2, 5], ids="{} threads".format)
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads of the kernel, however small the machine; a part for each state of each critic."""
    monkeypatch.setattr(side_by_side, "_num_cpus", lambda: 8)
    found = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(found)


def critic_of(activation: str = "tanh", *, layer_norm: bool = False) -> EnsembleCritic:
    critic = EnsembleCritic(
        NUM_CRITICS, OBS_DIM, ACTION_DIM, [WIDTH, 5], activation=activation, layer_norm=layer_norm
    ).double()
    randomise(critic)
    return critic


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Observations, actions, and weights of a sum of Q, half of which are zero."""
    weights = random(NUM_CRITICS, NUM_ACTIONS, NUM_STATES, seed=3)
    weights[torch.from_numpy(np.random.default_rng(4).random(weights.shape) < 0.5)] = 0.0
    return random(NUM_STATES, OBS_DIM, seed=1), random(NUM_ACTIONS, NUM_STATES, ACTION_DIM, seed=2), weights


@pytest.mark.usefixtures("group", "_threads")
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_values_equal_a_plain_mlp(layer_norm: bool, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_BLOCK_BYTES", "_NORM_BLOCK_BYTES"):
        monkeypatch.setattr(critic_kernel, name, block_bytes)
    critic, (obs, actions, _) = critic_of("elu", layer_norm=layer_norm), inputs()
    q = critic(obs, actions)
    assert is_by_kernel(q)
    with torch.no_grad():
        torch.testing.assert_close(critic(obs, actions), q.detach(), rtol=0, atol=0)
    for c in range(NUM_CRITICS):
        expected = plain_critic(critic, c, obs.numpy(), actions.numpy(), "elu")
        np.testing.assert_allclose(q[c].detach().numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("group", "_threads")
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 2**20])
def test_gradients_equal_those_of_autograd(
    frozen: bool, layer_norm: bool, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_BLOCK_BYTES", "_NORM_BLOCK_BYTES"):
        monkeypatch.setattr(critic_kernel, name, block_bytes)
    critic, (obs, actions, weights) = critic_of(layer_norm=layer_norm), inputs()
    obs.requires_grad_()
    actions.requires_grad_()
    wanted = [obs, actions, *([] if frozen else critic.parameters())]
    found = []
    for activation in ("tanh", None):
        critic._kernel_activation = activation
        q = critic(obs, actions, frozen=frozen)
        assert is_by_kernel(q) == (activation is not None)
        found.append(torch.autograd.grad((q * weights).sum(), wanted))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wanted", ["actions", "parameters", "both"])
def test_gradients_equal_finite_differences(wanted: str) -> None:
    critic, (obs, actions, weights) = critic_of(), inputs()
    parameters = list(critic.parameters())
    for parameter in parameters:
        parameter.requires_grad_(wanted != "actions")
    actions.requires_grad_(wanted != "parameters")

    def q(actions: Tensor, *_: Tensor) -> Tensor:
        return critic(obs, actions) * weights

    assert torch.autograd.gradcheck(q, (actions, *parameters), eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


def results_of(num_threads: int, *, layer_norm: bool) -> list[Tensor]:
    """Q and gradients in single precision, of sizes that are computed in parts, with torch at so many threads."""
    torch.manual_seed(0)
    critic = EnsembleCritic(2, 8, 4, [64, 64], layer_norm=layer_norm)
    obs, actions, weights = torch.randn(128, 8), torch.rand(31, 128, 4), torch.randn(2, 31, 128)
    weights[:, 5:20] = 0.0
    found = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with side_by_side.one_thread_an_operation():
            q = critic(obs, actions)
            return [q.detach(), *torch.autograd.grad((q * weights).sum(), list(critic.parameters()))]
    finally:
        torch.set_num_threads(found)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_any_number_of_threads_gives_the_same_bits(layer_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_num_cpus", lambda: 8)
    monkeypatch.setattr(critic_kernel, "_BLOCK_BYTES", 2**16)
    monkeypatch.setattr(critic_kernel, "_NORM_BLOCK_BYTES", 2**16)
    expected = results_of(1, layer_norm=layer_norm)
    for num_threads in (2, 3, 8, 2):
        for one, other in zip(results_of(num_threads, layer_norm=layer_norm), expected, strict=True):
            assert torch.equal(one, other)


def test_parts_cover_every_row_of_every_critic_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for num_groups, blocks in itertools.product((1, 2, 3, 4, 5, 100), (1, 300, 2**20)):
        monkeypatch.setattr(critic_kernel, "_LEAST_WORK_OF_THREADS", WORK + (num_groups == 1))
        monkeypatch.setattr(critic_kernel, "_WORK_OF_A_GROUP", WORK // num_groups)
        monkeypatch.setattr(critic_kernel, "_BLOCK_BYTES", blocks)
        how = critic_kernel._How(torch.float32, critic_kernel.IN_PLACE_ACTIVATIONS["relu"], 0, keeps=True)
        parts = critic_kernel._parts(NUM_CRITICS, NUM_STATES, NUM_ACTIONS, WIDTH, how)
        covered = np.zeros((NUM_CRITICS, NUM_STATES), int)
        for part in parts:
            for first, end in part.blocks:
                covered[part.critic, first:end] += 1
        assert (covered == 1).all()
        assert len({(str(part.critic), part.run) for part in parts}) == len(parts)  # Each has sums of its own.
        if blocks == 2**20:
            assert len(parts) == min(num_groups, NUM_CRITICS)


# --- Side by side ----------------------------------------------------------------------------------------------------


def waiting_for(others: threading.Barrier, seen: list[tuple[int, int, bool]]) -> Callable[[], None]:
    def part() -> None:
        others.wait(timeout=30.0)
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))

    return part


def test_parts_run_on_threads_of_their_own_each_with_one_of_openmp_and_without_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(side_by_side, "_num_cpus", lambda: 8)
    found = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen: list[tuple[int, int, bool]] = []
        barrier = threading.Barrier(3)  # Passed only by three parts at once.
        side_by_side.compute([waiting_for(barrier, seen) for _ in range(6)])
        assert len({ident for ident, _, _ in seen}) == 3
        assert threading.get_ident() in {ident for ident, _, _ in seen}
        assert {(threads, grad) for _, threads, grad in seen} == {(1, False)}
        assert torch.get_num_threads() == 3
        assert torch.is_grad_enabled()
        started = threading.Thread(target=lambda: seen.append((0, torch.get_num_threads(), True)))
        started.start()
        started.join(timeout=30.0)
        assert seen[-1] == (0, 3, True)  # A new thread of the user's gets torch's number, not the helpers'.
    finally:
        torch.set_num_threads(found)


def test_torch_gets_its_threads_back_also_after_an_error() -> None:
    found = torch.get_num_threads()
    seen: list[int] = []

    def fail() -> None:
        with side_by_side.one_thread_an_operation():
            seen.append(torch.get_num_threads())
            with side_by_side.one_thread_an_operation():
                pass
            seen.append(torch.get_num_threads())  # The outer one decides.
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert seen == [1, 1]
    assert torch.get_num_threads() == found


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("number", [0, 5])
def test_an_error_in_a_part_is_raised_when_no_part_runs_any_more(number: int) -> None:
    running = threading.Semaphore(0)

    def part(index: int) -> None:
        if index == number:
            raise ArithmeticError(f"part {index}")
        running.release()

    with pytest.raises(ArithmeticError, match=f"part {number}"):
        side_by_side.compute([lambda index=index: part(index) for index in range(6)])
    ended = running._value
    side_by_side.compute([lambda: None] * 6)  # The threads are still there.
    assert running._value == ended


def number_in_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join(timeout=30.0)
    return seen[0]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("_threads", [3], indirect=True)
def test_an_update_that_begins_and_ends_after_another_takes_no_threads_from_later_ones() -> None:
    entered, left, seen = threading.Event(), threading.Event(), []

    def update() -> None:
        with side_by_side.one_thread_an_operation():
            seen.append(torch.get_num_threads())
            entered.set()
            left.wait(timeout=30.0)

    other = threading.Thread(target=update)
    with side_by_side.one_thread_an_operation():
        other.start()  # Its first work for torch falls into this thread's.
        assert entered.wait(timeout=30.0)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    left.set()
    other.join(timeout=30.0)
    assert seen[0] == 1
    assert number_in_a_new_thread() == 3


AFTER_THE_MAIN_THREAD = """
import threading, torch
from rllib_calql.networks import side_by_side
side_by_side._num_cpus = lambda: 8
torch.set_num_threads(3)

def late():
    threading.main_thread().join()
    done = []
    side_by_side.compute([lambda index=index: done.append(index) for index in range(6)])
    print(sorted(done), torch.get_num_threads())

threading.Thread(target=late).start()
"""


def test_a_thread_computes_alone_when_the_main_thread_has_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER_THE_MAIN_THREAD], capture_output=True, text=True, timeout=120.0, check=False
    )
    assert done.stdout.strip() == "[0, 1, 2, 3, 4, 5] 3", done.stderr
