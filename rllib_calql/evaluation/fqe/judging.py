"""`score_checkpoints`: several checkpoints judged by the same data, which are read once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rllib_calql.checkpoints.manifest import BEHAVIOUR, Manifest, is_same_behaviour
from rllib_calql.checkpoints.reading import read_of_one_save
from rllib_calql.common.encoding import encoded_space, flat_size, observation_dtype
from rllib_calql.common.returns import reward_settings
from rllib_calql.common.spaces import difference_of
from rllib_calql.evaluation.fqe.data import JudgedData
from rllib_calql.evaluation.fqe.fitting import FQESettings
from rllib_calql.evaluation.fqe.policies import CheckpointPolicy, read_policy
from rllib_calql.evaluation.fqe.scoring import Score, score_policy
from rllib_calql.store.offline_data import CalQLOfflineData
from rllib_calql.store.replay import TransitionStore
from rllib_calql.store.returns_connector import AddReturnsToGo
from rllib_calql.store.split import Split, split_episodes

_MOST_AT_ONCE = 4  # Fits, each of which holds its rows in memory.
HELD_OUT_OTHERS = (
    "it was trained on some of the episodes that it is judged by, since its hold-out is another one; score it by a "
    "command of its own, and train with the same `validation_fraction` and `validation_seed` the next time"
)
TRAINED_ON = "it was trained on the episodes that it is judged by; set `validation_fraction` for the next training"
EXPECTED = (OSError, ValueError, ImportError, RuntimeError)  # What a broken checkpoint, or one of other data, raises.


@dataclass(frozen=True)
class Judged:
    """One checkpoint with what became of it.

    Attributes:
        checkpoint: Its folder.
        score: What the data say of its policy; None if it could not be judged.
        error: Why not.
    """

    checkpoint: str
    score: Score | None
    error: str = ""


class _OverError(Exception):
    """Ends a fit that nobody waits for any more."""


@dataclass(frozen=True)
class _Candidate:
    place: int
    read: CheckpointPolicy
    remarks: Sequence[str]


def score_checkpoints(
    checkpoints: Sequence[tuple[Any, str]],
    *,
    input_: Any = None,
    updates: int | None = None,
    needs_environment: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    before_reading: Callable[[Any, str], None] = lambda filesystem, path: None,
) -> list[Judged]:
    """Judges the greedy policies of checkpoints by one set of data, read by the settings of the first that has any.

    A checkpoint that is broken, or of other data or spaces, is named and left out; the others are judged.

    Args:
        checkpoints: File system and folder of each.
        input_: The data; None for those that the checkpoints were trained on.
        updates: Of each fit; None for the default number.
        needs_environment: Whether a checkpoint without an environment is left out as well.
        say: Told what is being done.
        on_progress: Told how many updates are made, of all fits together, and of how many.
        before_reading: Called with each checkpoint before it is unpickled.

    Returns:
        One for each checkpoint, in their order.

    Raises:
        OSError: If the data cannot be read.
        ValueError: If they cannot be judged by, or do not fit the first checkpoint.
    """
    outcomes: dict[int, Judged] = {}
    read: list[tuple[int, CheckpointPolicy]] = []
    for place, (filesystem, path) in enumerate(checkpoints):
        say(f"reading checkpoint {place + 1} of {len(checkpoints)}")
        try:
            before_reading(filesystem, path)
            one = read_of_one_save(path, filesystem, read_policy)
            if needs_environment and one.config.env is None:
                raise ValueError("it was trained on data alone, without an environment; name one with `--env`.")
            if input_ is None and not one.config.is_offline:
                raise ValueError(
                    "it was trained without offline data, so there is nothing to judge it by; give `--data`."
                )
        except EXPECTED as error:
            outcomes[place] = Judged(path, None, " ".join(str(error).split()))
        else:
            read.append((place, one))
    if read:
        say("reading data")
        first = read[0][1]
        data, own = _read_data([one for _, one in read], input_)
        candidates = []
        for place, one in read:
            problem = _misfit(first, one, with_own_data=input_ is None)
            if problem is not None:
                outcomes[place] = Judged(checkpoints[place][1], None, problem)
            else:
                remarks = _remarks(data, one, own, is_other_data=input_ is not None)
                candidates.append(_Candidate(place, one, remarks))
        for place, score in _scores(data, candidates, updates, on_progress).items():
            path = checkpoints[place][1]
            outcomes[place] = Judged(path, score) if isinstance(score, Score) else Judged(path, None, score)
    return [outcomes[place] for place in range(len(checkpoints))]


def settings_for(config: Any, updates: int | None = None) -> FQESettings:
    """Of a fit that judges a policy of that config: critics of the size of its own, of which nothing is read."""
    given = {} if updates is None else {"updates": updates}
    return FQESettings(hiddens=tuple(config.model_config["critic_hiddens"]), **given)


def _scores(
    data: JudgedData,
    candidates: Sequence[_Candidate],
    updates: int | None,
    on_progress: Callable[[int, int], None],
) -> dict[int, Score | str]:
    """Fits side by side, one thread each: small products gain little from several."""
    lock, is_over = threading.Lock(), threading.Event()
    done = {candidate.place: 0 for candidate in candidates}
    all_settings = {one.place: settings_for(one.read.config, updates) for one in candidates}
    total = sum(settings.updates for settings in all_settings.values())

    def judge(candidate: _Candidate) -> Score | str:
        def count(num_updates: int) -> None:
            if is_over.is_set():
                raise _OverError
            with lock:
                done[candidate.place] = num_updates
                on_progress(sum(done.values()), total)

        try:
            return score_policy(
                data,
                candidate.read.policy,
                all_settings[candidate.place],
                remarks=candidate.remarks,
                on_progress=count,
            )
        except EXPECTED as error:
            return " ".join(str(error).split())

    num_workers = max(1, min(len(candidates), os.cpu_count() or 1, _MOST_AT_ONCE))
    num_threads = torch.get_num_threads()
    if num_workers > 1:
        torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_workers) as pool:
            try:
                return dict(zip((one.place for one in candidates), pool.map(judge, candidates), strict=True))
            finally:
                is_over.set()  # Where the user interrupts, the pool waits for the fits that go on.
    finally:
        torch.set_num_threads(num_threads)


def _read_data(checkpoints: Sequence[CheckpointPolicy], input_: Any) -> tuple[JudgedData, Manifest]:
    """The data with what a manifest says of them, read as the run of the first checkpoint reads them.

    Held out is what the first one that holds out some of them has held out: one without a hold-out has seen all, and is
    judged by some episodes as well as by others.
    """
    first = checkpoints[0]
    config = first.config
    if input_ is not None:
        config.input_ = input_
        config.validation_fraction = 0.0  # Its hold-out may be of other data.
        if config.reference_column is not None:  # Bounds of training; values are fitted to rewards.
            config.reference_value, config.use_recorded_returns = "returns_to_go", False
    config.n_step = 1  # Of training targets; a short episode is as good as any here.
    store = TransitionStore(
        obs_dim=flat_size(first.observation_space),
        action_dim=flat_size(first.action_space),
        online_capacity=1,
        obs_dtype=observation_dtype(encoded_space(first.observation_space)),
    )
    rewards = reward_settings(config)
    try:
        data = CalQLOfflineData(config)
    except FileNotFoundError as error:
        if input_ is not None:
            raise
        raise FileNotFoundError(f"{error} The checkpoint was trained on it; if it has moved, give `--data`.") from error
    data.load(
        store,
        AddReturnsToGo(rewards),
        observation_space=first.observation_space,
        action_space=first.action_space,
    )
    assert store.offline is not None
    own = {
        "offline_data": {"fingerprint": store.offline.fingerprint()},
        BEHAVIOUR: store.offline.behaviour_fingerprint(),
    }
    split = store.split
    if split is None:
        of_these = [one for one in checkpoints if is_same_behaviour(one.manifest, own)]
        found = (_split_of(one, store.offline.lengths) for one in of_these)  # Of the same data at another place, too.
        split = next((one for one in found if one is not None), None)
    return JudgedData(store.offline, split, rewards=rewards), own


def _split_of(one: CheckpointPolicy, lengths: npt.NDArray[np.int64]) -> Split | None:
    """What the training of a checkpoint held out of these data; None if nothing, or nothing that is known."""
    held_out = one.manifest.get("hold_out") or {}  # Manifests of earlier versions have none.
    if not held_out:
        return None
    with suppress(ValueError):  # Of fewer episodes than there were.
        split = split_episodes(lengths, fraction=held_out["validation_fraction"], seed=held_out["validation_seed"])
        if split is not None and split.fingerprint() == held_out["fingerprint"]:
            return split
    return None


def _misfit(first: CheckpointPolicy, other: CheckpointPolicy, *, with_own_data: bool) -> str | None:
    """Why a checkpoint cannot be judged by the data of the first one; None if it can."""
    remedy = "score it by a command of its own"
    for name, space in first.manifest["spaces"].items():
        own = other.manifest["spaces"][name]
        is_same = space["size"] == own["size"] and all(
            space[bound] == own[bound] for bound in ("low", "high") if bound in space
        )
        if is_same and "structure" in space and "structure" in own:
            is_same = difference_of(space["structure"], own["structure"]) is None
        if not is_same:
            return (
                f"it was made with the {name.replace('_', ' ')} {own['space']}, the data are those of the first "
                f"checkpoint, which has {space['space']}; {remedy}."
            )
    if with_own_data and other is not first and _input_of(other) != _input_of(first):
        return (
            f"it was trained on other data, `input_` {other.config.input_!r}, than the first checkpoint, "
            f"{first.config.input_!r}; {remedy}, or judge all of them by `--data`."
        )
    return None


def _input_of(one: CheckpointPolicy) -> Any:
    input_ = one.config.input_
    return [str(part) for part in input_] if isinstance(input_, (list, tuple)) else [str(input_)]


def _remarks(data: JudgedData, one: CheckpointPolicy, own: Manifest, *, is_other_data: bool) -> list[str]:
    """What is to be known of a policy before it is judged by these data."""
    remarks = []
    stored: Mapping[str, Any] = one.manifest["offline_data"]
    if is_same_behaviour(one.manifest, own) or not is_other_data:
        held_out = _split_of(one, data.table.lengths)
        if held_out is None:
            remarks.append(TRAINED_ON)
        elif not np.isin(data.split.held_out_episodes, held_out.held_out_episodes).all():
            remarks.append(HELD_OUT_OTHERS)
    if not is_other_data and stored.get("transitions") != len(data.table):
        remarks.append(
            f"it was trained on {stored.get('transitions'):,} transitions of `input_`, which now has "
            f"{len(data.table):,}"
        )
    if one.config.gamma != data.gamma:
        remarks.append(f"it was trained with `gamma` {one.config.gamma}, and is judged by {data.gamma}")
    return remarks
