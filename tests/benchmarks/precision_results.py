"""Results of the main job, and statistics of Q after 5,000 updates, in every precision; each run in its own process.

A processor without bfloat16 units takes part by emulation: factors are rounded to bfloat16, multiplied and summed in
float32, and in "bf16" the product is rounded as well, as such units do it. Every finished run is a line of the output
file; runs that are in it are not repeated. Fifteen runs take about an hour on two cores.

    python tests/benchmarks/precision_results.py --output precision.jsonl --parallel 2
    python tests/benchmarks/precision_results.py --output short.jsonl --seeds 0 --scale 0.02
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from learner_curves import EXAMPLE, ONLINE_ENV_STEPS, finished_runs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rllib_calql import CalQLConfig
from rllib_calql.common import metrics as keys
from rllib_calql.learning import learner
from rllib_calql.networks import precision

PRECISIONS = ("fp32", "medium", "bf16")
STATISTICS_AFTER = 5_000
Z = 1.959964  # Of a 95 % interval.

Run = dict[str, Any]
Products = {  # Operator -> position of its first factor.
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.mm.out: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.addmm.out: 1,
    torch.ops.aten.addmm_.default: 1,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.bmm.out: 0,
    torch.ops.aten.baddbmm.default: 1,
    torch.ops.aten.baddbmm.out: 1,
    torch.ops.aten.baddbmm_.default: 1,
}


class EmulatedUnits(TorchDispatchMode):
    """Multiplies as bfloat16 units would; without them torch has but a scalar loop, 50 times slower."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Rounds factors, and products of bfloat16 factors."""
        kwargs = kwargs or {}
        if func not in Products:
            return func(*args, **kwargs)
        first = Products[func]
        is_bfloat16 = args[first].dtype == torch.bfloat16
        if not is_bfloat16 and self._name != "medium":
            return func(*args, **kwargs)
        factors = [factor.to(torch.bfloat16).float() for factor in args[first : first + 2]]
        if not is_bfloat16:
            return func(*args[:first], *factors, **kwargs)
        out: Tensor | None = kwargs.get("out")
        summed = torch.matmul(*factors)
        if first == 1:
            summed += args[0].float()
        return summed.to(torch.bfloat16) if out is None else out.copy_(summed)


@contextmanager
def emulated_products(name: str) -> Iterator[None]:
    """In place of the package's setting of torch."""
    with ExitStack() as stack:
        if name != "fp32":
            stack.enter_context(EmulatedUnits(name))
        yield


def config_of(name: str, seed: int, scale: float) -> CalQLConfig:
    """The main job in another precision, collected by the algorithm itself."""
    config: CalQLConfig = runpy.run_path(str(EXAMPLE))["config"].copy(copy_frozen=False)
    config.fine_tuning(
        offline_updates=max(1, round(config.num_offline_updates * scale)),
        updates_per_iteration=max(1, round(config.updates_per_iteration * scale)),
    )
    config.training(precision=name).env_runners(num_env_runners=0)
    config.evaluation(evaluation_duration=max(2, round(50 * min(1.0, scale))))
    config.debugging(seed=seed)
    return config


def run(name: str, seed: int, scale: float) -> Run:
    """One run with statistics of Q over its data at a fixed count of updates."""
    if name != "fp32" and not precision.has_bfloat16_units():
        learner.float32_products = emulated_products  # type: ignore[assignment]
        learner.check_precision = lambda *_: None
        torch.set_num_threads(1)  # The emulation is of one thread, and so none may help it.
    begin = time.perf_counter()
    algo = config_of(name, seed, scale).build()
    curve: list[tuple[int, float]] = []
    q: dict[str, float] = {}
    while algo.num_online_env_steps < ONLINE_ENV_STEPS * scale:
        result = algo.train()
        success = result["evaluation"]["env_runners"]["success_rate"]
        if not q and algo.num_offline_updates >= STATISTICS_AFTER * scale:
            q = q_statistics(algo)
        if algo.phase == "online":
            curve.append((algo.num_online_env_steps, success))
        print(f"{name}, seed {seed}: {algo.num_online_env_steps:5} env steps, success {success:.2f}", flush=True)
    algo.stop()
    return {
        "precision": name,
        "seed": seed,
        "scale": scale,
        "emulated": learner.float32_products is emulated_products,
        "curve": curve,
        "dip": result["fine_tuning"]["dip"],
        "q": q,
        "minutes": (time.perf_counter() - begin) / 60,
    }


def q_statistics(algo: Any) -> dict[str, float]:
    """Mean and spread of Q of the data's actions over 20,000 transitions, and the calibration gap."""
    rows = np.random.default_rng(0).integers(algo.store.num_offline, size=20_000)
    columns = {name: torch.from_numpy(algo.store.offline_column(name)[rows]) for name in ("obs", "actions")}
    returns = algo.store.offline_column("returns_to_go")[rows]
    module = algo.learner_group._learner._calql_module
    with torch.no_grad():
        q = module.compute_q_values(columns)["qf_preds"].mean(dim=0).numpy()
    return {
        "mean": float(q.mean()),
        "standard deviation": float(q.std()),
        keys.CALIBRATION_GAP: float((q - returns).mean()),
    }


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of the mean over seeds."""
    mean = statistics.mean(values)
    half = Z * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean:8.3f} +- {half:.3f}"


def print_tables(runs: list[Run]) -> None:
    """Results of each precision, and how far Q is from that of the same seed in fp32."""
    print(f"\n{'precision':10} {'at the switch':>18} {'final':>18} {'mean online':>18} {'dip':>18}")
    of_seed = {(one["precision"], one["seed"]): one for one in runs}
    for name in PRECISIONS:
        its = [one for one in runs if one["precision"] == name]
        if its:
            successes = [[success for _, success in one["curve"]] for one in its]
            columns = (
                [curve[0] for curve in successes],
                [curve[-1] for curve in successes],
                [statistics.mean(curve[1:]) for curve in successes],
                [one["dip"] for one in its],
            )
            print(f"{name:10}", *(f"{interval(column):>18}" for column in columns))
    print("\nQ after the same updates from the same seed, beside fp32:")
    for (name, seed), one in sorted(of_seed.items()):
        reference = of_seed.get(("fp32", seed))
        if reference is not None and one["q"]:
            texts = []
            for key, value in one["q"].items():
                exact = reference["q"][key]
                texts.append(f"{key} {value:.3f} ({100 * (value - exact) / abs(reference['q']['mean']):+.2f} %)")
            print(f"{name:7} seed {seed}: " + ", ".join(texts))


def main() -> None:
    """Runs what the file lacks, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON-lines file: read, and added to.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--scale", type=float, default=1.0, help="Factor on updates, env steps and evaluations.")
    parser.add_argument("--parallel", type=int, default=1, help="Runs at once, a thread each if more than one.")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # Precision and seed: in a process of its own.
    options = parser.parse_args()
    if options.one:
        if options.parallel > 1:
            torch.set_num_threads(1)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        finished = run(options.one[0], int(options.one[1]), options.scale)
        with options.output.open("a") as file:
            file.write(json.dumps(finished) + "\n")
        ray.shutdown()
        return
    done = {(one["precision"], one["seed"], one["scale"]) for one in finished_runs(options.output)}
    wanted = [(name, seed) for seed in options.seeds for name in options.precisions]
    waiting = [(name, seed) for name, seed in wanted if (name, seed, options.scale) not in done]
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < options.parallel:
            name, seed = waiting.pop(0)
            settings = ["--output", str(options.output), "--scale", str(options.scale)]
            command = [sys.executable, __file__, *settings, "--parallel", str(options.parallel)]
            running.append(subprocess.Popen([*command, "--one", name, str(seed)]))
        running = [process for process in running if process.poll() is None]
        time.sleep(1.0)
    runs = [one for one in finished_runs(options.output) if one["scale"] == options.scale]
    print_tables([one for one in runs if (one["precision"], one["seed"]) in wanted])


if __name__ == "__main__":
    main()
