"""Rollouts of a Sawyer arm on Meta-World tasks: the expert policy, broken up by swings to random places."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_cosmos.errors import UserError
from nemo_cosmos.simulation import arm_captions
from nemo_cosmos.simulation.arm_captions import COLOURS, TASKS
from nemo_cosmos.simulation.motion import relative_actions
from nemo_cosmos.simulation.rendering import Camera, look_rotation
from nemo_cosmos.simulation.rollout import CameraTrack, Rollout

if TYPE_CHECKING:
    import mujoco

_DOMAIN_TAG = 2
"""Keeps this domain's random numbers apart from the street's at equal seeds."""
_CAMERA = "corner2"
"""A camera of the model, moved to a place of our own; Meta-World's own ones are mounted upside down."""
_LOOK_AT = np.array([0.0, 0.64, 0.24])
_REACH_LOW = np.array([-0.36, 0.42, 0.08])
_REACH_HIGH = np.array([0.36, 0.85, 0.40])
_ROBOT_BODIES = ("right", "head", "screen", "hand", "left", "base", "controller", "pedestal", "torso", "mocap")


class Operator:
    """Decides the arm's commands: expert policy with noise, and swings to random places in between."""

    def __init__(self, policy: Any, rng: np.random.Generator) -> None:  # noqa: ANN401 - untyped library
        """Starts with a swing or with the task, at random.

        Args:
            policy: A Meta-World expert policy.
            rng: Source of noise, places and durations.
        """
        self._policy, self._rng = policy, rng
        self._noise = np.zeros(4)
        self._frames_left = 0
        self._expert = False
        self._waypoint, self._grip = _LOOK_AT, -1.0
        self.doing = ""
        """`task` or `swing`, for the frame under way."""

    def next_frame(self, hand: np.ndarray, success: bool) -> None:
        """Chooses what to do from here; called once per frame.

        Args:
            hand: [3]; where the hand is.
            success: Whether the task is done.
        """
        if self._expert and success:
            self._frames_left = min(self._frames_left, 2)
        if self._frames_left <= 0:
            self._expert = self.doing != "task" and self._rng.random() < 0.6
            self._frames_left = int(self._rng.integers(10, 20) if self._expert else self._rng.integers(4, 8))
            self._waypoint = self._far_place(hand)
            self._grip = float(self._rng.choice([-1.0, 1.0]))
        self._frames_left -= 1
        scale = 0.1 if self._expert else 0.25
        self._noise = 0.6 * self._noise + self._rng.normal(0, [scale, scale, scale, 0.0])
        self.doing = "task" if self._expert else "swing"

    def command(self, observation: np.ndarray) -> np.ndarray:
        """Gives the command for one simulation step: [4] in [-1, 1]."""
        if self._expert:
            wanted = self._policy.get_action(observation)
        else:
            wanted = np.append(10.0 * (self._waypoint - observation[:3]), self._grip)
        return np.clip(np.clip(wanted, -1, 1) + self._noise, -1, 1)

    def _far_place(self, hand: np.ndarray) -> np.ndarray:
        places = self._rng.uniform(_REACH_LOW, _REACH_HIGH, (8, 3))
        return places[np.linalg.norm(places - hand, axis=1).argmax()] if self._rng.random() < 0.5 else places[0]


def roll_out(seed: int, *, name: str, num_frames: int, size: int, fps: float) -> Rollout:
    """Lets the arm work on the task of `seed`.

    Args:
        seed: Decides task, object place, colours, camera, noise and swings.
        name: The rollout's name.
        num_frames: T.
        size: Height and width in pixels.
        fps: Frames per second; the simulation runs in real time.
    """
    rng = np.random.default_rng([_DOMAIN_TAG, seed])
    task = list(TASKS)[seed % len(TASKS)]
    env, policy = _make_environment(task, seed)
    colour = str(rng.choice(list(COLOURS)))
    _paint(env.model, colour, rng)
    _place_camera(env.model, rng)
    observation = _swing_away(env, rng)
    with contextlib.closing(Camera(env.model, env.data, size)) as camera:
        log = _film(env, Operator(policy, rng), camera, observation, num_frames, max(1, round(1 / (fps * env.dt))))
        camera_pose, intrinsics = camera.pose(_CAMERA), camera.intrinsics(_CAMERA)
    env.close()
    hands, openings = np.stack(log.hands), np.array(log.openings)
    camera_poses = np.repeat(camera_pose[None], num_frames, 0)
    return Rollout(
        source="arm",
        name=name,
        seed=seed,
        fps=fps,
        captions=arm_captions.describe(task, colour, hands, camera_pose, openings, log.states),
        actions=relative_actions(hands, openings),
        controls=np.stack(log.controls),
        body_poses=hands,
        cameras={"side": CameraTrack(frames=np.stack(log.pictures), poses=camera_poses, intrinsics=intrinsics)},
    )


def require_metaworld() -> None:
    """Checks that the arm can be simulated at all.

    Raises:
        UserError: Meta-World is not installed.
    """
    if importlib.util.find_spec("metaworld") is None:
        raise UserError("metaworld: not installed. Install the simulators: pip install 'nemo-cosmos[sim]'.")


@dataclass(frozen=True, kw_only=True)
class _Log:
    """What happened, per frame; `controls` and `states` speak of the step that follows a frame."""

    pictures: list[np.ndarray] = field(default_factory=list)
    hands: list[np.ndarray] = field(default_factory=list)
    openings: list[float] = field(default_factory=list)
    controls: list[np.ndarray] = field(default_factory=list)
    states: list[tuple[str, bool]] = field(default_factory=list)

    def look(self, env: Any, camera: Camera, observation: np.ndarray) -> None:  # noqa: ANN401 - untyped library
        """Adds a frame."""
        self.pictures.append(camera.picture(_CAMERA))
        self.hands.append(_hand_pose(env))
        self.openings.append(float(observation[3]))


def _film(
    env: Any,  # noqa: ANN401 - untyped library
    operator: Operator,
    camera: Camera,
    observation: np.ndarray,
    num_frames: int,
    steps_per_frame: int,
) -> _Log:
    """Runs the operator; the control of a frame is the mean command over its simulation steps."""
    log, success = _Log(), False
    log.look(env, camera, observation)
    for _ in range(num_frames - 1):
        operator.next_frame(observation[:3], success)
        commands = []
        for _ in range(steps_per_frame):
            commands.append(operator.command(observation))
            observation, _, _, _, info = env.step(commands[-1].astype(np.float32))
        success = bool(info["success"])
        log.controls.append(np.mean(commands, axis=0))
        log.states.append((operator.doing, success))
        log.look(env, camera, observation)
    return log


def _make_environment(task: str, seed: int) -> tuple[Any, Any]:
    """Builds the task's environment and expert."""
    # Both libraries warn at every call about their own clipping; nothing there is ours to mend.
    warnings.filterwarnings("ignore", module="gymnasium|metaworld")
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    from metaworld.policies import ENV_POLICY_MAP

    env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=seed)
    env.max_path_length = 1_000_000
    env.reset()
    return env, ENV_POLICY_MAP[task]()


def _swing_away(env: Any, rng: np.random.Generator) -> np.ndarray:  # noqa: ANN401 - untyped library
    """Moves the hand to a random place before the first picture, so that rollouts start differently."""
    place = rng.uniform(_REACH_LOW + [0, 0, 0.12], _REACH_HIGH)
    observation = env.step(np.array([0, 0, 1, -1], np.float32))[0]
    for _ in range(50):
        command = np.append(np.clip(10 * (place - observation[:3]), -1, 1), -1.0)
        observation = env.step(command.astype(np.float32))[0]
    return observation


def _hand_pose(env: Any) -> np.ndarray:  # noqa: ANN401 - untyped library
    hand, pose = env.data.body("hand"), np.eye(4)
    pose[:3, :3], pose[:3, 3] = hand.xmat.reshape(3, 3), hand.xpos
    return pose


def _paint(model: mujoco.MjModel, colour: str, rng: np.random.Generator) -> None:
    """Gives the task's object a colour, and the table and the ground a random tint."""
    for index in range(model.ngeom):
        body = model.body(int(model.geom_bodyid[index])).name
        if body in ("tablelink", "world", "RetainingWall"):
            model.geom_rgba[index, :3] = rng.uniform(0.45, 1.0, 3)
        elif body and not body.startswith(_ROBOT_BODIES):
            model.geom_matid[index] = -1
            model.geom_rgba[index, :3] = (np.array(COLOURS[colour]) * rng.uniform(0.6, 1.1)).clip(0, 1)


def _place_camera(model: mujoco.MjModel, rng: np.random.Generator) -> None:
    """Puts the camera on its stand beside the table; like a real one it is never twice at quite the same place."""
    import mujoco

    side, height = np.radians(rng.uniform([-8.0, 20.0], [8.0, 28.0]))
    distance = rng.uniform(0.72, 0.80)
    away = np.array([np.cos(side) * np.cos(height), np.sin(side) * np.cos(height), np.sin(height)])
    index = model.camera(_CAMERA).id
    model.cam_pos[index] = _LOOK_AT + distance * away
    model.cam_fovy[index] = 52.0
    mujoco.mju_mat2Quat(model.cam_quat[index], look_rotation(-away).ravel())
