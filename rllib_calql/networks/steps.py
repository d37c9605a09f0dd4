"""What one gradient step asks of the networks, the random numbers that it draws, and what they answer.

Axes: `C` critics, `K` critics in the target's minimum, `N` actions per source, `B` batch, `A` action dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Columns of a batch with targets of several steps.
BOOTSTRAP_OBS = "bootstrap_obs"  # (B, n), the observation that the target bootstraps from
BOOTSTRAP_DISCOUNT = "bootstrap_discounts"  # (B,), gamma to the power of the steps until then

# Keys of `forward_train`'s output, beside those of `Columns`. What a step does not ask for is left out.
Q_DATA = "q_data"  # (C, B)
Q_UNIFORM = "q_uniform"  # (C, N, B)
Q_CURRENT = "q_current"  # (C, N, B)
Q_NEXT = "q_next"  # (C, N, B), next-state proposals judged at s
LOG_PROB_CURRENT = "log_prob_current"  # (N, B)
LOG_PROB_NEXT = "log_prob_next"  # (N, B)
TARGET_NEXT_Q = "target_next_q"  # (N or 1, B), minimum over the target critics, or a subset of them, at s'
TARGET_NEXT_LOG_PROB = "target_next_log_prob"  # (N or 1, B)
ACTOR_LOG_PROB = "actor_log_prob"  # (B,), with gradient into the policy
ACTOR_Q = "actor_q"  # (B,), minimum or mean over frozen critics
DATA_LOG_PROB = "data_log_prob"  # (B,), log pi(a_data|s), with gradient into the policy
REFERENCE_VALUE = "reference_value"  # (B,), V(s) of the network of the reference value, with gradient into it
REFERENCE_NEXT_VALUE = "reference_next_value"  # (B,), that of its target where the "td" fit goes on
CLIPPED = "clipped_observations"  # (B,), share of the numbers of s that `observation_clip` changed; only where it acts


class KindOfStep(NamedTuple):
    """What Python decides in a gradient step, so that a recording of one stands for no other.

    Attributes:
        is_online: The phase.
        is_conservative: Whether the conservative term is on. Without it the data's actions alone are judged.
        takes_best_target: Whether the target takes the best of N next actions.
        moves_actor: Whether actor and temperature step.
        clones_behaviour: Whether the actor learns by behaviour cloning alone.
        imitates: Whether the actor's loss has an imitation term.
        moves_targets: Whether the targets move.
        fits_reference_alone: Whether this is a step of the reference value's network alone, before the first of all
            others.
        evaluates_reference: Whether that network is evaluated, and trained.
        bootstraps_reference: Whether its target is evaluated as well, for the "td" fit.
        shifts_images: Whether images are shifted at random, as `random_shift` says.
    """

    is_online: bool = False
    is_conservative: bool = True
    takes_best_target: bool = True
    moves_actor: bool = True
    clones_behaviour: bool = False
    imitates: bool = False
    moves_targets: bool = True
    fits_reference_alone: bool = False
    evaluates_reference: bool = False
    bootstraps_reference: bool = False
    shifts_images: bool = True

    @property
    def needs_data_log_prob(self) -> bool:
        """Whether the likelihood of the data's actions enters the actor's loss."""
        return self.moves_actor and (self.clones_behaviour or self.imitates)


class Noise(NamedTuple):
    """All random numbers of one gradient step; None where the step does not ask for them.

    Attributes:
        actor: Standard normal, shape (B, A).
        target: Standard normal, shape (N or 1, B, A).
        uniform: Uniform in [-1, 1], shape (N, B, A).
        current: Standard normal, shape (N, B, A).
        following: Standard normal for the actions proposed at s', shape (N, B, A).
    """

    actor: Tensor | None
    target: Tensor
    uniform: Tensor | None
    current: Tensor | None
    following: Tensor | None


def draw_noise(
    kind: KindOfStep,
    *,
    batch_size: int,
    action_dim: int,
    num_actions: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> Noise:
    """Draws the noise of one gradient step."""
    num_sampled = num_actions if kind.is_conservative else 0
    sizes = [int(kind.moves_actor), num_actions if kind.takes_best_target else 1, num_sampled, num_sampled]
    # One draw of each kind and slices of it: fewer kernel launches.
    normal = torch.randn(sum(sizes), batch_size, action_dim, generator=generator, device=device)
    actor, target, current, following = torch.split(normal, sizes)
    of_actor = actor[0] if kind.moves_actor else None
    if not kind.is_conservative:
        return Noise(of_actor, target, uniform=None, current=None, following=None)
    uniform = torch.rand(num_actions, batch_size, action_dim, generator=generator, device=device)
    return Noise(of_actor, target, uniform * 2.0 - 1.0, current, following)


def draw_subset(num_critics: int, size: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draws critics without replacement, every subset with the same probability, shape (size,).

    By sorting random numbers, which a CUDA graph can replay; `torch.randperm` goes through the host.

    Source:
        Chen et al. 2021, arXiv:2101.05982, algorithm 1.
    """
    return torch.rand(num_critics, generator=generator, device=device, dtype=torch.float64).topk(size).indices
