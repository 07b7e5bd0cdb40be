"""Off-screen MuJoCo rendering: choice of the OpenGL back end, camera geometry, shadowless frames."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from typing import TYPE_CHECKING

import numpy as np

from nemo_cosmos.errors import UserError

if TYPE_CHECKING:
    import mujoco

APT_LINE = "Run: apt-get install -y libegl1 libgl1 (or, to render with OSMesa, libosmesa6)"

_LIBRARIES = {"egl": ("libEGL.so.1",), "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")}

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0])
"""Turns camera axes x right, y up, z backward into x right, y down, z forward."""


def choose_gl() -> str:
    """Sets `MUJOCO_GL` for this process and its children before MuJoCo is imported.

    A value set by the user stands. Otherwise EGL where its library loads, else OSMesa.

    Returns:
        The back end's name.

    Raises:
        UserError: MuJoCo is not installed, or no OpenGL library is there.
    """
    if importlib.util.find_spec("mujoco") is None:
        raise UserError("mujoco: not installed. Install the simulators: pip install 'nemo-cosmos[sim]'.")
    # Mesa's software rasteriser otherwise starts a thread per core in each of our worker processes.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if "MUJOCO_GL" not in os.environ:
        backend = next((name for name, files in _LIBRARIES.items() if any(map(_loads, files))), None)
        if backend is None:
            raise UserError(f"MUJOCO_GL: neither libEGL nor libOSMesa can be loaded; rendering needs one. {APT_LINE}.")
        os.environ["MUJOCO_GL"] = backend
    return os.environ["MUJOCO_GL"]


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def look_rotation(forward: np.ndarray) -> np.ndarray:
    """Builds a camera-to-parent rotation, OpenGL axes, that looks along `forward` with z up.

    Args:
        forward: [3]; need not be of length one, must not be vertical.

    Returns:
        [3, 3].
    """
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(right, forward), -forward], axis=1)


def pinhole(size: int, fovy_deg: float) -> np.ndarray:
    """Pinhole matrix [3, 3] of a square picture.

    Args:
        size: Height and width in pixels.
        fovy_deg: Vertical field of view in degrees.

    Returns:
        [3, 3]; pixels.
    """
    focal = size / 2 / np.tan(np.radians(fovy_deg) / 2)
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


class Camera:
    """Renders named cameras of one model without shadows or reflections."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, size: int) -> None:
        """Opens the OpenGL context.

        Args:
            model: The scene.
            data: Its state, read at every picture.
            size: Height and width in pixels.

        Raises:
            UserError: The OpenGL back end does not work.
        """
        import mujoco

        self._model, self._data, self._size = model, data, size
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except Exception as error:  # the back ends raise whatever their bindings raise
            message = f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}: cannot open an OpenGL context ({error}). {APT_LINE}."
            raise UserError(message) from error
        flags = self._renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

    def picture(self, name: str) -> np.ndarray:
        """Renders what camera `name` sees now: uint8 RGB [H, W, 3]."""
        self._renderer.update_scene(self._data, name)
        return self._renderer.render()

    def pose(self, name: str) -> np.ndarray:
        """Camera-to-world [4, 4], OpenCV axes, of the last forward kinematics."""
        index = self._model.camera(name).id
        pose = np.eye(4)
        pose[:3, :3] = self._data.cam_xmat[index].reshape(3, 3) @ OPENGL_TO_OPENCV
        pose[:3, 3] = self._data.cam_xpos[index]
        return pose

    def intrinsics(self, name: str) -> np.ndarray:
        """Pinhole matrix [3, 3] of camera `name`, in pixels."""
        return pinhole(self._size, float(self._model.cam_fovy[self._model.camera(name).id]))

    def close(self) -> None:
        """Frees the OpenGL context."""
        self._renderer.close()
