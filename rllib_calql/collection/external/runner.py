"""`ExternalEnvRunner`: an env runner whose environments are control loops elsewhere, which act by its policy."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core import COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import SAMPLE_TIMER
from ray.util import log_once

from rllib_calql.checkpoints.versions import versions_here
from rllib_calql.collection.callbacks import ENV_STEPS
from rllib_calql.collection.clients import RunNotes
from rllib_calql.collection.external.episodes import EpisodeSpaces
from rllib_calql.collection.external.server import ClientServer
from rllib_calql.common.encoding import encoded_space
from rllib_calql.common.spaces import check_action_space, check_observation_space
from rllib_calql.environments.resolving import resolve_env
from rllib_calql.export.reading import described_actions, policy_data
from rllib_calql.policy.file_format import packed
from rllib_calql.policy.spaces import described_space
from rllib_calql.settings.external_clients import check_describable
from rllib_calql.system import activity

logger = logging.getLogger(__name__)

SECONDS_OF_A_ROUND = 30.0  # At most, that a request for a whole episode waits for clients that are connected.
_SECONDS_OF_A_REQUEST = 0.5  # That one for a number of env steps waits.
_SECONDS_WITHOUT_CLIENTS = 1.0
_MIN_TOKEN = 16


class ExternalEnvRunner(SingleAgentEnvRunner):
    """Hands the policy to clients (`rllib_calql.PolicyClient`), and hands out the episodes that they send.

    It is of the kind of RLlib's `EnvRunnerServerForExternalInference`: clients act by themselves. There is no
    environment in it. The runner with index i of several listens at `external_port` + i - 1, a local one at
    `external_port`. Clients are told a policy once the runner is asked for episodes for the first time.

    Args:
        config: With `external_port` and both spaces set.
        **kwargs: RLlib's.
    """

    listens_for_clients = True

    @override(SingleAgentEnvRunner)
    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        observation_space, action_space = config.observation_space, config.action_space
        spaces = {
            INPUT_ENV_SPACES: (observation_space, action_space),
            INPUT_ENV_SINGLE_SPACES: (observation_space, action_space),
            DEFAULT_MODULE_ID: (encoded_space(observation_space), action_space),
        }
        super().__init__(config=config, **{**kwargs, "spaces": spaces})
        self.num_envs = 0
        self._needs_initial_reset: bool = True
        self._incarnation = uuid.uuid4().hex  # Receipts of a process that is lost mean nothing to the next one.
        self._notes = RunNotes(run="")
        self._is_policy_new = True
        self._policy_id: str | None = None
        self._server: ClientServer | None = None
        if self.worker_index or not self.config.num_env_runners:  # A local one beside remote ones only holds weights.
            self._server = ClientServer(
                config.external_host,
                config.external_port + max(0, (self.worker_index or 0) - 1),
                token=read_token(config.external_token_file),
                spaces=EpisodeSpaces(observation_space, action_space, config.episode_limit_env_steps),
                descriptions={
                    "observation_space": described_space(observation_space),
                    "action_space": described_actions(action_space),
                },
                package=str(versions_here()["rllib-calql"]),
            )

    @override(SingleAgentEnvRunner)
    def make_env(self) -> None:
        """There is none: clients have them."""
        self.env = None

    @override(SingleAgentEnvRunner)
    def assert_healthy(self) -> None:
        """RLlib's, without an environment."""
        assert self.module is not None

    @override(SingleAgentEnvRunner)
    def set_state(self, state: Any) -> None:
        """RLlib's; clients get the policy with the next request."""
        super().set_state(state)
        self._is_policy_new |= COMPONENT_RL_MODULE in state

    def take_notes(self, notes: RunNotes) -> None:
        """Takes what a request says of the run; clients hear what of their episodes is stored."""
        self._notes = notes
        if self._server is not None and notes.receipt is not None and notes.receipt[0] == self._incarnation:
            self._server.mailbox.confirm(notes.receipt[1])

    @property
    def receipt(self) -> tuple[str, int] | None:
        """What a later request has to note as taken, so that clients hear of it."""
        return None if self._server is None else (self._incarnation, self._server.mailbox.num_handovers)

    @property
    def num_clients(self) -> int:
        """Clients that are connected."""
        return 0 if self._server is None else self._server.mailbox.num_clients

    @override(SingleAgentEnvRunner)
    def sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[SingleAgentEpisode]:
        """Hands out the whole episodes that clients have sent, and waits for some if there are none.

        Args:
            num_timesteps: If set, it waits half a second at most, for the first episode.
            num_episodes: Episodes to wait for, half a minute at most; one by default. All that are here are handed out.
            explore: Clients explore by themselves.
            random_actions: Whether they are to draw actions uniformly.
            force_reset: Clients reset by themselves.

        Returns:
            Whole episodes; none if none came.

        Raises:
            ValueError: If this runner does not listen, since there are remote ones that do.
        """
        if self._server is None:
            raise ValueError("The local env runner has no clients; those of the remote ones collect.")
        if self._needs_initial_reset:  # What was not confirmed until now has been given up.
            self._server.mailbox.take_back()
            self._needs_initial_reset = False
        self._publish(is_random=random_actions or self.module.explores_randomly)
        wait = _SECONDS_OF_A_REQUEST if num_timesteps is not None else SECONDS_OF_A_ROUND
        with self.metrics.log_time(SAMPLE_TIMER):
            episodes = self._server.mailbox.collect(
                num_episodes or 1,
                timeout_s=min(wait, self.config.sample_timeout_s / 2),
                idle_timeout_s=min(wait, _SECONDS_WITHOUT_CLIENTS),
            )
        self._note(episodes)
        return episodes

    @override(SingleAgentEnvRunner)
    def stop(self) -> None:
        """Ends the connections to clients, which try again."""
        if self._server is not None:
            self._server.close()

    def _publish(self, *, is_random: bool) -> None:
        assert self._server is not None
        notes, content = self._notes, None
        if self._is_policy_new:
            about = {"checkpoint": {"run": notes.run, "num_updates": notes.num_updates}, "versions": versions_here()}
            try:
                data = policy_data(
                    self.module, observation_space=described_space(self.config.observation_space), about=about
                )
            except ValueError as error:
                if log_once("calql_policy_not_sent"):
                    logger.warning("Clients keep the policy that they have: %s", error)
            else:
                content = packed(data.metadata, data.arrays)
                self._policy_id = hashlib.sha256(content).hexdigest()
            self._is_policy_new = False
        self._server.mailbox.publish(
            notes.run, content, self._policy_id, version=notes.num_updates, is_random=is_random
        )

    def _note(self, episodes: Sequence[SingleAgentEpisode]) -> None:
        num_env_steps = sum(len(episode) for episode in episodes)
        if (meter := getattr(self, "_calql_meter", None)) is not None:
            meter.num_env_steps += num_env_steps
        self.num_env_steps_sampled_lifetime += num_env_steps
        activity.count(ENV_STEPS, num_env_steps)
        self._increase_sampled_metrics(num_env_steps, len(episodes))
        self._done_episodes_for_metrics += episodes
        for which, arguments in [
            *(("on_episode_end", {"episode": episode, "prev_episode_chunks": [], "env": None}) for episode in episodes),
            ("on_sample_end", {"samples": episodes}),
        ]:
            if which == "on_episode_end":
                arguments |= {"rl_module": self.module, "env_index": 0}
            make_callback(
                which,
                callbacks_objects=self._callbacks,
                callbacks_functions=getattr(self.config, f"callbacks_{which}"),
                kwargs={"env_runner": self, "metrics_logger": self.metrics, **arguments},
            )


def with_client_runners(config: Any) -> Any:
    """A config whose env runners listen for clients, with the spaces of its environment; the same without clients.

    Args:
        config: The algorithm's.

    Raises:
        ValueError: If observations cannot be sent, or a space is one that cannot be learned on.
        RuntimeError: If the environment cannot be made.
    """
    if not config.has_clients:
        return config
    changed = config.copy(copy_frozen=False)
    changed.env_runner_cls = config.env_runner_cls or ExternalEnvRunner
    if config.env is not None and (config.observation_space is None or config.action_space is None):
        env: Any = resolve_env(config.env).make(config.env_config)
        changed.observation_space = config.observation_space or env.observation_space
        changed.action_space = config.action_space or env.action_space
        env.close()
    check_action_space(changed.action_space, "The action space")
    check_observation_space(changed.observation_space, "The observation space")
    check_describable(changed.observation_space)
    read_token(config.external_token_file)
    changed.freeze()
    return changed


def read_token(path: str | None) -> str | None:
    """The token in a file; None without one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds none that is hard to guess.
    """
    if path is None:
        return None
    remedy = f'`python -c "import secrets; print(secrets.token_hex(32))" > {path}` writes one'
    try:
        token = Path(path).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as err:
        kind = FileNotFoundError if isinstance(err, FileNotFoundError) else ValueError
        raise kind(f"`external_token_file` {path!r} cannot be read ({err}); {remedy}.") from err
    if len(token) < _MIN_TOKEN:
        raise ValueError(
            f"`external_token_file` {path!r} holds {len(token)} characters, which can be guessed; a token has at least "
            f"{_MIN_TOKEN}: {remedy}."
        )
    return token
