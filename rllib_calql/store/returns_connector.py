"""`AddReturnsToGo`: the connector that attaches Monte-Carlo returns to whole episodes, offline and online alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils.annotations import override

from rllib_calql.common.returns import RewardSettings, returns_of_episodes, tail_discounts

TAIL_DISCOUNT = "returns_to_go_tail_discount"  # gamma^(T-t): weight of the last observation's value in G_t.


class AddReturnsToGo(ConnectorV2):
    """Adds a `returns_to_go` column (extra model output, shape (T,)) to whole, finished episodes.

    Unlike RLlib's `ComputeReturnsToGo`, which sums whatever piece of an episode it is handed, pieces are refused. The
    episode's rewards stay in the environment's units; scale and bias enter the returns only.

    With `truncation="bootstrap"` the value of the last observation is not known here. The column then holds the sum of
    rewards alone, and a second column `returns_to_go_tail_discount` holds the weight of that value, so that the store
    can add the learner's estimate: G_t = returns_to_go + tail_discount * V(last observation).

    Args:
        settings: Discount, scaling and rules.
        input_observation_space: RLlib's convention, passed through.
        input_action_space: RLlib's convention, passed through.
        **kwargs: RLlib's convention.

    Source:
        Nakamoto et al. 2023, arXiv:2303.05479, section 5.
    """

    def __init__(
        self,
        settings: RewardSettings,
        input_observation_space: Any = None,
        input_action_space: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_observation_space, input_action_space, **kwargs)
        self.settings = settings

    @override(ConnectorV2)
    def __call__(
        self,
        *,
        rl_module: Any = None,
        batch: dict[str, Any],
        episodes: list[SingleAgentEpisode],
        explore: bool | None = None,
        shared_data: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Writes the columns into `episodes`; `batch` is returned as it is.

        Raises:
            ValueError: If an episode has not ended, or begins in the middle.
        """
        for episode in episodes:
            _check_is_whole(episode)
        if episodes:
            self._annotate(episodes)
        return batch

    def returns_of_block(
        self, rewards: npt.NDArray[Any], lengths: npt.NDArray[Any], terminateds: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """The same for episodes that are rows of arrays, as readers of offline data deliver them.

        Args:
            rewards: Environment rewards of E whole episodes, one after another, shape (R,).
            lengths: Steps of each episode, shape (E,).
            terminateds: Whether each episode ended by termination, shape (E,).

        Returns:
            Returns-to-go without the value of any last observation, shape (R,), and which episodes' returns that value
            is to be added to, shape (E,).
        """
        no_values = np.zeros(len(lengths))
        return returns_of_episodes(
            rewards, lengths, terminateds=terminateds, settings=self.settings, last_values=no_values
        )

    def _annotate(self, episodes: list[SingleAgentEpisode]) -> None:
        lengths = np.array([len(episode) for episode in episodes])
        rewards = np.concatenate([np.asarray(episode.get_rewards(), dtype=np.float64) for episode in episodes])
        terminateds = np.array([episode.is_terminated for episode in episodes])
        returns, has_tail = self.returns_of_block(rewards, lengths, terminateds)
        stops = np.cumsum(lengths)
        for episode, stop, tail in zip(episodes, stops.tolist(), has_tail.tolist(), strict=True):
            columns = {Columns.RETURNS_TO_GO: returns[stop - len(episode) : stop]}
            if self.settings.truncation == "bootstrap":
                weights = tail_discounts(len(episode), self.settings.gamma)
                columns[TAIL_DISCOUNT] = weights if tail else np.zeros_like(weights)
            for name, column in columns.items():
                episode.extra_model_outputs[name] = InfiniteLookbackBuffer(column, lookback=0)


def _check_is_whole(episode: SingleAgentEpisode) -> None:
    if not (episode.is_terminated or episode.is_truncated):
        raise ValueError(
            f"Episode {episode.id_} ends neither terminated nor truncated, so its return-to-go is unknown; "
            "drop it or mark its last step."
        )
    if episode.t_started != 0:
        raise ValueError(
            f"Episode {episode.id_} begins at step {episode.t_started}; join its pieces before computing returns."
        )
