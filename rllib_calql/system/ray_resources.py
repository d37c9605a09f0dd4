"""What a Ray cluster can give and what is asked of it: a place that can never be given is refused, not waited for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

Bundle = Mapping[str, float]

# Ray's own sizes of memory depend on what is free; nobody asks for them by mistake.
_NOT_JUDGED = ("memory", "object_store_memory")
_MAX_NODES_COUNTED = 1_000
_OF_A_GROUP = re.compile(r"_group_(\d+_)?[0-9a-f]{36}$")  # What a placement group holds, which Ray counts once more.
_REMEDIES = {
    "CPU": "lower `num_env_runners`, `num_learners`, `num_cpus_per_env_runner` or `num_cpus_per_learner`",
    "GPU": "set `num_gpus_per_learner` and `num_gpus_per_env_runner` to what there is, 0 for none",
}
_REMEDY_OF_CUSTOM = (
    "name it when the node is started, `ray start --resources='{\"%s\": 1}'`, and give the command `--address auto`; "
    "or drop it from `custom_resources_per_env_runner`, `custom_resources_per_learner` and "
    "`custom_resources_for_main_process`"
)


class UnavailableError(ValueError):
    """Ray can never give what is asked of it. The message says what there is."""


def refuse_unavailable(bundles: Sequence[Bundle], *, who: str = "A trial") -> None:
    """Compares places with what the running Ray has in all, free or not. One that adds nodes by itself may get more.

    Args:
        bundles: One place each, resource -> amount; a place lies on one node.
        who: Asks for them.

    Raises:
        UnavailableError: If they can never be given.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if autoscales():
        to_come = _nodes_to_come()
        if to_come is None:
            return
        nodes += to_come
    _compare(bundles, nodes, who, f"the cluster has {described(_sum(nodes))} on {_nodes(len(nodes))}")


def refuse_unavailable_here(bundles: Sequence[Bundle], *, num_cpus: float | None = None, who: str = "A trial") -> None:
    """The same for a Ray that has yet to be started on this machine.

    Args:
        bundles: As in `refuse_unavailable`.
        num_cpus: CPUs that it will be told to have; None for those of the machine.
        who: Asks for them.

    Raises:
        UnavailableError: If it could never give them.
    """
    node = {"CPU": float(num_cpus or os.cpu_count() or 1), "GPU": float(num_gpus_here())}
    _compare(bundles, [node], who, f"Ray on this machine has {described(node)}")


def refuse_missing_places(config: Any) -> None:
    """Refuses remote workers, and GPUs of the local learner, that Ray can never give a program of the user.

    A trial of Ray Tune has been given all its places before it begins.

    Args:
        config: The algorithm's.

    Raises:
        UnavailableError: If they can never be given.
    """
    import ray
    from ray.rllib.algorithms.utils import _get_env_runner_bundles, _get_learner_bundles

    if ray.is_initialized() and ray.util.get_current_placement_group() is not None:
        return
    bundles = _get_env_runner_bundles(config)
    if config.evaluation_interval and config.evaluation_num_env_runners:
        bundles += _get_env_runner_bundles(config.get_evaluation_config_object())
    local: list[dict[str, float]] = []
    if config.num_learners:
        bundles += _get_learner_bundles(config)
    elif config.num_gpus_per_learner:
        local = [{"GPU": config.num_gpus_per_learner}]
    if local or (bundles and not ray.is_initialized() and "RAY_ADDRESS" not in os.environ):
        refuse_unavailable_here(local or bundles, who="The algorithm")
    if bundles and ray.is_initialized():
        refuse_unavailable(bundles, who="The algorithm")


def num_gpus_here() -> int:
    """GPUs that Ray finds on this machine, of those that `CUDA_VISIBLE_DEVICES` lets it see."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    found = int(manager.get_current_node_num_accelerators())
    visible = manager.get_current_process_visible_accelerator_ids()
    return found if visible is None else min(found, len(visible))


def autoscales() -> bool:
    """Whether the running Ray belongs to a cluster that starts nodes where they are asked for."""
    if _cluster_config() is not None or os.path.exists(os.path.expanduser("~/ray_bootstrap_config.yaml")):
        return True
    return "KUBERNETES_SERVICE_HOST" in os.environ  # Where not every autoscaler tells Ray of itself.


def is_waiting_for_places() -> bool:
    """Whether this job has asked the running Ray for places, and has been given none of them yet."""
    import ray
    from ray.util import placement_group_table

    with suppress(Exception):  # Of a cluster that is busy or ending; the question is asked again.
        job = ray.get_runtime_context().get_job_id()
        # The id of a placement group ends with that of its job.
        states = {group.get("state") for name, group in placement_group_table().items() if name.endswith(job)}
        return "PENDING" in states and "CREATED" not in states
    return False


def described(resources: Bundle) -> str:
    """The amounts in words, as in "2 CPUs and 1 GPU"."""
    parts = []
    for name in sorted(resources, key=lambda name: (name not in ("CPU", "GPU"), name)):
        amount = resources[name]
        if name in _NOT_JUDGED or ":" in name or _OF_A_GROUP.search(name) or (not amount and name != "GPU"):
            continue
        plural = "s" if name in ("CPU", "GPU") and amount != 1 else ""
        parts.append(f"{amount:g} {name}{plural}" if amount else f"no {name}")
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]])) or "nothing"


def total(bundles: Sequence[Bundle]) -> dict[str, float]:
    """All places together."""
    return {name: amount for name, amount in _sum(bundles).items() if amount}


def _compare(bundles: Sequence[Bundle], nodes: Sequence[Bundle], who: str, has: str) -> None:
    asked, there = total(bundles), _sum(nodes)
    missing = [name for name in asked if name not in _NOT_JUDGED and asked[name] > there.get(name, 0) + 1e-6]
    if missing:
        remedies = "; ".join(_REMEDIES.get(name) or _REMEDY_OF_CUSTOM % name for name in missing)
        raise UnavailableError(f"{who} asks for {described(asked)}, but {has}: {remedies}.")
    for bundle in bundles:
        wanted = {name: amount for name, amount in bundle.items() if name not in _NOT_JUDGED}
        if not any(all(node.get(name, 0) + 1e-6 >= amount for name, amount in wanted.items()) for node in nodes):
            raise UnavailableError(
                f"{who} asks for {described(wanted)} on one node, but no node has that: {has}. Ask for less in one "
                "place (`num_cpus_per_learner`, `num_cpus_for_main_process`, and the like), or for more of them."
            )


def _sum(bundles: Sequence[Bundle]) -> dict[str, float]:
    summed: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            summed[name] = summed.get(name, 0.0) + amount
    return summed


def _nodes(number: int) -> str:
    return f"{number} node{'s' if number != 1 else ''}"


def _cluster_config() -> Any:
    """Kinds of nodes that an autoscaler has told Ray; None without one."""
    with suppress(Exception):
        from ray._private.state import state

        config = state.get_cluster_config()
        return config if config is not None and config.node_group_configs else None
    return None


def _nodes_to_come() -> list[dict[str, float]] | None:
    """Nodes that an autoscaler may add at most; None if that is not known or has no bound."""
    config = _cluster_config()
    if config is None:
        return None
    nodes: list[dict[str, float]] = []
    for group in config.node_group_configs:
        resources = {name: float(amount) for name, amount in group.resources.items()}
        if not 0 <= group.max_count <= _MAX_NODES_COUNTED or min(resources.values(), default=0) < 0:
            return None
        nodes += [resources] * group.max_count
    return nodes
