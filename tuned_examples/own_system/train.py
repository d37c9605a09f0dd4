"""The tank in Python, the same as `tank.yaml`.

`python train.py` trains and says after every other iteration how well the greedy policy does;
`rllib train file train.py` runs it through Ray Tune.
"""

from pathlib import Path

from rllib_calql import CalQLConfig

LOGS = Path(__file__).parent / "logs"
stop = {"num_online_env_steps_lifetime": 2_400}  # Twenty batches, 6.7 hours of the plant.

config = (
    CalQLConfig()
    .environment("tank:Tank-v0")
    .offline_data(input_=LOGS / "tank.parquet", normalize_observations=True, truncation="steady")
    .fine_tuning(offline_updates=4_000, updates_per_iteration=1_000, mixing_ratio=0.75, min_q_weight_online=0.5)
    .training(
        gamma=0.95,
        min_q_weight=1.0,
        num_actions=3,
        train_batch_size_per_learner=128,
        actor_lr=[[0, 5e-4], [600, 1e-4]],
        critic_lr=[[0, 1e-3], [600, 2e-4]],
        alpha_lr=5e-4,
        tau=0.02,
    )
    .rl_module(model_config={"actor_hiddens": [64, 64], "critic_hiddens": [128, 128]})
    .evaluation(evaluation_interval=2, evaluation_duration=20, success_key="on_setpoint", success_rule="fraction")
    .debugging(seed=0)
)

if __name__ == "__main__":
    algo = config.build()
    env_steps = 0
    while env_steps < stop["num_online_env_steps_lifetime"]:
        result = algo.train()
        env_steps = result["num_online_env_steps_lifetime"]
        if "evaluation" not in result:
            continue
        evaluation = result["evaluation"]["env_runners"]
        print(
            f"{result['phase']:7} updates {result['num_offline_updates_lifetime']:5}, env steps {env_steps:5},"
            f" return {evaluation['episode_return_mean']:5.1f}, on the set-point {evaluation['success_rate']:.2f}"
        )
    print("Checkpoint:", algo.save_to_path(str(Path.home() / "ray_results" / "tank_in_python")))
    algo.stop()
