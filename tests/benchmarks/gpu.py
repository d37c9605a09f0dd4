"""What there is to check and to measure on a GPU, in one run of at most seven minutes.

    python tests/benchmarks/gpu.py --output gpu.json
    python tests/benchmarks/gpu.py --output cpu.json --device cpu --small  # Whether the script itself works.

The tests marked `gpu`; one update on CPU and GPU with the same noise; replayed steps beside launched ones; gradient
steps per second, the kernels' own time and memory at several sizes; Q after the same number of updates on both. After
each part the file is written anew, so that a run that is cut off still tells something. A part that fails is noted,
and the others follow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from updates import calql_config, shapes_of_products, write_rows

from rllib_calql.networks.precision import check_precision, float32_products

ROOT = Path(__file__).parents[2]
MODULE = "default_policy"
CPU = torch.device("cpu")
GPU_ONLY = "needs a GPU"


class Sizes(NamedTuple):
    """How much of everything.

    Attributes:
        rows: Of the data.
        width: Of hidden layers.
        depths: Hidden layers of the critics.
        batch_sizes: Rows of an update.
        actions: Sampled actions per source.
        steps: Updates that are timed.
        learning: Updates after which Q is compared.
    """

    rows: int = 100_000
    width: int = 256
    depths: tuple[int, ...] = (2, 4)
    batch_sizes: tuple[int, ...] = (256, 1024)
    actions: int = 10
    steps: int = 200
    learning: int = 2000


SMALL = Sizes(rows=2_000, width=16, depths=(2,), batch_sizes=(16,), actions=2, steps=5, learning=10)


class Check:
    """The parts, and what all of them need.

    Args:
        device: "cuda" or "cpu".
        sizes: How much.
        folder: For the data.
    """

    def __init__(self, device: str, sizes: Sizes, folder: Path) -> None:
        self.device = torch.device(device)
        self.sizes = sizes
        self._rows = folder / "rows.parquet"
        write_rows(self._rows, sizes.rows)

    def algo(self, *, depth: int = 2, on_cpu: bool = False, steps: int | None = None, **training: Any) -> Any:
        """An algorithm whose learner is on the device, or else on the CPU. The caller stops it."""
        sizes = self.sizes
        settings = {"num_actions": sizes.actions, "train_batch_size_per_learner": sizes.batch_sizes[0], **training}
        config = calql_config(self._rows, steps or sizes.steps, **settings)
        widths = {"actor_hiddens": [sizes.width] * 2, "critic_hiddens": [sizes.width] * depth}
        config.rl_module(model_config=widths)
        has_gpu = self.device.type == "cuda" and not on_cpu
        return config.learners(num_gpus_per_learner=1 if has_gpu else 0).build()

    # --- Parts -------------------------------------------------------------------------------------------------------

    def tests(self) -> dict[str, Any]:
        """The tests that are skipped without a GPU."""
        if self.device.type != "cuda":
            return {"skipped": GPU_ONLY}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT, check=False)
        return {"is_ok": done.returncode == 0, "output": done.stdout.strip().splitlines()[-30:]}

    def one_update(self) -> dict[str, Any]:
        """Parameters after one update from the same parameters, batch and noise; relative to the CPU's change."""
        changes, losses = [], []
        for on_cpu in (True, False):
            algo = self.algo(on_cpu=on_cpu)
            learner = algo.learner_group._learner
            batch_size = self.sizes.batch_sizes[0]
            drawn = algo.store.sample(num_batches=1, batch_size=batch_size, num_offline_rows=batch_size)
            batch = {name: torch.from_numpy(column).to(learner._device) for name, column in drawn.items()}
            if on_cpu:
                first, kept = {k: v.clone() for k, v in learner._calql_module.state_dict().items()}, batch
            batch = {name: column.to(learner._device) for name, column in kept.items()}
            learner._calql_module.load_state_dict(first)
            with noise_of_cpu(seed=0), float32_products("fp32"):
                _, loss, _ = learner._uncompiled_update({MODULE: batch})
            losses.append(loss[MODULE].item())
            after = learner._calql_module.state_dict()
            changes.append(torch.cat([(after[name].cpu().double() - first[name].double()).flatten() for name in first]))
            algo.stop()
        on_cpu_, on_device = changes
        difference = float((on_device - on_cpu_).norm() / on_cpu_.norm())
        loss_difference = abs(losses[1] - losses[0]) / abs(losses[0])
        return {
            "relative_difference_of_change": difference,
            "relative_difference_of_loss": loss_difference,
            "is_ok": difference < 1e-3 and loss_difference < 1e-4,
        }

    def replay(self) -> dict[str, Any]:
        """Steps that are replayed beside steps that Python launches, from the same state of the generator."""
        if self.device.type != "cuda":
            return {"skipped": GPU_ONLY}
        states, num_replays = [], 0
        for is_graphed in (False, True):
            algo = self.algo(steps=50)
            learner = algo.learner_group._learner
            if not is_graphed:
                learner._graphed = None
            for _ in range(2):
                algo.train()
            if is_graphed:
                num_replays = len(learner._graphed._replays)
            states.append({name: value.cpu() for name, value in learner._calql_module.state_dict().items()})
            algo.stop()
        differences = [float((states[1][name] - value).abs().max()) for name, value in states[0].items()]
        return {
            "num_kinds_recorded": num_replays,
            "largest_difference": max(differences),
            "is_ok": num_replays > 0 and max(differences) == 0.0,
        }

    def speeds(self) -> Iterator[dict[str, Any]]:
        """Gradient steps per second of `algo.train()`, kernel time, peak memory; a row for each combination."""
        sizes = self.sizes
        for precision, depth, batch_size in itertools.product(
            ("fp32", "medium", "bf16"), sizes.depths, sizes.batch_sizes
        ):
            row = {"precision": precision, "depth": depth, "batch_size": batch_size}
            try:
                reason = check_precision(precision, self.device)
            except ValueError as error:
                reason = str(error)
            if reason is not None:
                yield {**row, "skipped": reason}
                continue
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            algo = self.algo(depth=depth, precision=precision, train_batch_size_per_learner=batch_size)
            learner, updater = algo.learner_group._learner, algo._parts.updater
            graphed, resident = learner._graphed, learner.resident_store
            for has_graph, is_resident in itertools.product((True, False), (True, False)):
                if (has_graph and graphed is None) or (is_resident and resident is None):
                    continue
                learner._graphed = graphed if has_graph else None
                updater._resident_store = resident if is_resident else None
                learner.draw_from(updater._resident_store)
                if graphed is not None:
                    graphed.forget()
                algo.train()  # Warms up and records.
                begin = time.perf_counter()
                algo.train()
                name = f"{'graph' if has_graph else 'launched'}, store on {'device' if is_resident else 'host'}"
                row[name] = sizes.steps / (time.perf_counter() - begin)
            if self.device.type == "cuda":
                row["kernel_ms"] = self.kernel_milliseconds(algo)
                row["products_ms"] = self.product_milliseconds(depth, batch_size, precision)
                row["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
            algo.stop()
            yield row

    def kernel_milliseconds(self, algo: Any) -> float:
        """What the kernels of one launched step take, without what is between them."""
        learner, num_steps = algo.learner_group._learner, 20
        learner._graphed = None
        learner.draw_from(None)
        batch_size = algo.config.train_batch_size_per_learner
        drawn = algo.store.sample(num_batches=1, batch_size=batch_size, num_offline_rows=batch_size)
        batch = {name: torch.from_numpy(column).to(self.device) for name, column in drawn.items()}
        with float32_products(algo.config.precision):
            learner._uncompiled_update({MODULE: batch})
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                for _ in range(num_steps):
                    learner._uncompiled_update({MODULE: batch})
                torch.cuda.synchronize()
        kernels = (event for event in profiler.events() if event.device_type == DeviceType.CUDA)
        return 1e-3 * sum(event.self_device_time_total for event in kernels) / num_steps

    def product_milliseconds(self, depth: int, batch_size: int, precision: str) -> float:
        """The matrix products of an update alone, at the paper's widths."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        products = [
            [torch.randn(shape, device=self.device, dtype=dtype) for shape in ((m, k), (k, n), (m, n))]
            for m, k, n in shapes_of_products(depth, batch_size)
        ]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with float32_products(precision):
            for number in range(21):
                if number == 1:
                    begin.record()
                for left, right, out in products:
                    torch.mm(left, right, out=out)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 20

    def learning(self) -> dict[str, Any]:
        """Q of the data's actions after the same number of updates with noise of their own, on CPU and device."""
        found: dict[str, dict[str, float]] = {}
        for name, on_cpu in (("cpu", True), ("device", False)):
            algo = self.algo(on_cpu=on_cpu, steps=self.sizes.learning)
            begin = time.perf_counter()
            algo.train()
            seconds = time.perf_counter() - begin
            learner = algo.learner_group._learner
            num_rows = min(4096, self.sizes.rows)
            drawn = algo.store.sample(num_batches=1, batch_size=num_rows, num_offline_rows=num_rows)
            q = q_of(learner, drawn)
            found[name] = {"mean": float(q.mean()), "std": float(q.std()), "seconds": seconds}
            algo.stop()
        spread = found["cpu"]["std"]
        shift = abs(found["device"]["mean"] - found["cpu"]["mean"]) / spread
        ratio = found["device"]["std"] / spread
        is_ok = math.isfinite(shift) and shift < 0.25 and 0.8 < ratio < 1.25
        return {**found, "shift_in_standard_deviations": shift, "ratio_of_standard_deviations": ratio, "is_ok": is_ok}


def q_of(learner: Any, rows: dict[str, np.ndarray]) -> Tensor:
    """Q of the rows' own actions, mean over critics, on the host."""
    batch = {name: torch.from_numpy(rows[name]).to(learner._device) for name in ("obs", "actions")}
    with torch.no_grad():
        q: Tensor = learner._calql_module.compute_q_values(batch)["qf_preds"]
    return q.mean(dim=0).cpu()


@contextmanager
def noise_of_cpu(seed: int) -> Iterator[None]:
    """Draws what the update draws on the CPU, from one seed, whatever its device."""
    generator = torch.Generator().manual_seed(seed)
    normal, uniform = torch.randn, torch.rand

    def drawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw_on_cpu(*size: int, device: Any = CPU, dtype: Any = None, **_: Any) -> Tensor:
            return draw(*size, generator=generator, dtype=dtype).to(device)

        return draw_on_cpu

    torch.randn, torch.rand = drawn(normal), drawn(uniform)
    try:
        yield
    finally:
        torch.randn, torch.rand = normal, uniform


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="Sizes of a moment, to try the script.")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; `--device cpu` tries the script on the CPU")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
    }

    def note(name: str, part: Any) -> None:
        found[name] = part
        options.output.write_text(json.dumps(found, indent=2))
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {json.dumps(part)}", flush=True)

    begin, failed = time.perf_counter(), []
    if not ray.is_initialized():
        resources = {"num_gpus": 1} if device == "cuda" else {}
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, **resources)
    with tempfile.TemporaryDirectory() as folder:
        check = Check(device, SMALL if options.small else Sizes(), Path(folder))
        for part in (check.one_update, check.replay, check.learning, check.speeds, check.tests):
            name = part.__name__
            try:
                result = part()
                if isinstance(result, dict):
                    note(name, result)
                else:  # A row after the other.
                    rows: list[Any] = []
                    for row in result:
                        rows.append(row)
                        note(name, rows)
                    result = {}
                if not result.get("is_ok", True):
                    failed.append(name)
            except Exception as error:  # The other parts tell something yet.
                failed.append(name)
                note(f"{name}_error", f"{type(error).__name__}: {error}")
    if failed:
        sys.exit(f"Not as it should be: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
