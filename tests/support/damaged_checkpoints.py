"""Damage to files of a checkpoint, one at a time, and what a restore makes of each; for tests and benchmarks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tree
from tiny import assert_identical, run_state

from rllib_calql import CalQL


@dataclass
class Trials:
    """What came of the damages.

    Attributes:
        num_named: Errors whose message names the damaged file.
        num_exact: Restores to exactly the state that was saved.
        wrong: Everything else.
    """

    num_named: int = 0
    num_exact: int = 0
    wrong: list[str] = field(default_factory=list)


def files_of(checkpoint: Path) -> list[str]:
    """Names of all files in a checkpoint, sorted."""
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def flipped(content: bytes, bit: int) -> bytes:
    """The content with one bit the other way round."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@contextmanager
def content_replaced(path: Path, content: bytes | None) -> Iterator[None]:
    """Gives a file this content, or removes it, and takes that back."""
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def damages(content: bytes, *, num_bits: int, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """What may have become of a file: gone, empty, half of it, single bits flipped."""
    yield "missing", None
    yield "empty", b""
    yield "halved", content[: len(content) // 2]
    for bit in rng.sample(range(8 * len(content)), min(num_bits, 8 * len(content))):
        yield f"bit {bit}", flipped(content, bit)


def state_of(algo: CalQL) -> Any:
    """Weights, optimisers, counters, online data, random states."""
    learner = dict(algo.learner_group.get_state()["learner"])
    for name in ("metrics_logger", "weights_seq_no", "should_module_be_updated"):
        learner.pop(name, None)
    # Copied, since tensors and columns are those in use.
    return tree.map_structure(lambda leaf: leaf.copy() if hasattr(leaf, "copy") else leaf, (learner, run_state(algo)))


def is_same(one: Any, other: Any) -> bool:
    """Whether two states are equal bit for bit."""
    try:
        assert_identical(one, other)
    except (AssertionError, ValueError, TypeError):
        return False
    return True


def damage_every_file(algo: CalQL, checkpoint: Path, saved: Any, *, num_bits: int, seed: int = 0) -> Trials:
    """Restores an algorithm from a checkpoint again and again, each time with damage to one file.

    Args:
        algo: Has been trained since the checkpoint was saved.
        checkpoint: The checkpoint; it is as before in the end.
        saved: `state_of(algo)` then.
        num_bits: Bits flipped in each file, one at a time.
        seed: Of the draw of the bits.
    """
    own = state_of(algo)
    assert not is_same(own, saved)
    rng, trials = random.Random(seed), Trials()
    for name in files_of(checkpoint):
        for kind, damaged in damages((checkpoint / name).read_bytes(), num_bits=num_bits, rng=rng):
            error = None
            with content_replaced(checkpoint / name, damaged):
                try:
                    algo.restore_from_path(checkpoint)
                except Exception as err:
                    error = err
            if error is None and is_same(state_of(algo), saved):
                trials.num_exact += 1
                algo.train()
                own = state_of(algo)
            elif isinstance(error, ValueError) and f"'{name}'" in str(error) and is_same(state_of(algo), own):
                trials.num_named += 1
            else:
                result = f"{type(error).__name__}: {error}" if error else "another state without a word"
                trials.wrong.append(f"{name}, {kind}: {result}")
    return trials
