import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics")

import mujoco
from vla_rl_envs import make_expert
from vla_rl_envs.kitchen_control import (
    CLOSED,
    FORWARD,
    OPEN,
    ArmController,
    bounded_least_squares,
    limited,
    rotation_about,
    rotation_matrix,
    rotation_vector,
)
from vla_rl_envs.kitchen_experts import SCRIPTED_TASKS
from vla_rl_envs.kitchen_tasks import EXPERT_TASKS, TASK_TABLE

pytestmark = pytest.mark.simulator


def make(task="slide-door-open", **kwargs):
    return gym.make("vla_rl_envs:VLA/FrankaKitchen-v0", task=task, render_quality="none", image_size=1, **kwargs)


def run(env, expert, *, seed, noise=0.0):
    """Actions, joint positions and the last info of one episode."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    actions, states = [], []
    while True:
        action = expert(env)
        assert action.dtype == np.float32 and action.shape == (9,) and np.abs(action).max() <= 1.0
        noisy = np.clip(action + noise * rng.standard_normal(9), -1, 1).astype(np.float32)
        _, _, terminated, truncated, info = env.step(noisy)
        actions.append(action)
        states.append(env.unwrapped.data.qpos.copy())
        if terminated or truncated:
            return np.array(actions), np.array(states), info


@pytest.mark.parametrize("task", EXPERT_TASKS)
def test_expert_solves_varied_starts_under_noise(task):
    env, rule = make(task=task), TASK_TABLE[task]
    expert = make_expert(env)
    for seed in range(3):
        _, states, info = run(env, expert, seed=seed, noise=0.1)
        joint = states[:, rule.index]
        assert info["success"] is True
        assert abs(joint[-1]) > abs(rule.threshold) and np.sign(joint[-1]) == np.sign(rule.threshold)
        # Moved by contact, not placed: from closed, and never by more than a fraction of the way in one step.
        assert abs(joint[0]) < 0.02 and np.abs(np.diff(joint)).max() < 0.5 * abs(rule.end)


@pytest.mark.parametrize("task", [task for task in SCRIPTED_TASKS if task not in EXPERT_TASKS])
def test_expert_solves_the_other_knobs(task):
    env = make(task=task)
    assert run(env, make_expert(env), seed=0)[2]["success"] is True


def test_it_moves_nothing_but_its_own_object():
    env = make(task="knob-on")
    _, states, _ = run(env, make_expert(env), seed=1)
    others = [11, 13, 15, 17, 19, 20, 21, 22]
    assert np.abs(states[-1, others] - states[0, others]).max() < 0.1


def test_same_seed_same_actions_after_another_episode_cut_short():
    env = make(task="knob-on", horizon=25)
    expert = make_expert(env)
    first, states, _ = run(env, expert, seed=4)
    run(env, expert, seed=5)
    again, same, _ = run(env, expert, seed=4)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(states, same)
    fresh = make(task="knob-on", horizon=25)
    np.testing.assert_array_equal(first, run(fresh, make_expert(fresh), seed=4)[0])


def test_expert_takes_over_after_another_policy():
    """After 20 random steps without it the script starts from where the arm is."""
    env = make(task="slide-door-open")
    expert = make_expert(env)
    env.reset(seed=0)
    expert(env)
    rng = np.random.default_rng(0)
    for _ in range(20):
        env.step(rng.uniform(-1, 1, 9).astype(np.float32))
    for _ in range(150):
        _, _, terminated, _, info = env.step(expert(env))
        if terminated:
            break
    assert info["success"] is True


def test_another_episode_is_another_script_even_if_its_steps_count_on():
    env = make(task="knob-on")
    used = make_expert(env)
    env.reset(seed=1)
    for _ in range(12):
        env.step(used(env))
    env.reset(seed=2)
    for _ in range(12):
        env.step(np.zeros(9, np.float32))
    np.testing.assert_array_equal(used(env), make_expert(env)(env))


def test_hold_still_does_not_sag():
    """A zero action lets the arm sag; the controller's actions hold the hand within a centimetre for 40 steps."""
    env = make(variation=0.0).unwrapped
    env.reset(seed=0)
    arm = ArmController(env)
    place, rotation = arm.position, arm.rotation
    for _ in range(40):
        env.step(arm.toward(place, rotation, fingers=OPEN))
    assert np.linalg.norm(arm.position - place) < 0.01
    assert env.data.qpos[7:9].min() > 0.035
    env.reset(seed=0)
    for _ in range(40):
        env.step(np.zeros(9, np.float32))
    assert np.linalg.norm(arm.position - place) > 0.03


def test_hand_reaches_a_pose():
    env = make(variation=0.0).unwrapped
    env.reset(seed=0)
    arm = ArmController(env)
    goal = arm.position + (0.1, 0.1, 0.15)
    for _ in range(40):
        env.step(arm.toward(goal, FORWARD, fingers=CLOSED))
    assert np.linalg.norm(arm.position - goal) < 0.015
    assert np.linalg.norm(rotation_vector(FORWARD @ arm.rotation.T)) < 0.1
    assert env.data.qpos[7:9].max() < 0.005


def test_rotations_agree_with_mujoco():
    rng = np.random.default_rng(0)
    for _ in range(20):
        vector = limited(rng.normal(size=3), 3.0)
        quaternion, matrix, back = np.zeros(4), np.zeros(9), np.zeros(3)
        mujoco.mju_axisAngle2Quat(quaternion, vector / np.linalg.norm(vector), np.linalg.norm(vector))
        mujoco.mju_quat2Mat(matrix, quaternion)
        np.testing.assert_allclose(rotation_matrix(vector), matrix.reshape(3, 3), atol=1e-12)
        mujoco.mju_quat2Vel(back, quaternion, 1.0)
        np.testing.assert_allclose(rotation_vector(matrix.reshape(3, 3)), back, atol=1e-9)
    for axis, vector in (("x", (0.7, 0, 0)), ("y", (0, 0.7, 0)), ("z", (0, 0, 0.7))):
        np.testing.assert_allclose(rotation_about(axis, 0.7), rotation_matrix(np.array(vector)), atol=1e-12)
    np.testing.assert_array_equal(rotation_vector(np.eye(3)), np.zeros(3))


def test_bounded_least_squares_uses_the_joints_that_are_left():
    """Two joints add up: with the first blocked at .1, the second has to make the other .9 (clipping would give .5)."""
    jacobian = np.array([[1.0, 1.0]])
    low, high = np.array([-1.0, -1.0]), np.array([0.1, 1.0])
    step = bounded_least_squares(jacobian, np.array([1.0]), low, high, damping=1e-6)
    np.testing.assert_allclose(step, [0.1, 0.9], atol=1e-6)
    free = bounded_least_squares(jacobian, np.array([1.0]), np.full(2, -9.0), np.full(2, 9.0), damping=1e-6)
    np.testing.assert_allclose(free, [0.5, 0.5], atol=1e-6)
    stuck = bounded_least_squares(jacobian, np.array([5.0]), low, high, damping=1e-6)
    np.testing.assert_allclose(stuck, [0.1, 1.0], atol=1e-6)


def test_no_expert_is_a_clear_error():
    with pytest.raises(TypeError, match=r"'kettle'.*slide-door-open"):
        make_expert(make(task="kettle"))
