"""Optimisers of Cal-QL's learner: one Adam per network, their rates, their state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from ray.rllib.algorithms.cql.torch.cql_torch_learner import CQLTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.annotations import override
from torch import Tensor, nn

from rllib_calql.networks.rl_module import CalQLTorchRLModule

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

_BUFFERS = ("exp_avg", "exp_avg_sq", "step")  # Of torch's Adam for each parameter.


class LeanAdam(torch.optim.Adam):
    """Adam on a CPU whose step is torch's fused kernel and little around it: the same numbers and the same state.

    What surrounds the kernel in torch's own `step`, for devices, hooks and profiles, takes longer than the kernel does
    for networks of usual size.

    Attributes:
        found_inf: 1.0 if a step is to leave everything as it is, else 0.0; shape ().
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params, fused=True)
        self._buffers: tuple[list[Tensor], ...] | None = None  # Of all parameters, in the order of `_BUFFERS`.
        self.found_inf = torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        """Steps all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            _step_with_hooks(self)
        else:
            self._step()
        return loss

    step.hooked = True  # type: ignore[attr-defined] # Else torch would put its surroundings around it.

    @torch.no_grad()
    def _step(self) -> None:
        (group,) = self.param_groups
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        moments, squares, steps = self._buffers_of(params)
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, [1.0 - self.found_inf] * len(steps))  # Of one tensor torch would read the number.
        torch._fused_adam_(
            params,
            [param.grad for param in params],
            moments,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
            found_inf=self.found_inf,
        )

    def _buffers_of(self, params: list[Tensor]) -> tuple[list[Tensor], ...]:
        """Those of parameters with a gradient, made if they are missing; kept where all parameters have one."""
        kept = self._buffers
        if kept is not None and len(kept[0]) == len(params) and kept[0][0] is self.state[params[0]].get(_BUFFERS[0]):
            return kept  # No state was set since.
        for param in params:
            if not self.state[param]:
                self.state[param] = {"step": torch.zeros((), dtype=torch.float32)}
                self.state[param] |= {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        found = tuple([self.state[param][name] for param in params] for name in _BUFFERS)
        if len(params) == len(self.param_groups[0]["params"]):
            self._buffers = found
        return found


_step_with_hooks = torch.optim.Optimizer.profile_hook_step(LeanAdam._step)


def parameters_of_pairs(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The parameters of networks and their targets, in the same order."""
    return [(list(followed.parameters()), list(target.parameters())) for followed, target in pairs]


class OptimisingLearner(CQLTorchLearner):
    """The part of the learner that concerns optimisers."""

    log_alpha_prime: Tensor  # The dual variable.

    @property
    def _calql_module(self) -> CalQLTorchRLModule:
        module: CalQLTorchRLModule = self.module[DEFAULT_MODULE_ID].unwrapped()
        return module

    @override(CQLTorchLearner)
    def configure_optimizers_for_module(self, module_id: str, config: CalQLConfig | None = None) -> None:
        """Registers Adam optimisers for critics, policy, temperature, and the dual variable and V if there are any."""
        assert config is not None
        module = self._calql_module
        self.log_alpha_prime = self.log_alpha_prime.to(self._device).requires_grad_(config.lagrangian)
        groups: list[tuple[str, Sequence[Tensor], Any]] = [
            ("critic", module.critic_parameters(), config.critic_lr),
            ("policy", module.policy_parameters(), config.actor_lr),
            ("alpha", [self.curr_log_alpha[module_id]], config.alpha_lr),
        ]
        if config.lagrangian:
            groups.append(("alpha_prime", [self.log_alpha_prime], config.critic_lr))
        if of_reference := module.reference_parameters():
            groups.append(("reference", of_reference, config.critic_lr))
        for name, params, lr in groups:
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=self._adam(params),
                params=list(params),
                lr_or_lr_schedule=lr,
            )

    def _adam(self, params: Sequence[Tensor]) -> torch.optim.Adam:
        """Adam. On a GPU its rate lies there, so that a recorded step follows a schedule."""
        if torch.device(self._device).type == "cuda":
            return torch.optim.Adam(params, lr=torch.zeros((), device=self._device), fused=True, capturable=True)
        return LeanAdam(params)

    @staticmethod
    @override(TorchLearner)
    def _get_optimizer_lr(optimizer: torch.optim.Optimizer) -> float:
        return float(optimizer.param_groups[0]["lr"])

    @staticmethod
    @override(TorchLearner)
    def _set_optimizer_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _move_learning_rates(self, env_steps: int) -> None:
        """Sets the rates of schedules before the call's updates; RLlib does so after them, one call late."""
        for optimizer, schedule in self._optimizer_lr_schedules.items():
            if schedule.use_schedule:
                self._set_optimizer_lr(optimizer, lr=schedule.update(timestep=env_steps))

    def _set_constant_rates(self) -> None:
        """Sets the config's rates, where they are no schedules, in place of those of a checkpoint."""
        for optimizer, schedule in self._optimizer_lr_schedules.items():
            if not schedule.use_schedule:
                # The restored optimiser holds the old learning rate; the config's, perhaps changed by PBT, must win.
                self._set_optimizer_lr(optimizer, lr=schedule.get_current_value())

    @override(TorchLearner)
    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restores copies: RLlib's tensors lie in the object store, where all learners of a node would change them."""
        super()._set_optimizer_state(state)
        is_cuda = torch.device(self._device).type == "cuda"
        for optimizer in self._named_optimizers.values():
            for buffers in optimizer.state.values():
                buffers.update({name: value.clone() for name, value in buffers.items()})
            for group in optimizer.param_groups:  # Perhaps written on another kind of device.
                rate = float(group["lr"])
                group["lr"] = torch.tensor(rate, device=self._device) if is_cuda else rate
                group["capturable"] = is_cuda
