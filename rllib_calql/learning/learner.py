"""The torch learner of Cal-QL: loss, one backward pass, one all-reduce, optimisers, targets after every step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed
from ray.rllib.algorithms.cql.torch.cql_torch_learner import CQLTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.rllib.utils.numpy import convert_to_numpy
from torch import Tensor

from rllib_calql.common import metrics as keys
from rllib_calql.common.schedules import largest_value
from rllib_calql.common.spaces import fixed_dimensions
from rllib_calql.learning.graphed_steps import graphed_steps
from rllib_calql.learning.optimisers import OptimisingLearner, parameters_of_pairs
from rllib_calql.learning.skipped_updates import SkippedUpdates
from rllib_calql.learning.step_losses import Duals, ScheduledWeight, StepLosses, losses_of_step
from rllib_calql.learning.step_records import StepLog
from rllib_calql.networks.precision import check_precision, float32_products, product_dtype
from rllib_calql.networks.side_by_side import one_thread_an_operation
from rllib_calql.networks.steps import KindOfStep
from rllib_calql.store.resident_store import ROW_NUMBERS, ResidentStore
from rllib_calql.system import activity
from rllib_calql.system.allocator import keep_freed_memory

if TYPE_CHECKING:
    from rllib_calql.config import CalQLConfig

ONLINE = "online"  # Entry of `timesteps`: whether the update belongs to the online phase.
FITS_REFERENCE = "fits_reference"  # Entry of `timesteps`: whether the updates fit a learned reference value alone.
REFERENCE_QUANTILE = "reference_quantile"  # Entry of `timesteps`: the quantile that is the reference value, if it is.
UPDATES = "updates"  # Unit of what a process is doing, see `system.activity`.

_STATE = "calql"
_SEED_OF_SUBSETS = 2**20  # In the place of a rank's number, and none's.
logger = logging.getLogger(__name__)


class CalQLTorchLearner(OptimisingLearner):
    """Performs K gradient steps per `update` call on K batches laid end to end.

    Departures from RLlib's CQL learner: targets move after every gradient step instead of once per call; the four
    losses have disjoint parameters and share one backward pass; no DDP wrapper but one flat all-reduce; a NaN, infinite
    or too large gradient skips the step of every optimiser and learner; temperature, Lagrange multiplier and random
    state are part of the checkpoint; behaviour cloning ends after `bc_updates`.
    """

    @override(CQLTorchLearner)
    def build(self) -> None:
        """Creates the module, the dual variable, the optimisers and this rank's random generator."""
        self.log_alpha_prime = torch.ones(1, dtype=torch.float32)
        self._num_updates = 0
        self._num_reference_updates = 0
        self._online = self._fits_reference = False
        self._accumulator = StepLog()
        self._resident_store: ResidentStore | None = None
        keep_freed_memory()
        # RLlib's seeding turns deterministic algorithms on, and torch then writes NaN into each new tensor first.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        super().build()
        self._target_pairs = parameters_of_pairs(self._calql_module.get_target_network_pairs())
        self._reference_pairs = parameters_of_pairs(self._calql_module.reference_pairs())
        self._skipped = SkippedUpdates(self._device)
        self._seed = self.config.seed if self.config.seed is not None else torch.seed() % 2**31
        self._generator = torch.Generator(device=self._device)
        self._generator.manual_seed(self._seed)
        # Of several learners all draw the same subset of critics, from a generator of which each has its own copy.
        has_others = self.config.num_learners > 1
        self._generator_of_subsets = torch.Generator(device=self._device) if has_others else self._generator
        self._seed_anew()
        self._calql_module.generator = self._generator
        self._calql_module.generator_of_subsets = self._generator_of_subsets
        self._bc_weight = ScheduledWeight(self.config.bc_weight, self._device)
        self._reference_quantile = torch.zeros((), dtype=torch.float64, device=self._device)
        self._conservative_weights = {
            online: ScheduledWeight(self.config.conservative_weight(online=online), self._device)
            for online in (False, True)
        }
        self._set_precision()
        # The all-reduce of several learners is not recorded, and a replayed step logs nothing.
        has_graphs = self.config.num_learners <= 1 and not self.config.log_gradients
        self._graphed = graphed_steps(self._step_of_rows, self._generator, self._device) if has_graphs else None

    @property
    def num_reference_updates(self) -> int:
        """Updates that have fitted a learned reference value alone, over the lifetime."""
        return self._num_reference_updates

    @property
    def resident_store(self) -> ResidentStore | None:
        """The copy of the store on this learner's device, if there is one."""
        return self._resident_store

    def draw_from(self, store: ResidentStore | None) -> None:
        """Takes rows from a store on this learner's device; batches then hold their `ROW_NUMBERS` alone."""
        self._resident_store = store

    @override(CQLTorchLearner)
    def _get_target_entropy(self, module_id: str) -> float:
        """RLlib's, of the dimensions that leave a choice alone."""
        entropy: float = super()._get_target_entropy(module_id)
        space = self._module_spec.module_specs[module_id].action_space
        is_auto = self.config.target_entropy == "auto"
        return entropy + float(fixed_dimensions(space).sum()) if is_auto else entropy

    def _step_of_rows(self, rows: dict[str, Tensor]) -> None:
        self._make_step({DEFAULT_MODULE_ID: rows})

    def _set_precision(self) -> None:
        self._calql_module.set_product_dtype(product_dtype(self.config.precision))
        reason = check_precision(self.config.precision, torch.device(self._device))
        if reason is not None and not self._learner_index:
            logger.warning("`precision` is %r, but %s.", self.config.precision, reason)

    def _seed_anew(self) -> None:
        """Seeds the noise of the ranks above 0 by seed, rank and update count, and all ranks' subsets without the rank.

        RLlib gives every learner the same seed, and a checkpoint holds rank 0's random state only. The same noise on
        every rank would correlate their gradients. Seeded at every update call, a resumed run draws what an
        uninterrupted one would have drawn.
        """
        if self._learner_index:
            self._seed_by(self._generator, self._learner_index)
        if self._generator_of_subsets is not self._generator:
            self._seed_by(self._generator_of_subsets, _SEED_OF_SUBSETS)

    def _seed_by(self, generator: torch.Generator, number: int) -> None:
        num_updates = self._num_updates + self._num_reference_updates
        entropy = np.random.SeedSequence((self._seed, number, num_updates))
        generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    # --- One update call -------------------------------------------------------------------------------------------

    @override(Learner)
    def update(
        self,
        batch: MultiAgentBatch | None = None,
        *,
        batch_refs: list[Any] | None = None,
        training_data: TrainingData | None = None,
        timesteps: dict[str, Any] | None = None,
        minibatch_size: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Makes one gradient step per mini-batch of `minibatch_size` consecutive rows.

        Bookkeeping happens once per call and not once per step, and env steps are not counted K-fold as RLlib's cyclic
        mini-batch iterator does.

        Args:
            batch: Columns of K * `minibatch_size` rows for the default module, or their `ROW_NUMBERS` alone if there
                is a `resident_store`.
            batch_refs: The same as an object reference, for remote learners.
            training_data: The same as RLlib's container.
            timesteps: RLlib's lifetime counters, and `ONLINE`, `FITS_REFERENCE`, `REFERENCE_QUANTILE`.
            minibatch_size: Rows per gradient step; all rows if None.
            **kwargs: Accepted for RLlib's calling convention.

        Returns:
            The reduced metrics.
        """
        self._check_is_built()
        timesteps = timesteps or {}
        self.before_gradient_based_update(timesteps=timesteps)
        self._online = bool(timesteps.get(ONLINE, False))
        self._fits_reference = bool(timesteps.get(FITS_REFERENCE, False))
        if REFERENCE_QUANTILE in timesteps:
            self._reference_quantile.fill_(timesteps[REFERENCE_QUANTILE])  # Where a recorded step looks for it.
        self._seed_anew()
        env_steps = timesteps.get(NUM_ENV_STEPS_SAMPLED_LIFETIME, 0)
        self._move_learning_rates(env_steps)
        for weight in (self._bc_weight, *self._conservative_weights.values()):
            weight.move(env_steps)
        data = training_data if training_data is not None else TrainingData(batch=batch, batch_refs=batch_refs)
        data.validate()
        data.solve_refs()
        self._weights_seq_no += 1
        columns = self._columns_on_device(data.batch)
        num_rows = len(next(iter(columns.values())))
        rows_per_step = minibatch_size or num_rows
        if num_rows % rows_per_step:
            raise ValueError(f"An update needs whole mini-batches of {rows_per_step} rows, got {num_rows} rows.")
        try:
            self._make_steps(columns, rows_per_step, num_rows // rows_per_step)
        except BaseException:  # Ctrl-C too: the next call may have batches of another size, and logs its own steps.
            self._accumulator.forget()
            raise
        self._log_update(num_rows, rows_per_step)
        self.after_gradient_based_update(timesteps=timesteps)
        return dict(self.metrics.reduce())

    def _make_steps(self, columns: dict[str, Tensor], rows_per_step: int, num_steps: int) -> None:
        with float32_products(self.config.precision), one_thread_an_operation():
            if self._graphed is not None:
                self._graphed.run(columns, rows_per_step, self._kinds_of_steps(num_steps))
                return
            for start in range(0, num_steps * rows_per_step, rows_per_step):
                rows = {key: column[start : start + rows_per_step] for key, column in columns.items()}
                self._update({DEFAULT_MODULE_ID: rows})
                activity.count(UPDATES)

    def _columns_on_device(self, batch: MultiAgentBatch | SampleBatch) -> dict[str, Tensor]:
        columns = batch.policy_batches[DEFAULT_MODULE_ID] if isinstance(batch, MultiAgentBatch) else batch
        # Arrays out of the object store are read-only, which torch warns about though nothing here writes to them.
        writable = {k: v if v.flags.writeable else v.copy() for k, v in columns.items()}
        return {key: torch.from_numpy(value).to(self._device) for key, value in writable.items()}

    @override(TorchLearner)
    def _uncompiled_update(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, Any, Any]:
        """One gradient step: all gradients at the same parameters, then every optimiser, then the targets.

        With a gradient that is NaN, infinite or too large for Adam it changes nothing, but counts as an update, so that
        the counters of algorithm and learners agree. The decision stays on the device and is the same on every rank: it
        falls on the averages.
        """
        fwd_out, loss_per_module = self._make_step(batch)
        self._count_step()
        return fwd_out, loss_per_module, {}

    def _make_step(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        """What an update launches. Nothing is read back, nor counted by Python, so that a graph can replay it."""
        if self._resident_store is not None and ROW_NUMBERS in batch[DEFAULT_MODULE_ID]:
            batch = {DEFAULT_MODULE_ID: self._resident_store.look_up(batch[DEFAULT_MODULE_ID][ROW_NUMBERS])}
        kind = self._kind_of_step()
        self._calql_module.kind_of_step = kind
        fwd_out = self.module.forward_train(batch)
        loss_per_module = self.compute_losses(fwd_out=fwd_out, batch=batch)
        gradients = self.compute_gradients(loss_per_module)
        self._skipped.begin()
        if self.config.grad_clip is not None:  # Which would turn infinities into finite numbers.
            self._skipped.judge(list(gradients.values()))
        applied = self.postprocess_gradients(gradients)
        self._skipped.judge_squares(list(applied.values()))
        self._skipped.count()
        self.apply_gradients(applied)
        if kind.moves_targets:
            self._update_targets(kind)
        return fwd_out, loss_per_module

    def _kind_of_step(self) -> KindOfStep:
        """What Python decides in the next step, by the phase and the updates made so far."""
        config, number = self.config, self._num_updates + 1
        if self._fits_reference:
            return KindOfStep(
                fits_reference_alone=True,
                bootstraps_reference=config.bootstraps_reference,
                moves_targets=(self._num_reference_updates + 1) % config.target_update_period == 0,
            )
        uses_reference = config.uses_reference_network(online=self._online)
        return KindOfStep(
            is_online=self._online,
            is_conservative=config.is_conservative(online=self._online),
            takes_best_target=config.has_max_target_backup(online=self._online),
            moves_actor=number % config.period_of_actor(online=self._online) == 0,
            clones_behaviour=number <= config.bc_updates,
            imitates=largest_value(config.bc_weight) > 0,
            moves_targets=number % config.target_update_period == 0,
            evaluates_reference=uses_reference,
            bootstraps_reference=uses_reference and config.bootstraps_reference,
        )

    def _count_step(self) -> None:
        if self._fits_reference:
            self._num_reference_updates += 1
        else:
            self._num_updates += 1

    def _kinds_of_steps(self, num_steps: int) -> Iterator[KindOfStep]:
        """The kinds of the next steps; counts them as they are made."""
        for _ in range(num_steps):
            yield self._kind_of_step()
            self._count_step()

    @override(CQLTorchLearner)
    def compute_loss_for_module(
        self,
        *,
        module_id: str,
        config: CalQLConfig,
        batch: dict[str, Tensor],
        fwd_out: dict[str, Tensor],
    ) -> Tensor:
        """Sum of critic, actor, temperature, dual and reference value's loss; their parameters are disjoint."""
        total, record = self._losses_of(batch, fwd_out)
        self._accumulator.add(self._calql_module.kind_of_step, record)
        return total

    def _losses_of(self, batch: dict[str, Tensor], fwd_out: dict[str, Tensor]) -> StepLosses:
        """The losses of a step of the module's `kind_of_step`, and what is logged of them."""
        kind = self._calql_module.kind_of_step
        return losses_of_step(
            self.config,
            kind,
            batch,
            fwd_out,
            Duals(self.curr_log_alpha[DEFAULT_MODULE_ID], self.log_alpha_prime),
            target_entropy=self.target_entropy[DEFAULT_MODULE_ID],
            action_dim=self._calql_module.num_free_actions,
            conservative_weight=self._conservative_weights[kind.is_online],
            bc_weight=self._bc_weight,
            reference_quantile=self._reference_quantile,
        )

    @override(CQLTorchLearner)
    def compute_gradients(self, loss_per_module: dict[str, Tensor], **kwargs: Any) -> dict[Any, Tensor]:
        """Gradients of all losses by one backward pass, averaged over the learners by one all-reduce."""
        for param in self._params.values():
            param.grad = None
        torch.autograd.backward(list(loss_per_module.values()))
        # The dual variable has no gradient while the conservative term is off; Adam then leaves it alone.
        gradients = {ref: param.grad for ref, param in self._params.items() if param.grad is not None}
        if self.config.num_learners > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
            torch.distributed.all_reduce(flat)
            flat /= self.config.num_learners
            parts = torch.split(flat, [gradient.numel() for gradient in gradients.values()])
            for gradient, part in zip(gradients.values(), parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return gradients

    @override(TorchLearner)
    def postprocess_gradients_for_module(
        self, *, module_id: str, config: CalQLConfig | None = None, module_gradients_dict: dict[Any, Tensor]
    ) -> dict[Any, Tensor]:
        """RLlib's clipping and logging. With `log_gradients` and no `grad_clip` RLlib would hand on no gradients."""
        processed = super().postprocess_gradients_for_module(
            module_id=module_id, config=config, module_gradients_dict=module_gradients_dict
        )
        return {**module_gradients_dict, **processed}

    @override(CQLTorchLearner)
    def apply_gradients(self, gradients_dict: dict[Any, Tensor]) -> None:
        """Steps every optimiser. With `found_inf` fused Adam leaves parameters, moments and step count as they are."""
        for param, gradient in gradients_dict.items():
            param.grad = gradient
        for optimizer in self._named_optimizers.values():
            optimizer.found_inf = self._skipped.found_inf
            optimizer.step()

    def _update_targets(self, kind: KindOfStep) -> None:
        pairs = self._reference_pairs if kind.fits_reference_alone else self._target_pairs
        with torch.no_grad():
            for followed, targets in pairs:
                weight = self.config.tau * (1.0 - self._skipped.found_inf.to(targets[0].dtype))
                torch._foreach_lerp_(targets, followed, [weight] * len(targets))

    @override(TorchLearner)
    def _make_modules_ddp_if_necessary(self) -> None:
        """Starts all learners from rank 0's parameters; no DDP wrapper, see `compute_gradients`."""
        if self.config.num_learners > 1:
            for tensor in self._calql_module.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)

    @override(CQLTorchLearner)
    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Moves learning-rate schedules. Targets have moved already; the parents' once-per-call update is skipped."""
        TorchLearner.after_gradient_based_update(self, timesteps=timesteps)

    def _log_update(self, num_rows: int, rows_per_step: int) -> None:
        """Hands the accumulated tensors to RLlib's logger: the only host synchronisations of an update call."""
        means, skipped = self._accumulator.pop(), self._skipped.read()
        for name, value in (means | {keys.NUM_SKIPPED_UPDATES_IN_A_ROW: skipped.in_a_row}).items():
            self.metrics.log_value((DEFAULT_MODULE_ID, name), value, window=1)
        for name, count in (
            (keys.NUM_UPDATES_LIFETIME, self._num_updates),
            (keys.NUM_SKIPPED_UPDATES_LIFETIME, skipped.lifetime),
        ):
            self.metrics.log_value((DEFAULT_MODULE_ID, name), count, reduce="max")
        if self.config.has_reference_network:
            name = keys.NUM_REFERENCE_UPDATES_LIFETIME
            self.metrics.log_value((DEFAULT_MODULE_ID, name), self._num_reference_updates, reduce="max")
        if skipped.new and self._learner_index == 0:
            logger.warning(
                "%d of %d gradient updates were skipped because a gradient was NaN or infinite, or its square (%d so "
                "far). Not finite on the first learner: %s. Look for extreme rewards or observations in the data, then "
                "lower the learning rates or set `grad_clip`.",
                skipped.new,
                num_rows // rows_per_step,
                skipped.lifetime,
                ", ".join(name for name, mean in means.items() if not math.isfinite(mean)) or "no term",
            )
        if self._fits_reference:
            return  # RLlib's counts of steps trained on are those of policy and critics.
        rows = MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch({"rows": np.empty(num_rows, np.int8)})}, num_rows)
        self._log_steps_trained_metrics(rows)

    # --- State -----------------------------------------------------------------------------------------------------

    @override(Learner)
    def get_state(self, components: Any = None, *, not_components: Any = None, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state and what it leaves out: temperature, dual variable, random state, counts of updates."""
        state: dict[str, Any] = super().get_state(components, not_components=not_components, **kwargs)
        if self._check_component(_STATE, components, not_components):
            state[_STATE] = {
                "log_alpha": convert_to_numpy(self.curr_log_alpha[DEFAULT_MODULE_ID]),
                "log_alpha_prime": convert_to_numpy(self.log_alpha_prime),
                "generator": self._generator.get_state().numpy(),
                "seed": self._seed,
                "num_updates": self._num_updates,
                "num_reference_updates": self._num_reference_updates,
                "num_skipped_updates": self._skipped.get_state(),
            }
        return state

    @override(Learner)
    def set_state(self, state: dict[str, Any]) -> None:
        """Restores in place, so that the optimisers keep referring to the same tensors."""
        self._weights_seq_no = 0  # RLlib would silently ignore an older checkpoint's weights.
        super().set_state(state)
        if self._graphed is not None:
            self._graphed.forget()
        if _STATE not in state:
            return
        own = state[_STATE]
        with torch.no_grad():
            self.curr_log_alpha[DEFAULT_MODULE_ID].copy_(torch.as_tensor(own["log_alpha"]))
            self.log_alpha_prime.copy_(torch.as_tensor(own["log_alpha_prime"]))
        self._num_updates = own["num_updates"]
        self._num_reference_updates = own.get("num_reference_updates", 0)  # Earlier versions had none.
        self._skipped.set_state(own["num_skipped_updates"])
        self._generator.set_state(torch.as_tensor(own["generator"]))
        self._seed = own["seed"]
        self._seed_anew()
        self._set_constant_rates()

    def set_observation_statistics(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Sets mean and standard deviation of observations, each of shape (obs_dim,), in the module."""
        self._calql_module.set_observation_statistics(torch.as_tensor(mean), torch.as_tensor(std))

    def estimate_values(self, obs: np.ndarray) -> np.ndarray:
        """Value of the greedy policy by the target critics; obs (B, obs_dim) gives (B,)."""
        values = self._calql_module.estimate_values(torch.as_tensor(obs).to(self._device))
        return np.asarray(convert_to_numpy(values))
