"""An update of fitted Q evaluation beside its matrix products alone, measured in turn.

Two critics of two layers of 256, observations 29, actions 8. The products are those that an update cannot do without:
forward through the targets and the critics, and back to the weights of every layer. Prints a table and writes JSON.
Keep the machine quiet while it runs.

    python tests/benchmarks/fqe.py --output fqe.json
    python tests/benchmarks/fqe.py --threads 1 --batch-sizes 1024
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rllib_calql.evaluation.fqe.critics import FQECritics, with_ones

OBS_DIM, ACTION_DIM, WIDTH, NUM_CRITICS = 29, 8, 256, 2


def update(batch_size: int) -> Callable[[], object]:
    """One gradient update on a batch that is there."""
    critics = FQECritics(OBS_DIM + ACTION_DIM, [WIDTH, WIDTH], batch_size=batch_size, num_critics=NUM_CRITICS)
    inputs, next_inputs = (with_ones(torch.randn(batch_size, OBS_DIM + ACTION_DIM)) for _ in range(2))
    rewards, discounts = torch.randn(batch_size), torch.full((batch_size,), 0.99)
    return lambda: critics.step(inputs, next_inputs, rewards, discounts, learning_rate=1e-4, tau=0.01)


def products(batch_size: int) -> Callable[[], object]:
    """The matrix products of such an update, without biases, activations, optimiser and targets.

    Each network has weights of its own, and each critic gradients of its own, as in any update; activations go to the
    same three buffers.
    """
    inputs, next_inputs = (torch.randn(batch_size, OBS_DIM + ACTION_DIM) for _ in range(2))
    sizes = ((OBS_DIM + ACTION_DIM, WIDTH), (WIDTH, WIDTH), (WIDTH,))
    networks, targets, gradients = ([[torch.randn(size) for size in sizes] for _ in range(NUM_CRITICS)] for _ in "123")
    below, above, back = (torch.empty(batch_size, WIDTH) for _ in range(3))
    q = torch.empty(batch_size)

    def forward(rows: torch.Tensor, first: torch.Tensor, second: torch.Tensor, last: torch.Tensor) -> None:
        torch.mm(rows, first, out=below)
        torch.mm(below, second, out=above)
        torch.mv(above, last, out=q)

    def run() -> None:
        for target in targets:
            forward(next_inputs, *target)
        for weights, (grad_first, grad_second, grad_last) in zip(networks, gradients, strict=True):
            forward(inputs, *weights)
            torch.mv(above.t(), q, out=grad_last)
            torch.mm(below.t(), above, out=grad_second)
            torch.mm(above, weights[1].t(), out=back)
            torch.mm(inputs.t(), back, out=grad_first)

    return run


def measure(batch_size: int, rounds: int) -> dict[str, float]:
    """Milliseconds of both, medians of rounds in turn, and the median of the ratios of a round."""
    kinds = {"update": update(batch_size), "products": products(batch_size)}
    repeats = max(1, 20_480 // batch_size)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 2):
        for name, call in kinds.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            if number >= 2:  # The first ones warm up.
                times[name].append(1e3 * (time.perf_counter() - begin) / repeats)
    ratios = [one / other for one, other in zip(times["update"], times["products"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return {
        "batch_size": batch_size,
        "update_ms": statistics.median(times["update"]),
        "products_ms": statistics.median(times["products"]),
        "ratio": ratio,
        "ratio_25": low,
        "ratio_75": high,
        "ratio_of_fastest": min(times["update"]) / min(times["products"]),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for batch_size in arguments.batch_sizes:
        rows.append(measure(batch_size, arguments.rounds) | {"threads": arguments.threads})
        print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
