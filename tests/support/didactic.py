"""A case small enough to read: two states, two actions each, all values exact. Used by its test; draws the plot.

    s0 --go--> s1 --good--> end, reward 1          Data: go, good. Their return is 1, so V(s0) = V(s1) = 1.
     |          `---bad---> end, reward 0          Never in the data: detour, bad.
     `--detour-> end, reward 0.5

The actor takes the data's action with 0.9 and the other one with 0.1, as an actor with entropy does. The critic is a
table; it minimises the TD error and the conservative term of Nakamoto et al. 2023, equation 5.1, with expectations in
place of samples:

    (Q(s, a) - y)^2 + w (E_pi max(Q(s, .), V(s)) - Q(s, a)),    y = r + E_pi Q(s', .)

An untrained critic knows nothing of actions outside the data; here it over-estimates all by far.

    python tests/support/didactic.py --plot didactic.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rllib_calql.learning.losses import calibrate

GO, DETOUR = GOOD, BAD = 0, 1  # At s0, and at s1. 0 is the data's action.
REWARDS = torch.tensor([[0.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
EXPLORATION = 0.1
WEIGHT = 0.2
RATE = 0.5
INITIAL = 3.985
OFFLINE_UPDATES, ONLINE_UPDATES = 4_000, 30
_CUT = -6.0  # Of the plot.


@dataclass(frozen=True)
class Run:
    """One critic's life.

    Attributes:
        offline: [n + 1, 2, 2] Q of state and action after each update of pre-training.
        online: [m + 1, 2, 2] The same once the agent has tried the detour; the first is the last of `offline`.
    """

    offline: Tensor
    online: Tensor


def policy_of(q: Tensor, *, greedy: bool) -> Tensor:
    """Probabilities [2, 2]: most on the data's action, or with `greedy` on the action of the larger Q."""
    best = q.argmax(dim=1) if greedy else torch.zeros(2, dtype=torch.int64)
    policy = torch.full((2, 2), EXPLORATION, dtype=torch.float64)
    policy[torch.arange(2), best] = 1.0 - EXPLORATION
    return policy


def conservative(q: Tensor, policy: Tensor, state: int, action: int, reference: float) -> Tensor:
    """E_pi max(Q(s, .), V) - Q(s, a)."""
    bounded = calibrate(q[state].view(1, 2, 1), torch.tensor([reference], dtype=torch.float64)).view(2)
    return (policy[state] * bounded).sum() - q[state, action]


def update(q: Tensor, rows: list[tuple[int, int, float]], policy: Tensor) -> Tensor:
    """One gradient step on transitions (state, action, reference value), the mean over those of each state."""
    q = q.clone().requires_grad_(True)
    loss = torch.zeros((), dtype=torch.float64)
    for state, action, reference in rows:
        target = REWARDS[state, action]
        if (state, action) == (0, GO):
            target = target + (policy[1] * q[1]).sum().detach()
        share = sum(other == state for other, _, _ in rows)
        term = (q[state, action] - target) ** 2 + WEIGHT * conservative(q, policy, state, action, reference)
        loss = loss + term / share
    (gradient,) = torch.autograd.grad(loss, q)
    return (q - RATE * gradient).detach()


@cache
def run(reference: float) -> Run:
    """Pre-trains on the data, then meets the detour for the first time.

    Args:
        reference: V of both states: 1 is the return of the data, -inf is plain CQL.
    """
    q = torch.full((2, 2), INITIAL, dtype=torch.float64)
    offline = [q]
    for _ in range(OFFLINE_UPDATES):
        q = update(q, [(0, GO, reference), (1, GOOD, reference)], policy_of(q, greedy=False))
        offline.append(q)
    online = [q]
    return_of_detour = -torch.inf if reference == -torch.inf else 0.5
    for _ in range(ONLINE_UPDATES):
        rows = [(0, GO, reference), (1, GOOD, reference), (0, DETOUR, return_of_detour)]
        q = update(q, rows, policy_of(q, greedy=True))
        online.append(q)
    return Run(torch.stack(offline), torch.stack(online))


def greedy_return(q: Tensor) -> float:
    """Return from s0 of the policy that takes the larger Q."""
    if q[0].argmax() == DETOUR:
        return 0.5
    return float(REWARDS[1, q[1].argmax()])


CASES = {"CQL": -torch.inf, "Cal-QL, V = 1 (the data's return)": 1.0, "Cal-QL, V = 3 (too high)": 3.0}


def plot(file: Path) -> None:
    """Q of all actions through both phases, and the return of the greedy policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.0), dpi=110, layout="constrained")
    panels = figure.subplots(3, 3, gridspec_kw={"height_ratios": [2, 2, 1]}, sharey="row")
    lines = (
        (0, GO, "#0072B2", "solid", "go (in the data)"),
        (0, DETOUR, "#D55E00", "dashed", "detour (new)"),
        (1, GOOD, "#0072B2", "solid", "good (in the data)"),
        (1, BAD, "#D55E00", "dashed", "bad (new)"),
    )
    for column, (name, reference) in zip(panels.T, CASES.items(), strict=True):
        one = run(reference)
        shown = torch.cat([one.offline[:: OFFLINE_UPDATES // 40][:-1], one.online])
        times = [*range(-40, 0), *range(ONLINE_UPDATES + 1)]
        for state, action, colour, style, label in lines:
            q = shown[:, state, action].clamp(min=_CUT)
            column[state].plot(times, q, color=colour, linestyle=style, label=f"Q(s{state}, {label})")
        for state in (0, 1):
            column[state].axhline(1.0, color="black", linewidth=0.8, linestyle="dotted", label="best return")
            column[state].legend(fontsize=7, loc="upper right")
            column[state].set_ylabel(f"Q at s{state} (cut at {_CUT:.0f})")
        column[2].plot(times, [greedy_return(q) for q in shown], color="black", drawstyle="steps-post")
        column[2].set_ylabel("greedy return")
        column[2].set_xlabel("before 0: 100 offline updates a unit; after: 1 online one", fontsize=8)
        column[0].set_title(name, fontsize=10)
        for axes in column:
            axes.axvline(0, color="grey", linewidth=0.8)
            axes.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, required=True, help="PNG file to write; needs matplotlib.")
    plot(parser.parse_args().plot)
