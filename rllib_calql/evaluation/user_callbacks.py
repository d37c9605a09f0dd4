"""`call_back`: the user's callbacks around evaluations that RLlib does not make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.rllib.callbacks.utils import make_callback

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm


def call_back(algorithm: Algorithm, when: str, **given: Any) -> None:
    """Calls the callbacks of an algorithm as RLlib does.

    Args:
        algorithm: Whose callbacks, objects and functions.
        when: The hook's name, such as "on_evaluate_start".
        **given: What the hook gets besides the algorithm and its logger of metrics.
    """
    make_callback(
        when,
        callbacks_objects=algorithm.callbacks,
        callbacks_functions=getattr(algorithm.config, f"callbacks_{when}"),
        kwargs={"algorithm": algorithm, "metrics_logger": algorithm.metrics, **given},
    )
