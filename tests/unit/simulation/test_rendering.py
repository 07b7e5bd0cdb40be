from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.simulation import rendering
from nemo_cosmos.simulation.rendering import Camera, look_rotation


@pytest.mark.parametrize("point", [(3.0, 0.9, 0.4), (4.0, -1.2, 1.5), (2.5, 0.2, 1.3)])
def test_projection_agrees_with_pixels(
    point: tuple[float, float, float], project: Callable, centre_of: Callable
) -> None:
    import mujoco

    spec = mujoco.MjSpec()
    spec.visual.headlight.ambient = [1, 1, 1]
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, look_rotation(np.array([1.0, 0.1, -0.1])).ravel())
    spec.worldbody.add_camera(name="eye", pos=[0.1, 0.2, 1.0], quat=quat, fovy=60)
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[0.06, 0, 0], pos=point, rgba=[1, 0, 1, 1])
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with contextlib.closing(Camera(model, data, 128)) as camera:
        picture, pose, intrinsics = camera.picture("eye").astype(int), camera.pose("eye"), camera.intrinsics("eye")
    seen = centre_of((picture[..., 0] > 100) & (picture[..., 1] < 60))
    assert np.abs(project(pose, intrinsics, np.array(point)) - seen).max() < 0.5


def test_missing_gl_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "_loads", lambda library: False)
    with pytest.raises(UserError, match="apt-get install -y libegl1"):
        rendering.choose_gl()


def test_osmesa_where_egl_is_missing_and_the_users_choice_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "_loads", lambda library: "OSMesa" in library)
    assert rendering.choose_gl() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert rendering.choose_gl() == "glfw"


def test_missing_mujoco_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nemo-cosmos\[sim\]"):
        rendering.choose_gl()
