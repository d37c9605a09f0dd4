"""Images as observations: encoder, shifts, who trains what, and a run on pixels from data to checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from rllib_calql import CalQL, CalQLConfig
from rllib_calql.datasets.generated import pixel_reach
from rllib_calql.learning.learner import FITS_REFERENCE, ONLINE, CalQLTorchLearner
from rllib_calql.networks import rl_module as outputs
from rllib_calql.networks.image_encoder import ImageEncoder, random_shifts
from rllib_calql.store.offline_data import as_multi_agent_batch

SHAPE = (9, 10, 2)
NETWORKS = {
    "actor_hiddens": [8],
    "critic_hiddens": [8],
    "conv_filters": [[3, 3, 2], [4, 2, 1]],
    "image_features": 5,
    "random_shift": 1,
}


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def make_learner(**settings: Any) -> CalQLTorchLearner:
    config = CalQLConfig().rl_module(model_config=NETWORKS).training(num_actions=2).debugging(seed=0)
    for name, value in settings.items():
        setattr(config, name, value)
    space = gym.spaces.Box(0, 255, SHAPE, np.uint8)
    learner: CalQLTorchLearner = config.build_learner(
        spaces={"default_policy": (space, gym.spaces.Box(-1.0, 1.0, (2,), np.float32))}
    )
    return learner


def rows(num_rows: int) -> dict[str, torch.Tensor]:
    """As the store hands them out: images flat."""
    rng = np.random.default_rng(1)
    size = int(np.prod(SHAPE))
    columns = {
        "obs": images(num_rows, size, seed=1),
        "new_obs": images(num_rows, size, seed=2),
        "actions": rng.uniform(-0.9, 0.9, (num_rows, 2)).astype(np.float32),
        "rewards": rng.normal(size=num_rows).astype(np.float32),
        "terminateds": np.zeros(num_rows, np.float32),
        "returns_to_go": rng.normal(size=num_rows).astype(np.float32),
        "is_offline": np.ones(num_rows, np.float32),
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


# Encoder


def plain_convolution(pixels: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """ReLU of a convolution without padding; pixels (C, H, W), weight (O, C, K, K)."""
    kernel = weight.shape[-1]
    height, width = ((size - kernel) // stride + 1 for size in pixels.shape[1:])
    out = np.empty((len(weight), height, width))
    for y in range(height):
        for x in range(width):
            patch = pixels[:, y * stride : y * stride + kernel, x * stride : x * stride + kernel]
            out[:, y, x] = (weight * patch).sum(axis=(1, 2, 3)) + bias
    return np.maximum(out, 0.0)


def test_the_encoder_equals_plain_convolutions() -> None:
    encoder = ImageEncoder(SHAPE, NETWORKS["conv_filters"], orthogonal_init=True).double()
    for parameter in encoder.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    batch = images(4, *SHAPE)
    codes = encoder(torch.from_numpy(batch)).detach().numpy()
    assert codes.shape == (4, encoder.size)
    convolutions = [layer for layer in encoder.layers if isinstance(layer, nn.Conv2d)]
    for image, code in zip(batch, codes, strict=True):
        hidden = image.transpose(2, 0, 1) / 255.0 - 0.5
        for convolution, (_, _, stride) in zip(convolutions, NETWORKS["conv_filters"], strict=True):
            weight, bias = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
            hidden = plain_convolution(hidden, weight, bias, stride)
        np.testing.assert_allclose(code, hidden.reshape(-1), rtol=1e-10)


def test_flat_images_are_the_same_images() -> None:
    encoder = ImageEncoder(SHAPE, NETWORKS["conv_filters"], orthogonal_init=True)
    batch = torch.from_numpy(images(3, *SHAPE))
    assert torch.equal(encoder(batch), encoder(batch.flatten(1)))


def test_filters_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`conv_filters` .* leave nothing of images of \(9, 10, 2\)"):
        ImageEncoder(SHAPE, [[8, 5, 2], [8, 5, 2]], orthogonal_init=True)


# Random shifts


def test_every_shift_is_a_crop_of_the_image_with_repeated_border_and_all_are_drawn() -> None:
    most, image = 2, images(*SHAPE)
    batch = torch.from_numpy(np.repeat(image[None], 400, axis=0))
    shifted = random_shifts(batch, most, torch.Generator().manual_seed(0)).numpy()
    padded = np.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
    height, width, _ = SHAPE
    crops = {
        padded[y : y + height, x : x + width].tobytes(): (y, x)
        for y in range(2 * most + 1)
        for x in range(2 * most + 1)
    }
    drawn = [crops[one.tobytes()] for one in shifted]
    assert len(set(drawn)) == 25
    assert np.bincount([y for y, _ in drawn], minlength=5).min() > 40  # 80 expected of each.
    assert shifted.dtype == np.uint8


def test_no_shift_changes_nothing() -> None:
    batch = torch.from_numpy(images(3, *SHAPE))
    assert torch.equal(random_shifts(batch, 0, None), batch)


def test_s_and_the_next_s_are_shifted_each_by_itself_and_only_in_training() -> None:
    module = make_learner()._calql_module
    seen: list[torch.Tensor] = []
    module.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    same = torch.from_numpy(images(64, int(np.prod(SHAPE))))
    module._training_inputs(same, same)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0].flatten(1), same)
    seen.clear()
    module.forward_inference({"obs": same})
    assert torch.equal(seen[0].flatten(1), same)


# Who trains what


def test_the_critics_train_the_encoder_and_the_actor_does_not() -> None:
    learner = make_learner()
    module = learner._calql_module
    out = module.forward_train(rows(6))
    of_encoder = list(module.encoder.parameters())
    of_policy = [*module.policy.parameters(), *module.policy_trunk.parameters()]
    of_critic_trunk = list(module.critic_trunk.parameters())

    def reaches(output: torch.Tensor, parameters: list[nn.Parameter]) -> list[bool]:
        grads = torch.autograd.grad(output.sum(), parameters, retain_graph=True, allow_unused=True)
        return [grad is not None and bool(grad.abs().sum() > 0) for grad in grads]

    for name in (outputs.Q_DATA, outputs.Q_UNIFORM, outputs.Q_CURRENT, outputs.Q_NEXT):
        assert any(reaches(out[name], of_encoder)), name
        assert any(reaches(out[name], of_critic_trunk)), name
        assert not any(reaches(out[name], of_policy)), name
    for name in (outputs.ACTOR_LOG_PROB, outputs.ACTOR_Q, outputs.DATA_LOG_PROB):
        assert not any(reaches(out[name], of_encoder + of_critic_trunk)), name
        assert any(reaches(out[name], of_policy)), name
    assert not out[outputs.TARGET_NEXT_Q].requires_grad


def test_an_image_is_encoded_once_however_many_actions_are_judged() -> None:
    module = make_learner()._calql_module
    sizes: dict[str, list[int]] = {"encoder": [], "target_encoder": []}
    for name, seen in sizes.items():
        getattr(module, name).register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
    module.forward_train(rows(6))
    assert sizes == {"encoder": [6, 6], "target_encoder": [6]}  # s and s'; s'.


def test_an_update_moves_every_part_and_targets_follow_by_tau() -> None:
    learner = make_learner()
    module = learner._calql_module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    learner._uncompiled_update({"default_policy": rows(6)})
    after = module.state_dict()
    prefixes = {name.split(".")[0] for name in before} - {"obs_mean", "obs_std"}
    assert prefixes == {
        *("encoder", "policy_trunk", "critic_trunk", "policy", "critic"),
        *("target_critic", "target_encoder", "target_trunk"),
    }
    for prefix in prefixes:
        assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(f"{prefix}."))
    for target, main in (("target_encoder", "encoder"), ("target_trunk", "critic_trunk")):
        for name in before:
            if name.startswith(f"{target}."):
                moved = torch.lerp(before[name], after[name.replace(target, main)], 5e-3)
                torch.testing.assert_close(after[name], moved)


@pytest.mark.parametrize("fit", ["monte_carlo", "td"])
def test_a_learned_reference_value_has_an_encoder_of_its_own_that_its_own_loss_trains(fit: str) -> None:
    learner = make_learner(reference_value="learned", reference_fit=fit, input_="images", offline_updates=1)
    module = learner._calql_module
    own = set(map(id, module.reference_parameters()))
    assert own.isdisjoint(map(id, [*module.critic_parameters(), *module.policy_parameters()]))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    columns = as_multi_agent_batch({name: column.numpy() for name, column in rows(6).items()})
    learner.update(columns, timesteps={ONLINE: False, FITS_REFERENCE: True})
    changed = {
        name.split(".")[0] for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"reference", "target_reference"}
    moved = {
        name
        for name, value in module.reference.named_parameters()
        if not torch.equal(value, before[f"reference.{name}"])
    }
    assert {name.split(".")[0] for name in moved} == {"encoder", "trunk", "layers", "head"}
    learner.update(columns, timesteps={ONLINE: True})
    changed = {
        name.split(".")[0] for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {"critic", "policy", "encoder", "reference", "target_reference"} <= changed


def test_settings_of_images_are_refused_for_vectors_and_the_other_way_round() -> None:
    vectors = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    config = CalQLConfig().rl_module(model_config={"random_shift": 2})
    with pytest.raises(ValueError, match="`random_shift` is for images"):
        config.build_learner(spaces={"default_policy": (vectors, action_space)})
    config = CalQLConfig().offline_data(normalize_observations=True)
    space = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="`normalize_observations` is for vectors"):
        config.build_learner(spaces={"default_policy": (space, action_space)})


# The small task


def test_point_and_goal_are_drawn_where_they_are() -> None:
    image = pixel_reach.render(np.array([0.5, -0.25]), np.array([-0.5, 0.25])).astype(float)
    centres = (np.arange(32) + 0.5) / 16.0 - 1.0
    for channel, (x, y) in ((0, (0.5, -0.25)), (1, (-0.5, 0.25))):
        weights = image[:, :, channel] / image[:, :, channel].sum()
        assert (weights.sum(axis=0) * centres).sum() == pytest.approx(x, abs=0.01)
        assert (weights.sum(axis=1) * centres).sum() == pytest.approx(y, abs=0.01)
        assert image[:, :, channel].sum() / 255.0 == pytest.approx(np.pi * 2.5**2, rel=0.15)
    assert image[:, :, 2].max() == 0.0


def test_the_environment_keeps_gymnasiums_contract() -> None:
    from gymnasium.utils.env_checker import check_env

    env = gym.make(pixel_reach.evaluation_env_id())
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(40)]
    assert ends == [*[(False, False)] * 39, (False, True)]


def test_the_data_are_what_the_environment_gives() -> None:
    episodes = list(pixel_reach.collect(num_steps=300, seed=3))
    assert 0 < sum(episode["terminations"][-1] for episode in episodes) < len(episodes)
    for episode in episodes:
        env = gym.make(pixel_reach.evaluation_env_id())
        obs, _ = env.reset(seed=episode["seed"])
        np.testing.assert_array_equal(obs, episode["observations"][0])
        for t, action in enumerate(episode["actions"]):
            obs, reward, terminated, truncated, _ = env.step(action)
            np.testing.assert_array_equal(obs, episode["observations"][t + 1])
            assert (reward, terminated) == (episode["rewards"][t], episode["terminations"][t])
            assert truncated == episode["truncations"][t] or terminated
        assert terminated or truncated


def test_the_controller_reaches_the_goal_and_chance_does_not() -> None:
    random, expert = pixel_reach.reference_scores(num_episodes=20)
    assert -12.0 < expert < -4.0
    assert random < -30.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> CalQL:
    """Some updates offline, some online, from data in a file."""
    path = tmp_path_factory.mktemp("pixels") / "episodes.npz"
    episodes = list(pixel_reach.collect(num_steps=400, seed=0))
    observations = np.concatenate([episode["observations"][:-1] for episode in episodes])
    following = np.concatenate([episode["observations"][1:] for episode in episodes])
    columns = {name: np.concatenate([episode[name] for episode in episodes]) for name in ("actions", "rewards")}
    ends = {
        new: np.concatenate([episode[old] for episode in episodes])
        for new, old in (("terminals", "terminations"), ("timeouts", "truncations"))
    }
    np.savez(path, observations=observations, next_observations=following, **columns, **ends)
    config = (
        CalQLConfig()
        .environment(pixel_reach.evaluation_env_id())
        .offline_data(input_=path)
        .training(num_actions=2, train_batch_size_per_learner=8)
        .rl_module(model_config=NETWORKS)
        .fine_tuning(offline_updates=4, updates_per_iteration=2, updates_per_env_step=0.1)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2)
        .evaluation(evaluation_duration=2)
        .debugging(seed=0)
    )
    algo = config.build()
    while algo.num_online_updates == 0:
        algo.train()
    return algo


def test_bytes_stay_bytes_from_the_file_and_the_environment_to_the_batch(trained: CalQL) -> None:
    batch = trained.store.sample(num_batches=2, batch_size=8, num_offline_rows=4)
    assert batch["obs"].dtype == batch["new_obs"].dtype == np.uint8
    assert batch["obs"].shape == (16, 32 * 32 * 3)
    online = trained.store.online_column("obs")
    assert online.dtype == np.uint8
    # Online images are the environment's: point and goal, nothing in the third channel, not flattened in another order.
    frames = online.reshape(-1, 32, 32, 3)
    assert frames[..., 2].max() == 0
    assert (frames[..., :2].max(axis=(1, 2)) > 200).all()


def test_env_runners_hold_what_they_need_and_act_like_the_learner(trained: CalQL) -> None:
    runner = trained.env_runner
    assert hasattr(runner.module, "encoder")
    for name in ("critic", "critic_trunk", "target_encoder", "target_trunk", "target_critic"):
        assert not hasattr(runner.module, name)
    obs = torch.from_numpy(images(3, 32, 32, 3))
    ours = runner.module.forward_inference({"obs": obs})["actions"]
    learners = trained.learner_group._learner._calql_module.forward_inference({"obs": obs})["actions"]
    assert torch.equal(ours, learners)


def test_evaluation_and_a_checkpoint_work_on_images(trained: CalQL, tmp_path: Path) -> None:
    assert "success_rate" in trained.evaluate()["env_runners"]
    trained.save_to_path(tmp_path / "checkpoint")
    restored = CalQL.from_checkpoint(tmp_path / "checkpoint")
    before = trained.learner_group._learner._calql_module.state_dict()
    after = restored.learner_group._learner._calql_module.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    num_updates = restored.num_online_updates
    while restored.num_online_updates == num_updates:
        result = restored.train()
    assert np.isfinite(result["learners"]["default_policy"]["qf_loss"])
    restored.stop()
