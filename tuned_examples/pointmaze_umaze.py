"""The main job in Python, the same as `pointmaze_umaze.yaml`.

`python tuned_examples/pointmaze_umaze.py` runs it directly,
`rllib train file tuned_examples/pointmaze_umaze.py` through Ray Tune.
"""

from rllib_calql import CalQLConfig
from rllib_calql.datasets.pointmaze import evaluation_env_config

stop = {"num_online_env_steps_lifetime": 2_000}

config = (
    CalQLConfig()
    .environment("gymnasium_robotics:PointMaze_UMaze-v3", env_config=evaluation_env_config("umaze"))
    # -1 per step and 0 at the goal; an episode without success counts as never reaching it.
    .offline_data(
        input_="minari:rllib-calql/pointmaze-umaze-play-v0", reward_scale=1.0, reward_bias=-1.0, failure_reward=0.0
    )
    .fine_tuning(
        offline_updates=7_000,
        updates_per_iteration=1_000,
        mixing_ratio=0.9,  # A first round is a few hundred rows; half of a batch of them costs success.
        updates_per_env_step=1,
        sample_async=False,  # Reproducible; a step of this simulator is too quick to be worth overlapping.
    )
    .env_runners(num_env_runners=2)
    .resources(num_cpus_for_main_process=2)  # Two threads for the learner: here env runners wait while it learns.
    # Smaller and faster than the paper's settings, for two CPU cores. The weight is small because returns are: the
    # paper's 5 goes with returns of some hundreds. Rates fall over the first 300 online env steps, when the online data
    # are a few episodes only.
    .training(
        min_q_weight=1.0,
        num_actions=3,
        gamma=0.985,
        actor_lr=[[0, 3e-4], [300, 5e-5]],
        critic_lr=[[0, 6e-4], [300, 1e-4]],
        alpha_lr=3e-4,
        initial_alpha=0.5,
        tau=0.02,
        train_batch_size_per_learner=128,
    )
    .rl_module(model_config={"actor_hiddens": [128, 128], "critic_hiddens": [128, 128]})
    .evaluation(evaluation_interval=1, evaluation_duration=20)
    .debugging(seed=0)
)

if __name__ == "__main__":
    algo = config.build()
    env_steps = 0
    while env_steps < stop["num_online_env_steps_lifetime"]:
        result = algo.train()
        env_steps = result["num_online_env_steps_lifetime"]
        evaluation = result["evaluation"]["env_runners"]
        print(
            f"{result['phase']:7} updates {result['num_offline_updates_lifetime']:5}"
            f" + {result['num_online_updates_lifetime']:5}, env steps {env_steps:5},"
            f" success {evaluation['success_rate']:.2f}, return {evaluation['episode_return_mean']:.2f}"
        )
    print("Checkpoint:", algo.save_to_path())
    algo.stop()
