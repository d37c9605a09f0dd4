"""The control loop of a robot: it acts by a policy file and logs its episodes. It needs neither Ray nor torch.

    python control_loop.py --env-steps 300     # drives, explores, and logs to `episodes`
    python control_loop.py --greedy 30         # 30 drives of the greedy policy, which are not logged: how good is it?

A point robot in MuJoCo, which is to go around a wall to a goal, stands for the robot. It can be stopped, killed and
started at any time.
"""

import argparse
import time
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import numpy as np

from rllib_calql import EpisodeLog, load_policy

MAZE = [
    [1, 1, 1, 1, 1],
    [1, "r", 0, 0, 1],
    [1, 1, 1, 0, 1],
    [1, "g", 0, 0, 1],
    [1, 1, 1, 1, 1],
]  # 1 wall, r start, g goal, 0 free. A cell is 1 m wide; start and goal move by up to 0.25 m in theirs.


def drive(robot, policy, log, rng, *, step_s=0.0):
    """One episode that is logged, with `step_s` seconds of pause in every step. Returns whether it reached the goal."""
    observation, info = robot.reset()
    log.reset(observation)
    terminated = truncated = False
    while not (terminated or truncated):
        action = policy(observation, explore=True, rng=rng)
        time.sleep(step_s)
        observation, reward, terminated, truncated, info = robot.step(action)
        log.step(action, reward, terminated, truncated, observation)
    return bool(info["success"])


def success_rate(robot, policy, num_episodes, *, seed=10_000):
    """The share of drives of the greedy policy that reach the goal; every policy meets the same starts and goals."""
    num_successes = 0
    for number in range(num_episodes):
        observation, info = robot.reset(seed=seed + number)
        terminated = truncated = False
        while not (terminated or truncated):
            observation, _, terminated, truncated, info = robot.step(policy(observation))
        num_successes += bool(info["success"])
    return num_successes / num_episodes


def main():
    """Drives as the options say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default="policy.npz", help="the file, read anew before each episode")
    parser.add_argument("--episodes", default="episodes", metavar="FOLDER", help="where episodes are logged")
    parser.add_argument("--env-steps", type=int, default=300, help="after which no episode begins")
    parser.add_argument("--greedy", type=int, metavar="N", help="judge the greedy policy by N episodes instead")
    parser.add_argument("--seed", type=int, help="of starts, goals and exploration")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="pause in every step, as a robot takes time")
    options = parser.parse_args()
    gym.register_envs(gymnasium_robotics)
    robot = gym.make("PointMaze_UMaze-v3", maze_map=MAZE, continuing_task=False)  # An episode ends at the goal.
    if options.greedy:
        policy = load_policy(options.policy)
        print(f"success {success_rate(robot, policy, options.greedy):.2f} of {options.greedy} drives, greedy policy")
        return
    rng = np.random.default_rng(options.seed)
    robot.reset(seed=options.seed)
    with EpisodeLog(options.episodes) as log:
        while log.num_steps < options.env_steps:
            policy = load_policy(options.policy)
            is_success = drive(robot, policy, log, rng, step_s=options.step_seconds)
            version = policy.metadata["checkpoint"]["num_online_updates_lifetime"]
            print(
                f"episode {log.num_episodes}: {'goal' if is_success else 'no goal'}, {log.num_steps} steps so far, "
                f"policy of {version:,} online updates",
                flush=True,
            )


if __name__ == "__main__":
    main()
