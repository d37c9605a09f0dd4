"""Makes the files beside it, each in an environment with the tool that writes it: `python make_files.py d3rlpy`.

All hold three episodes of the same numbers, which `test_files_of_other_tools.py` knows: in step t of episode e, the
observation is [100 e + t, t / 4], the action [(t mod 3 - 1) / 2, e / 4]; episodes 0 and 2 end in success, episode 1 by
a time limit.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).parent
LENGTHS = (4, 3, 5)
SUCCESSES = (True, False, True)


def obs(e, t):
    return np.array([100 * e + t, t / 4], dtype=np.float32)


def action(e, t):
    return np.array([(t % 3 - 1) / 2, e / 4], dtype=np.float32)


def reward(e, t):
    """One in the step that reaches the goal; the last step but one of robomimic's files, which goes on after it."""
    return float(SUCCESSES[e] and t == LENGTHS[e] - 1)


def image(e, t):
    return np.full((6, 8, 3), (40 * e + t, 7, 255 - t), dtype=np.uint8)


def make_d3rlpy():
    from d3rlpy.dataset import Episode, dump

    def episode(e, observations):
        steps = range(LENGTHS[e])
        return Episode(
            observations=observations(e, steps),
            actions=np.stack([action(e, t) for t in steps]),
            rewards=np.array([[reward(e, t)] for t in steps], dtype=np.float32),
            terminated=SUCCESSES[e],
        )

    def vectors(e, steps):
        return np.stack([obs(e, t) for t in steps])

    def tuples(e, steps):
        return [vectors(e, steps), np.stack([image(e, t).transpose(2, 0, 1) for t in steps])]

    for name, observations in (("d3rlpy.h5", vectors), ("d3rlpy_tuple.h5", tuples)):
        with (HERE / name).open("w+b") as file:
            dump([episode(e, observations) for e in range(3)], file)


def make_robomimic():
    """Robomimic's own script plays states back; the "simulator" here is a table of them, [episode, step]."""
    import h5py
    from robomimic.envs.env_base import EnvBase
    from robomimic.scripts import dataset_states_to_obs as script

    class Table(EnvBase):
        def __init__(self):
            self.state = np.zeros(2)

        def reset(self):
            return self.reset_to({"states": self.state})

        def reset_to(self, state):
            self.state = np.array(state["states"])
            return self.get_observation()

        def step(self, _):
            self.state = np.add(self.state, (0, 1))
            return self.get_observation(), self.get_reward(), False, {}

        def get_observation(self, obs=None):
            e, t = self.state.astype(int)
            x = np.array([100 * e + t, t / 4], dtype=np.float64)
            return {"robot0_eef_pos": x[:1], "object": x[1:], "agentview_image": image(e, t)}

        def is_success(self):
            e, t = self.state.astype(int)
            return {"task": SUCCESSES[e] and t >= LENGTHS[e] - 1}  # Reached one step before the demonstration ends.

        def get_reward(self):
            return float(self.is_success()["task"])

        def serialize(self):
            return {"env_name": "Table", "type": 1, "env_kwargs": {}}

        def render(self, *_, **__):
            raise NotImplementedError

        get_state = get_goal = set_goal = is_done = name = type = rollout_exceptions = render
        action_dimension = base_env = create_for_data_processing = render

    Table.__abstractmethods__ = frozenset()
    script.EnvUtils.create_env_for_data_processing = lambda **_: Table()
    script.EnvUtils.is_robosuite_env = lambda *_, **__: False
    source = HERE / "states.hdf5"
    with h5py.File(source, "w") as file:
        for e, number in enumerate((2, 10, 0)):  # Not in the order in which their names are sorted.
            group = file.create_group(f"data/demo_{number}")
            group["states"] = np.array([[e, t] for t in range(LENGTHS[e])], dtype=np.float64)
            group["actions"] = np.stack([action(e, t) for t in range(LENGTHS[e])]).astype(np.float64)
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Table", "type": 1, "env_kwargs": {}})
        file["mask/train"] = np.array([b"demo_2", b"demo_10"])
        file["mask/valid"] = np.array([b"demo_0"])
    common = {"dataset": str(source), "n": None, "shaped": False, "copy_rewards": False, "copy_dones": False}
    cameras = {"camera_names": [], "camera_height": 6, "camera_width": 8, "compress": False}
    for mode in (0, 1, 2):
        arguments = common | cameras | {"done_mode": mode, "exclude_next_obs": mode == 1}
        script.dataset_states_to_obs(SimpleNamespace(**arguments, output_name=f"robomimic_done_{mode}.hdf5"))
    source.rename(HERE / "robomimic_states.hdf5")


def make_lerobot(name="lerobot_v30"):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    vector = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
    features = {
        "observation.state": vector,
        "observation.images.top": {"dtype": "image", "shape": (6, 8, 3), "names": ["height", "width", "channels"]},
        "action": vector,
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create("made/here", fps=10, root=HERE / name, features=features, use_videos=False)
    has_task = "task" in LeRobotDataset.add_frame.__code__.co_varnames[:3]
    for e in range(3):
        for t in range(LENGTHS[e]):
            is_last = t == LENGTHS[e] - 1
            frame = {
                "observation.state": obs(e, t),
                "observation.images.top": image(e, t),
                "action": action(e, t),
                "next.reward": np.array([reward(e, t)], dtype=np.float32),
                "next.done": np.array([is_last]),
                "next.success": np.array([is_last and SUCCESSES[e]]),
            }
            if has_task:
                dataset.add_frame(frame, task="reach")
            else:
                dataset.add_frame({**frame, "task": "reach"})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


def make_lerobot_v21():
    make_lerobot("lerobot_v21")


def make_stable_baselines3():
    """Two environments, and more steps than the buffer holds, so that it has wrapped round."""
    import gymnasium as gym
    from stable_baselines3.common.buffers import ReplayBuffer

    spaces = gym.spaces.Box(-1000, 1000, (2,)), gym.spaces.Box(-1, 1, (2,))
    for name, size in (("sb3_wrapped.npz", 16), ("sb3_partly_filled.npz", 40)):
        buffer = ReplayBuffer(size, *spaces, device="cpu", n_envs=2)  # As many steps per environment as half the size.
        place = [(0, 0), (1, 0)]
        for _ in range(11):
            ends = [t == LENGTHS[e] - 1 for e, t in place]
            buffer.add(
                np.stack([obs(e, t) for e, t in place]),
                np.stack([obs(e, t + 1) for e, t in place]),
                np.stack([action(e, t) for e, t in place]),
                np.array([reward(e, t) for e, t in place]),
                np.array(ends),
                [{"TimeLimit.truncated": end and not SUCCESSES[e]} for (e, _), end in zip(place, ends, strict=True)],
            )
            place = [((e + 1) % 3, 0) if end else (e, t + 1) for (e, t), end in zip(place, ends, strict=True)]
        columns = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "pos", "full")
        np.savez_compressed(HERE / name, **{column: getattr(buffer, column) for column in columns})


if __name__ == "__main__":
    {
        "d3rlpy": make_d3rlpy,
        "robomimic": make_robomimic,
        "lerobot": make_lerobot,
        "lerobot_v21": make_lerobot_v21,
        "stable_baselines3": make_stable_baselines3,
    }[sys.argv[1]]()
