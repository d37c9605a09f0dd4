"""Whether `conservative_online=False` without offline data is SAC: Pendulum from scratch beside RLlib's own SAC.

Both have the same networks, rates, batches and updates: 1,000 random env steps, then one update per env step from
uniform replay. Both are judged by the same loop, 10 greedy episodes with the same initial states every 1,000 env steps.
What cannot be set alike: RLlib's SAC has Huber's loss where Cal-QL has the squared error, clips log standard deviations
to [-5, 2] and not to [-20, 2], and begins with a standard deviation of 1 before squashing, not 1/e; Cal-QL scales and
shifts that by two more parameters; Adam's eps is 1e-7 there and 1e-8 here. RLlib updates after every env step, Cal-QL
after every episode, as often.

Every finished run is a line of the output file; runs that are in it are not repeated. A run takes about six minutes on
one core, with RLlib's own replay buffer ("rllib-episodes") about twenty.

    python tests/benchmarks/sac_pendulum.py --output sac_pendulum.jsonl --picture sac_pendulum.png
    python tests/benchmarks/sac_pendulum.py --output short.jsonl --seeds 0 --env-steps 2000
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import ray
import torch
from learner_curves import finished_runs
from ray.rllib.algorithms.sac import SAC, SACConfig
from ray.rllib.algorithms.sac.sac_catalog import SACCatalog
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.models.base import ENCODER_OUT
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME, TD_ERROR_KEY
from scipy import stats
from torch import Tensor, nn

from rllib_calql import CalQLConfig

ENV = "Pendulum-v1"
PROGRAMS = ("rllib", "calql", "rllib-episodes")  # The last with RLlib's own replay buffer.
NAMES = {"rllib": "RLlib's SAC", "calql": "CalQL", "rllib-episodes": "the same, own buffer"}
HIDDENS = [256, 256]
RATE = 3e-4
WARMUP_ENV_STEPS = 1_000
EVALUATION_PERIOD = 1_000  # Env steps.
EVALUATION_SEEDS = range(1_000, 1_010)
SOLVED = -250.0
SETTINGS: dict[str, Any] = {
    "gamma": 0.99,
    "tau": 5e-3,
    "initial_alpha": 1.0,
    "target_entropy": "auto",
    "actor_lr": RATE,
    "critic_lr": RATE,
    "alpha_lr": RATE,
    "train_batch_size_per_learner": 256,
}

COLUMNS: dict[str, Any] = {
    Columns.OBS: np.float32,
    Columns.NEXT_OBS: np.float32,
    Columns.ACTIONS: np.float32,
    Columns.REWARDS: np.float32,
    Columns.TERMINATEDS: np.bool_,
}

Run = dict[str, Any]


class ConcatenationEncoder(nn.Module):
    """Hidden layers of a critic that sees [s, a], as Haarnoja et al. 2018 have it. RLlib encodes s and a apart."""

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        widths = [num_inputs, *HIDDENS]
        layers = [
            layer for size, following in itertools.pairwise(widths) for layer in (nn.Linear(size, following), nn.ReLU())
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features of the batch's states and actions."""
        return {ENCODER_OUT: self.layers(torch.cat([batch[Columns.OBS], batch[Columns.ACTIONS]], dim=-1))}


class PlainCatalog(SACCatalog):
    """RLlib's, with critics of two hidden layers."""

    def build_qf_encoder(self, framework: str) -> Any:
        """What stands before the output layer of a critic."""
        return ConcatenationEncoder(self.observation_space.shape[0] + self.action_space.shape[0])


class RowReplaySAC(SAC):
    """RLlib's SAC whose replay draws rows of arrays, each with the same probability, as `EpisodeReplayBuffer` does.

    That buffer makes three Python episodes of every row drawn, which takes three quarters of RLlib's time.
    Everything else is RLlib's: env runner, module, losses, optimisers, one update and one step of the targets per env
    step.
    """

    def setup(self, config: Any) -> None:
        """Begins with no rows."""
        super().setup(config)
        self._rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._rng = np.random.default_rng(self.config.seed)

    def add(self, episodes: list[SingleAgentEpisode]) -> None:
        """Takes in the steps of episodes, or of pieces of them."""
        for episode in episodes:
            obs = episode.get_observations()
            self._rows[Columns.OBS] += list(obs[:-1])
            self._rows[Columns.NEXT_OBS] += list(obs[1:])
            self._rows[Columns.ACTIONS] += list(episode.get_actions())
            self._rows[Columns.REWARDS] += list(episode.get_rewards())
            self._rows[Columns.TERMINATEDS] += [False] * (len(episode) - 1) + [episode.is_terminated]

    def training_step(self) -> None:
        """One env step, one update."""
        self.add(self.env_runner.sample())
        self.metrics.aggregate([self.env_runner.get_metrics()], key=ENV_RUNNER_RESULTS)
        size = self.config.total_train_batch_size
        drawn = self._rng.integers(len(self._rows[Columns.OBS]), size=size)
        rows = {name: np.array([values[i] for i in drawn], dtype=COLUMNS[name]) for name, values in self._rows.items()}
        rows |= {"weights": np.ones(size, np.float32), "n_step": np.ones(size, np.float32)}
        num_env_steps = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME))
        results = self.learner_group.update(
            batch=MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(rows)}, env_steps=size),
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: num_env_steps},
        )
        for result in results:
            result[DEFAULT_MODULE_ID].pop(TD_ERROR_KEY)
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self.env_runner_group.sync_weights(
            from_worker_or_learner_group=self.learner_group, policies=[DEFAULT_MODULE_ID], inference_only=True
        )


def rllib_config(seed: int, *, with_episodes: bool) -> SACConfig:
    """RLlib's SAC with the settings of both."""
    config = SACConfig(SAC if with_episodes else RowReplaySAC).environment(ENV).env_runners(num_env_runners=0)
    config.training(
        **SETTINGS,
        n_step=1,
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 1_000_000},
        num_steps_sampled_before_learning_starts=0,  # The random steps are in the buffer before its first.
    )
    config.rl_module(
        rl_module_spec=RLModuleSpec(module_class=DefaultSACTorchRLModule, catalog_class=PlainCatalog),
        model_config=DefaultModelConfig(fcnet_hiddens=HIDDENS, fcnet_activation="relu", head_fcnet_hiddens=[]),
    )
    config.reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=EVALUATION_PERIOD)
    return config.debugging(seed=seed)


def calql_config(seed: int) -> CalQLConfig:
    """SAC by settings. Weights are drawn as torch and RLlib draw them, for the authors' are orthogonal."""
    config = CalQLConfig().environment(ENV).env_runners(num_env_runners=0)
    config.training(**SETTINGS)
    config.rl_module(model_config={"actor_hiddens": HIDDENS, "critic_hiddens": HIDDENS, "orthogonal_init": False})
    config.fine_tuning(conservative_online=False, updates_per_env_step=1, warmup_env_steps=WARMUP_ENV_STEPS)
    return config.debugging(seed=seed)


def random_episodes(seed: int, num_env_steps: int) -> list[SingleAgentEpisode]:
    """Episodes of uniform actions. RLlib's SAC would begin with its untrained policy.

    Its env runner's own random actions are stored in units of the environment, all others in [-1, 1].
    """
    env = gym.make(ENV)
    rng = np.random.default_rng(seed)
    episodes: list[SingleAgentEpisode] = []
    while num_env_steps > 0:
        episode = SingleAgentEpisode(observation_space=env.observation_space, action_space=env.action_space)
        obs, infos = env.reset(seed=seed if not episodes else None)
        episode.add_env_reset(obs, infos)
        while not episode.is_done and num_env_steps > 0:
            action = rng.uniform(-1.0, 1.0, size=env.action_space.shape).astype(np.float32)
            obs, reward, terminated, truncated, infos = env.step(action * env.action_space.high)
            episode.add_env_step(obs, action, float(reward), infos, terminated=terminated, truncated=truncated)
            num_env_steps -= 1
        episodes.append(episode)
    return episodes


def mean_return(module: Any, squash: Callable[[Tensor], Tensor]) -> float:
    """Mean return of greedy episodes from fixed initial states.

    Args:
        module: RLlib's `RLModule`, whose outputs hold the mean before squashing.
        squash: What makes a module action of that mean.
    """
    envs = [gym.make(ENV) for _ in EVALUATION_SEEDS]
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, EVALUATION_SEEDS, strict=True)]
    total = 0.0
    is_over = False
    while not is_over:  # All episodes have the same length.
        with torch.no_grad():
            outputs = module.forward_inference({Columns.OBS: torch.from_numpy(np.stack(obs))})
            means, _ = outputs[Columns.ACTION_DIST_INPUTS].chunk(2, dim=-1)
            actions = squash(means).numpy()
        steps = [env.step(action * env.action_space.high) for env, action in zip(envs, actions, strict=True)]
        obs = [step[0] for step in steps]
        total += sum(float(step[1]) for step in steps)
        is_over = steps[0][3]
    return total / len(envs)


def clipped(means: Tensor) -> Tensor:
    """What RLlib's own evaluation of SAC takes for greedy: the mean before squashing, clipped to the bounds."""
    return means.clamp(-1.0, 1.0)


def run(program: str, seed: int, env_steps: int) -> Run:
    """One run. Curves hold (env steps, mean greedy return)."""
    begin = time.perf_counter()
    curve: list[tuple[int, float]] = []
    curve_clipped: list[tuple[int, float]] = []
    is_calql = program == "calql"
    config = calql_config(seed) if is_calql else rllib_config(seed, with_episodes=program == "rllib-episodes")
    algo = config.build_algo()
    module = algo.learner_group._learner.module[DEFAULT_MODULE_ID]
    num_env_steps = 0
    if not is_calql:
        buffer = algo if isinstance(algo, RowReplaySAC) else algo.local_replay_buffer
        buffer.add(random_episodes(seed, WARMUP_ENV_STEPS))
        num_env_steps = WARMUP_ENV_STEPS
    while True:
        if num_env_steps >= WARMUP_ENV_STEPS and num_env_steps % EVALUATION_PERIOD == 0:
            curve.append((num_env_steps, mean_return(module, torch.tanh)))
            curve_clipped.append((num_env_steps, mean_return(module, clipped)))
            print(f"{NAMES[program]}, seed {seed}: {num_env_steps:6} env steps, return {curve[-1][1]:8.1f}", flush=True)
        if num_env_steps >= env_steps:
            break
        result = algo.train()
        if is_calql:
            num_env_steps = result["num_online_env_steps_lifetime"]
            num_updates = result["num_online_updates_lifetime"]
        else:
            num_env_steps = WARMUP_ENV_STEPS + int(result[ENV_RUNNER_RESULTS][NUM_ENV_STEPS_SAMPLED_LIFETIME])
            num_updates = result[LEARNER_RESULTS][DEFAULT_MODULE_ID]["num_target_updates"]
    learned = result["learners"][DEFAULT_MODULE_ID]
    algo.stop()
    return {
        "program": program,
        "seed": seed,
        "env_steps": env_steps,
        "curve": curve,
        "curve_clipped_mean": curve_clipped,
        "num_updates": int(num_updates),
        "num_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "alpha": float(learned["alpha_value"]),
        "minutes": (time.perf_counter() - begin) / 60,
    }


def spread(values: list[float]) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def print_summary(runs: list[Run], env_steps: int) -> None:
    """Both curves, mean and standard deviation over seeds, and what each seed ends at."""
    of_program = {name: [one for one in runs if one["program"] == name] for name in PROGRAMS}
    steps = list(range(WARMUP_ENV_STEPS, env_steps + 1, EVALUATION_PERIOD))
    print(f"\n{'env steps':>20}", *(f"{at:>6}" for at in steps))
    for name, its in of_program.items():
        if its:
            columns = [[dict(map(tuple, one["curve"]))[at] for one in its] for at in steps]
            print(f"{NAMES[name] + ', mean':>20}", *(f"{statistics.mean(column):6.0f}" for column in columns))
            print(f"{'deviation':>20}", *(f"{spread(column):6.0f}" for column in columns))
    heads = ("final", "of seeds", f"of {len(steps)} evaluations", "clipped mean", "updates", "alpha", "minutes")
    print(f"\n{'':>12} " + " | ".join(heads))
    for name, its in of_program.items():
        if its:
            finals = [one["curve"][-1][1] for one in its]
            over_run = [statistics.mean(value for _, value in one["curve"]) for one in its]
            by_rllib = [one["curve_clipped_mean"][-1][1] for one in its]
            print(
                f"{NAMES[name]:>12} {statistics.mean(finals):.0f} +- {spread(finals):.0f} | "
                + ", ".join(f"{value:.0f}" for value in finals)
                + f" ({sum(value >= SOLVED for value in finals)} of {len(finals)} at least {SOLVED:.0f}) | "
                + f"{statistics.mean(over_run):.0f} +- {spread(over_run):.0f} | {statistics.mean(by_rllib):.0f} | "
                + f"{sorted({one['num_updates'] for one in its})} | "
                + f"{statistics.mean(one['alpha'] for one in its):.3f} | "
                + f"{statistics.mean(one['minutes'] for one in its):.1f}"
            )


def print_differences(runs: list[Run]) -> None:
    """How much better Cal-QL is, with the 95 % interval of Welch's t test over the seeds."""
    curves = {
        name: [[value for _, value in one["curve"]] for one in runs if one["program"] == name] for name in PROGRAMS
    }
    if min(len(curves["rllib"]), len(curves["calql"])) < 2:
        return
    for what, statistic in (("final return", lambda curve: curve[-1]), ("mean over the run", statistics.mean)):
        calql, rllib = ([statistic(curve) for curve in curves[name]] for name in ("calql", "rllib"))
        low, high = stats.ttest_ind(calql, rllib, equal_var=False).confidence_interval(0.95)
        difference = statistics.mean(calql) - statistics.mean(rllib)
        print(f"{what}: CalQL minus RLlib's SAC {difference:+.0f}, 95 % interval [{low:.0f}, {high:.0f}]")


def draw(runs: list[Run], path: Path) -> None:
    """Every run thin, the means thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, colour in zip(PROGRAMS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        curves = [one["curve"] for one in runs if one["program"] == name]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.6, alpha=0.5)
        if curves:
            steps = [at for at, _ in curves[0]]
            means = np.mean([[value for _, value in curve] for curve in curves], axis=0)
            axes.plot(steps, means, color=colour, linewidth=2, label=f"{NAMES[name]}, {len(curves)} seeds")
    axes.axhline(SOLVED, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="env steps", ylabel="greedy return", title=f"{ENV} from scratch")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs what the file lacks, then prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON-lines file: read, and added to.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS[:2]), choices=PROGRAMS)
    parser.add_argument("--env-steps", type=int, default=10_000, help="Of each run, in whole thousands.")
    parser.add_argument("--picture", type=Path, help="File for the curves.")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # Program and seed: in a process of its own.
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        finished = run(options.one[0], int(options.one[1]), options.env_steps)
        with options.output.open("a") as file:
            file.write(json.dumps(finished) + "\n")
        ray.shutdown()
        return
    wanted = [(program, seed) for seed in options.seeds for program in options.programs]
    for program, seed in wanted:
        done = {(one["program"], one["seed"], one["env_steps"]) for one in finished_runs(options.output)}
        if (program, seed, options.env_steps) not in done:
            settings = ["--output", str(options.output), "--env-steps", str(options.env_steps)]
            subprocess.run([sys.executable, __file__, *settings, "--one", program, str(seed)], check=True)
    runs = [one for one in finished_runs(options.output) if one["env_steps"] == options.env_steps]
    runs = [one for one in runs if (one["program"], one["seed"]) in wanted]
    print_summary(runs, options.env_steps)
    print_differences(runs)
    if options.picture:
        draw(runs, options.picture)


if __name__ == "__main__":
    main()
