"""A control loop that is no part of Ray: it steers the point robot of the main job and sends its episodes to a run.

    rllib train file tuned_examples/external_clients/maze.yaml    # the run, which waits for clients after 7,000 updates
    python tuned_examples/external_clients/maze_client.py         # as many of them as you like, on any machine

It needs `numpy`, `msgpack` and, for the simulator in the place of a robot, `gymnasium-robotics`. It needs neither Ray
nor torch. It can be stopped, killed and started at any time, and so can the run.
"""

import argparse
import logging
import time

import gymnasium as gym
import gymnasium_robotics

from rllib_calql import PolicyClient

MAZE = [
    [1, 1, 1, 1, 1],
    [1, "r", 0, 0, 1],
    [1, 1, 1, 0, 1],
    [1, "g", 0, 0, 1],
    [1, 1, 1, 1, 1],
]  # 1 wall, r start, g goal, 0 free; as in `maze.yaml`.


def drive(client: PolicyClient, env: gym.Env, *, step_s: float = 0.0) -> bool:
    """One episode, with `step_s` seconds of pause in every step. Returns whether the robot reached the goal."""
    obs, _ = env.reset()
    client.reset(obs)
    terminated = truncated = False
    while not (terminated or truncated):
        action = client.act(obs)
        time.sleep(step_s)
        obs, reward, terminated, truncated, info = env.step(action)
        client.step(action, reward, terminated, truncated, obs, info=info)
    return bool(info["success"])


def main() -> None:
    """Drives until somebody presses Ctrl-C; without a run it waits for one, and goes on with one that is resumed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:5555", help="of the run; its second env runner listens at 5556")
    parser.add_argument("--token", help="what the run's `external_token_file` holds")
    parser.add_argument("--episodes", type=int, default=10**9, help="to drive")
    parser.add_argument("--step-seconds", type=float, default=0.0, help="pause in every step, as a robot takes time")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_UMaze-v3", continuing_task=False, maze_map=MAZE)
    with PolicyClient(options.address, token=options.token) as client:
        for number in range(options.episodes):
            client.wait()  # Until the run wants an episode, so that its latest policy drives.
            version = client.policy_version
            is_success = drive(client, env, step_s=options.step_seconds)
            print(f"episode {number}, policy of {version} updates: {'goal' if is_success else 'no goal'}", flush=True)


if __name__ == "__main__":
    main()
