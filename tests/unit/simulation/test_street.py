from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest

from nemo_cosmos.simulation import street
from nemo_cosmos.simulation.motion import integrate_actions
from nemo_cosmos.simulation.rendering import Camera
from nemo_cosmos.simulation.rollout import Rollout
from nemo_cosmos.simulation.town import build_town
from nemo_cosmos.simulation.town_scene import CAMERAS, build_model

SHAPE = {"num_frames": 6, "size": 64, "fps": 10.0}


def test_same_seed_same_frames(street_rollout: Rollout) -> None:
    again = street.roll_out(7, name="other", **SHAPE)
    np.testing.assert_array_equal(again.cameras["front"].frames, street_rollout.cameras["front"].frames)
    np.testing.assert_array_equal(again.actions, street_rollout.actions)


def test_seeds_differ(street_rollout: Rollout) -> None:
    other = street.roll_out(8, name="other", **SHAPE).cameras["front"].frames
    assert np.abs(other[0].astype(float) - street_rollout.cameras["front"].frames[0]).mean() > 10


def test_integrated_actions_carry_every_camera_along(street_rollout: Rollout) -> None:
    body = integrate_actions(street_rollout.body_poses[0], street_rollout.actions)
    for track in street_rollout.cameras.values():
        mount = np.linalg.inv(body[0]) @ track.poses[0]
        np.testing.assert_allclose(body @ mount, track.poses, atol=1e-5)


def test_frames_follow_the_controls(street_rollout: Rollout) -> None:
    shape = {"name": "x", "size": SHAPE["size"], "fps": SHAPE["fps"]}
    controls = street_rollout.controls
    replayed = street.roll_out_controls(7, controls, **shape).cameras["front"].frames
    np.testing.assert_array_equal(replayed, street_rollout.cameras["front"].frames)
    left, right = (street.roll_out_controls(7, np.full_like(controls, [8.0, s]), **shape) for s in (0.4, -0.4))
    first, last = (
        np.abs(left.cameras["front"].frames[i].astype(float) - right.cameras["front"].frames[i]).mean() for i in (0, -1)
    )
    assert first == 0 and last > 10
    assert left.actions[:, 5].sum() > 0.1 and right.actions[:, 5].sum() < -0.1


@pytest.mark.parametrize("view", ["front", "front_left", "rear"])
def test_a_known_point_of_the_town_is_where_poses_and_intrinsics_say(
    view: str, project: Callable, centre_of: Callable
) -> None:
    import mujoco

    rng = np.random.default_rng(2)
    model = build_model(build_town(rng), rng)
    tree = int(np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_ELLIPSOID)[0])
    pose = street.car_poses(np.array([[21.0, 2, 1.3, 5, 0, 0.02, -0.03]]))[0]
    data = mujoco.MjData(model)
    data.mocap_pos[0] = pose[:3, 3]
    mujoco.mju_mat2Quat(data.mocap_quat[0], pose[:3, :3].ravel())
    mujoco.mj_forward(model, data)
    with contextlib.closing(Camera(model, data, 128)) as camera:
        eye = camera.pose(view)
        point = eye[:3, 3] + eye[:3, :3] @ np.array([0.7, -0.4, 2.5])
        model.geom_pos[tree], model.geom_size[tree], model.geom_rgba[tree] = point, [0.08] * 3, [1, 0, 1, 1]
        mujoco.mj_forward(model, data)
        picture = camera.picture(view).astype(int)
        expected = project(eye, camera.intrinsics(view), point)
    seen = centre_of((picture[..., 0] > 1.8 * picture[..., 1]) & (picture[..., 2] > 1.8 * picture[..., 1]))
    assert np.abs(expected - seen).max() < 1.0


def test_cameras_look_where_their_names_say(street_rollout: Rollout) -> None:
    assert set(CAMERAS) == {"front", "front_left", "front_right", "rear", "rear_left", "rear_right"}
    body = street_rollout.body_poses[0]
    ahead = {view: (np.linalg.inv(body) @ track.poses[0])[:3, 2] for view, track in street_rollout.cameras.items()}
    assert ahead["front"][0] > 0.99
    assert ahead["rear_left"][0] < -0.4 and ahead["rear_left"][1] > 0.8


def test_pictures_are_upright_and_lit(street_rollout: Rollout) -> None:
    frames = street_rollout.cameras["front"].frames
    assert frames.dtype == np.uint8 and frames.shape == (6, 64, 64, 3)
    above, below = frames[:, :8].mean(), frames[:, -8:].mean()
    assert above > below + 20, "sky is brighter than asphalt"
