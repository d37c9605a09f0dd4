"""Cal-QL's offline update as a plain PyTorch script would have it: separate networks, autograd, three optimisers.

A yardstick for the benchmarks, written for clarity: what the package is faster than, and what it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = dict[str, Tensor]


def mlp(n_in: int, hiddens: Sequence[int], n_out: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width in hiddens:
        layers += [nn.Linear(n_in, width), nn.ReLU()]
        n_in = width
    return nn.Sequential(*layers, nn.Linear(n_in, n_out))


class BareCalQL:
    """Two critics, max target backup, importance sampling, calibration."""

    def __init__(self, obs_dim: int, action_dim: int, hiddens: Sequence[int], num_actions: int = 10) -> None:
        self.policy = mlp(obs_dim, (256, 256), 2 * action_dim)
        self.critics = [mlp(obs_dim + action_dim, hiddens, 1) for _ in range(2)]
        self.targets = [mlp(obs_dim + action_dim, hiddens, 1) for _ in range(2)]
        for critic, target in zip(self.critics, self.targets, strict=True):
            target.load_state_dict(critic.state_dict())
        self.log_alpha = torch.zeros(1, requires_grad=True)
        critic_parameters = [p for critic in self.critics for p in critic.parameters()]
        self.critic_optimizer = torch.optim.Adam(critic_parameters, lr=3e-4, fused=True)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-4, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=1e-4, fused=True)
        self.num_actions, self.action_dim = num_actions, action_dim

    def sample(self, obs: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Actions (num, B, A) and log-densities (num, B)."""
        mean, log_std = self.policy(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-20.0, 2.0)
        noise = torch.randn(num, *mean.shape)
        z = mean + log_std.exp() * noise
        log_slope = 2.0 * (math.log(2.0) - z - functional.softplus(-2.0 * z))
        log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi) - log_slope).sum(-1)
        return torch.tanh(z), log_prob

    @staticmethod
    def q(critic: nn.Module, obs: Tensor, actions: Tensor) -> Tensor:
        """Q of actions (M, B, A), shape (M, B)."""
        joint = torch.cat([obs.expand(len(actions), *obs.shape), actions], dim=-1)
        values: Tensor = critic(joint.flatten(0, 1)).view(actions.shape[:2])
        return values

    def step(self, batch: Batch) -> None:
        """One update of everything."""
        obs, next_obs, returns = batch["obs"], batch["new_obs"], batch["returns_to_go"]
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            next_actions, _ = self.sample(next_obs, self.num_actions)
            next_q = torch.minimum(*(self.q(target, next_obs, next_actions) for target in self.targets)).amax(0)
            target_q = batch["rewards"] + 0.99 * (1.0 - batch["terminateds"]) * next_q
            uniform = torch.rand(self.num_actions, *batch["actions"].shape) * 2.0 - 1.0
            current, log_current = self.sample(obs, self.num_actions)
            following, log_following = self.sample(next_obs, self.num_actions)
            judged = torch.cat([batch["actions"].unsqueeze(0), uniform, current, following])
        loss = torch.zeros(())
        for critic in self.critics:
            q = self.q(critic, obs, judged)
            q_data, q_uniform, q_current, q_following = torch.split(q, [1, *[self.num_actions] * 3])
            entries = [
                q_uniform + self.action_dim * math.log(2.0),
                torch.maximum(q_following, returns) - log_following,
                torch.maximum(q_current, returns) - log_current,
            ]
            gap = torch.logsumexp(torch.cat(entries), dim=0) - q_data[0]
            loss = loss + (q_data[0] - target_q).square().mean() + 5.0 * gap.mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        actions, log_prob = self.sample(obs, 1)
        for critic in self.critics:
            critic.requires_grad_(False)
        q_min = torch.minimum(*(self.q(critic, obs, actions) for critic in self.critics))
        for critic in self.critics:
            critic.requires_grad_(True)
        self.policy_optimizer.zero_grad()
        (alpha * log_prob - q_min).mean().backward()
        self.policy_optimizer.step()
        self.alpha_optimizer.zero_grad()
        (-self.log_alpha * (log_prob.detach() - self.action_dim).mean()).sum().backward()
        self.alpha_optimizer.step()
        with torch.no_grad():
            for critic, target in zip(self.critics, self.targets, strict=True):
                for main, slow in zip(critic.parameters(), target.parameters(), strict=True):
                    slow.lerp_(main, 5e-3)
