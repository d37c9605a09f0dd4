"""Gradient steps as CUDA graphs: what one step launches is recorded once, then replayed by a single launch.

A step of Cal-QL launches some hundred small kernels. On a GPU they take less time than Python needs to launch them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

_NUM_WARM_UP_STEPS = 3  # PyTorch's recipe: libraries and optimisers allocate what lasts in the first steps.

logger = logging.getLogger(__name__)

Columns = Mapping[str, Tensor]
Step = Callable[[dict[str, Tensor]], object]


class Recorder(Protocol):
    """Records what a function launches."""

    def warm_up(self, function: Callable[[], object]) -> None:
        """Calls it in the way that recording needs beforehand."""
        ...

    def record(self, function: Callable[[], object]) -> Callable[[], None]:
        """Calls it without effect, and returns what replays it.

        Raises:
            RuntimeError: If it does something that cannot be recorded, such as reading a number back to the host.
        """
        ...


class CudaRecorder:
    """Records on the current GPU.

    Args:
        generator: Random generator of that GPU. Each replay draws new numbers from it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def warm_up(self, function: Callable[[], object]) -> None:
        """Calls it on a stream of its own."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], object]) -> Callable[[], None]:
        """Records a graph."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        replay: Callable[[], None] = graph.replay
        return replay


class GraphedSteps:
    """Makes steps on mini-batches laid end to end, by replay as soon as a kind of step has been recorded.

    The mini-batches lie in buffers that stay where they are, and the step finds its own by a counter on the device, so
    that a replay is one launch and no copy.

    Args:
        step: Makes one step. All that outlasts it must be changed in place, and nothing be read back.
        recorder: Records.
        device: Of the step.
    """

    def __init__(self, step: Step, recorder: Recorder, device: torch.device) -> None:
        self._step = step
        self._recorder = recorder
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._buffers: dict[str, Tensor] = {}
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._num_calls: Counter[Hashable] = Counter()
        self._is_given_up = False

    def forget(self) -> None:
        """Drops all recordings, after a change of tensors that the step refers to."""
        self._replays.clear()
        self._num_calls.clear()

    def run(self, columns: Columns, batch_size: int, kinds: Iterable[Hashable]) -> None:
        """Makes one step per mini-batch.

        Args:
            columns: Mini-batches of `batch_size` rows, one after another.
            batch_size: Rows of each.
            kinds: What decides on the launches of each step, apart from shapes.
        """
        if not self._is_given_up:
            self._load(columns)
        for number, kind in enumerate(kinds):
            key = (kind, batch_size)
            is_warm = self._num_calls[key] >= _NUM_WARM_UP_STEPS
            if is_warm and key not in self._replays and not self._is_given_up:
                self._record(key, batch_size)
            if self._is_given_up:
                start = number * batch_size
                self._step({name: column[start : start + batch_size] for name, column in columns.items()})
            elif is_warm:
                self._replays[key]()
            else:
                self._num_calls[key] += 1
                self._recorder.warm_up(lambda: self._step_from_buffers(batch_size))

    def _load(self, columns: Columns) -> None:
        """Copies mini-batches into the buffers, which grow if they have to."""
        for name, column in columns.items():
            buffer = self._buffers.get(name)
            if buffer is None or len(buffer) < len(column) or buffer.shape[1:] != column.shape[1:]:
                self._buffers[name] = torch.empty_like(column)
                self.forget()
            self._buffers[name][: len(column)].copy_(column)
        self._position.zero_()

    def _step_from_buffers(self, batch_size: int) -> None:
        rows = self._position * batch_size + torch.arange(batch_size, device=self._position.device)
        self._position.add_(1)
        self._step({name: buffer.index_select(0, rows) for name, buffer in self._buffers.items()})

    def _record(self, key: Hashable, batch_size: int) -> None:
        try:
            self._replays[key] = self._recorder.record(lambda: self._step_from_buffers(batch_size))
        except RuntimeError as error:
            self._is_given_up = True
            self._buffers.clear()
            logger.warning(
                "An update cannot be recorded as a CUDA graph, so Python launches every kernel, which is slower: %s",
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            )


def graphed_steps(step: Step, generator: torch.Generator, device: Any) -> GraphedSteps | None:
    """Steps as graphs where the device can record them, else None."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return GraphedSteps(step, CudaRecorder(generator), device)
