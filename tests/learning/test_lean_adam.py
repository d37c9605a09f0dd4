"""Adam with little around its kernel gives the bits of torch's own, and keeps its state and its hooks."""

from __future__ import annotations

from typing import Any

import torch

from rllib_calql.learning.optimisers import LeanAdam


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (5,), (1,))]


def step(optimizer: Any, params: list[torch.nn.Parameter], number: int) -> None:
    """One step; some are skipped, and in some a parameter or all of them have no gradient."""
    generator = torch.Generator().manual_seed(number)
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator)
        param.grad = None if number in (0, 5) or (number % 3 == 1 and index == 1) else gradient
    optimizer.found_inf = torch.tensor(float(number % 4 == 2))
    optimizer.step()


def test_every_kind_of_step_is_that_of_torch_bit_for_bit_also_with_a_state_that_was_set() -> None:
    ours, theirs = parameters(), parameters()
    lean, plain = LeanAdam(ours), torch.optim.Adam(theirs, fused=True)
    for number in range(20):
        for optimizer, params in ((lean, ours), (plain, theirs)):
            step(optimizer, params, number)
            if number == 9:
                optimizer.param_groups[0]["lr"] = 0.02
            if number == 12:
                state = optimizer.state_dict()
                step(optimizer, params, 100)
                optimizer.load_state_dict(state)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        mine, wanted = lean.state_dict()["state"], plain.state_dict()["state"]
        assert mine.keys() == wanted.keys()
        for index, buffers in wanted.items():
            assert mine[index].keys() == buffers.keys()
            assert all(torch.equal(mine[index][name], value) for name, value in buffers.items())


def test_hooks_are_called_around_a_step() -> None:
    params = parameters()
    optimizer, called = LeanAdam(params), []
    optimizer.register_step_pre_hook(lambda *_: called.append(("before", params[0][0, 0].item())))
    optimizer.register_step_post_hook(lambda *_: called.append(("after", params[0][0, 0].item())))
    step(optimizer, params, 3)
    assert [name for name, _ in called] == ["before", "after"]
    assert called[0][1] != called[1][1]
