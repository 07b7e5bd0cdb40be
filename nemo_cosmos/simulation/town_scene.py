"""The town as a MuJoCo model: geometry, painted textures, and a car body that carries the cameras."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nemo_cosmos.simulation.rendering import look_rotation
from nemo_cosmos.simulation.town import FACADES, HALF_EXTENT, HALF_ROAD, PAINTS, SIDEWALK, SKIES, STREETS, Town

if TYPE_CHECKING:
    import mujoco

CAMERAS = {
    "front": (0.0, 2.1, 0.0, 1.45, 75.0),
    "front_left": (60.0, 1.9, 0.75, 1.45, 75.0),
    "front_right": (-60.0, 1.9, -0.75, 1.45, 75.0),
    "rear": (180.0, -0.7, 0.0, 1.45, 90.0),
    "rear_left": (120.0, 0.2, 0.75, 1.45, 75.0),
    "rear_right": (-120.0, 0.2, -0.75, 1.45, 75.0),
}
"""Direction (degrees left of ahead), place from the rear axle (metres ahead, left, up), vertical field of view."""

GROUND_PIXELS = 2048
FACADE_PIXELS = 64


def build_model(town: Town, rng: np.random.Generator) -> mujoco.MjModel:
    """Compiles the model of a town, with a mocap body `car` and one camera per entry of `CAMERAS`.

    Args:
        town: What stands where.
        rng: Source of the textures' grain.
    """
    import mujoco

    spec = mujoco.MjSpec()
    spec.stat.extent, spec.stat.center = 1.0, [0, 0, 0]
    spec.visual.map.znear, spec.visual.map.zfar = 0.1, 260.0
    spec.visual.global_.offwidth = spec.visual.global_.offheight = 1024
    spec.visual.quality.numslices, spec.visual.quality.numstacks, spec.visual.quality.numquads = 12, 8, 4
    images = {"ground": paint_ground(rng)}
    for name, wall in FACADES.items():
        for tall in (False, True):
            images[_facade(name, tall)] = np.tile(paint_facade(rng, wall, tall), (6, 1, 1))
    for name, image in images.items():
        _material(spec, name, image)
    _light(spec, town)
    plane = mujoco.mjtGeom.mjGEOM_PLANE
    spec.worldbody.add_geom(type=plane, size=[HALF_EXTENT, HALF_EXTENT, 1], material="ground")
    _add_backdrop(spec.worldbody)
    _add_buildings(spec.worldbody, town)
    _add_trees(spec.worldbody, town)
    _add_parked_cars(spec.worldbody, town)
    _add_cameras(spec.worldbody.add_body(name="car", mocap=True))
    model = spec.compile()
    for name, image in images.items():
        start = int(model.texture(name).adr[0])
        model.tex_data[start : start + image.size] = image.ravel()
    return model


def _facade(name: str, tall: bool) -> str:
    return f"{name} {'tall' if tall else 'low'}"


def _light(spec: mujoco.MjSpec, town: Town) -> None:
    import mujoco

    above, horizon, strength = SKIES[town.sky]
    gradient = mujoco.mjtBuiltin.mjBUILTIN_GRADIENT
    skybox = mujoco.mjtTexture.mjTEXTURE_SKYBOX
    # The lower half of the box is never seen; the horizon's colour is the middle of the gradient.
    below = [2 * h - a for a, h in zip(above, horizon, strict=True)]
    spec.add_texture(
        name="sky", type=skybox, builtin=gradient, rgb1=above, rgb2=np.clip(below, 0, 1).tolist(), width=128, height=768
    )
    spec.visual.headlight.ambient = [0.38] * 3
    spec.visual.headlight.diffuse = [0.15] * 3
    spec.visual.headlight.specular = [0] * 3
    light = spec.worldbody.add_light(dir=list(town.sun), diffuse=[strength] * 3, specular=[0] * 3, castshadow=False)
    light.directional = True


def _material(spec: mujoco.MjSpec, name: str, image: np.ndarray) -> None:
    import mujoco

    cube = name != "ground"
    kind = mujoco.mjtTexture.mjTEXTURE_CUBE if cube else mujoco.mjtTexture.mjTEXTURE_2D
    flat = mujoco.mjtBuiltin.mjBUILTIN_FLAT
    height, width = image.shape[:2]
    spec.add_texture(name=name, type=kind, builtin=flat, rgb1=[1, 1, 1], width=width, height=height)
    material = spec.add_material(name=name, specular=0, shininess=0, texrepeat=[1, 1], texuniform=False)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name


def _add_backdrop(world: mujoco.MjsBody) -> None:
    """Closes the view at the end of the streets with a ring of wooded hills."""
    import mujoco

    box = mujoco.mjtGeom.mjGEOM_BOX
    for side in range(4):
        for k, along in enumerate(np.arange(-96, 97, 24)):
            height = 4 + 3 * ((k * 5 + side * 3) % 4)
            x, y = ((along, 104), (along, -104), (104, along), (-104, along))[side]
            size = [12, 3, height] if side < 2 else [3, 12, height]
            shade = 0.7 + 0.1 * ((k + side) % 3)
            world.add_geom(type=box, size=size, pos=[x, y, 0], rgba=[0.22 * shade, 0.42 * shade, 0.2 * shade, 1])


def _add_buildings(world: mujoco.MjsBody, town: Town) -> None:
    import mujoco

    for house in town.buildings:
        size, pos = [*house.half, house.height / 2], [*house.centre, house.height / 2]
        material = _facade(house.facade, house.tall)
        world.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=size, pos=pos, material=material)


def _add_cameras(car: mujoco.MjsBody) -> None:
    import mujoco

    for name, (side_deg, ahead, left, up, fovy) in CAMERAS.items():
        side, quat = np.radians(side_deg), np.empty(4)
        mujoco.mju_mat2Quat(quat, look_rotation(np.array([np.cos(side), np.sin(side), -0.04])).ravel())
        car.add_camera(name=name, pos=[ahead, left, up], quat=quat, fovy=fovy)


def _add_trees(world: mujoco.MjsBody, town: Town) -> None:
    import mujoco

    cylinder, ellipsoid = mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_ELLIPSOID
    for tree in town.trees:
        stem = (tree.height - tree.crown) / 2
        world.add_geom(type=cylinder, size=[0.16, stem, 0], pos=[*tree.centre, stem], rgba=[0.35, 0.22, 0.12, 1])
        colour = [0.35 * tree.green, tree.green, 0.25 * tree.green, 1]
        size, pos = [tree.crown, tree.crown, tree.crown * 1.2], [*tree.centre, tree.height]
        world.add_geom(type=ellipsoid, size=size, pos=pos, rgba=colour)


def _add_parked_cars(world: mujoco.MjsBody, town: Town) -> None:
    import mujoco

    box = mujoco.mjtGeom.mjGEOM_BOX
    parts = (
        ([2.1, 0.88, 0.32], 0.68, None),
        ([1.1, 0.78, 0.28], 1.25, (0.1, 0.12, 0.16)),
        ([1.75, 0.9, 0.19], 0.2, (0.04, 0.04, 0.04)),
    )
    for car in town.parked:
        quat = [np.cos(car.yaw / 2), 0, 0, np.sin(car.yaw / 2)]
        for size, height, colour in parts:
            rgba = [*(colour or PAINTS[car.paint]), 1]
            world.add_geom(type=box, size=size, pos=[*car.centre, height], quat=quat, rgba=rgba)


def paint_facade(rng: np.random.Generator, wall: tuple[int, int, int], tall: bool) -> np.ndarray:
    """Paints one side of a building: windows in rows, uint8 [64, 64, 3]."""
    size = FACADE_PIXELS
    image = np.array(wall) + rng.normal(0, 7, (size, size, 1))
    rows, columns = (int(rng.integers(5, 7)), int(rng.integers(4, 6))) if tall else (2, int(rng.integers(3, 5)))
    glass = np.array([40, 52, 70]) if sum(wall) > 330 else np.array([196, 208, 220])
    step_y, step_x = size / rows, size / columns
    for i in range(rows):
        for j in range(columns):
            top, left = int((i + 0.25) * step_y), int((j + 0.22) * step_x)
            bottom, right = int((i + 0.78) * step_y), int((j + 0.78) * step_x)
            image[top:bottom, left:right] = glass + rng.normal(0, 12)
    return image.clip(0, 255).astype(np.uint8)


def paint_ground(rng: np.random.Generator) -> np.ndarray:
    """Paints grass, pavement, asphalt and road markings from above: uint8 [2048, 2048, 3], symmetric in x and y."""
    axis = (np.arange(GROUND_PIXELS) + 0.5) * 2 * HALF_EXTENT / GROUND_PIXELS - HALF_EXTENT
    across = np.abs(axis[:, None] - np.array(STREETS)).min(1)
    road, pavement = across < HALF_ROAD, across < HALF_ROAD + SIDEWALK
    image = np.empty((GROUND_PIXELS, GROUND_PIXELS, 3))
    image[:] = (88, 128, 62)
    image[pavement[:, None] | pavement[None]] = (176, 170, 160)
    image[road[:, None] | road[None]] = (72, 73, 78)
    # Along a street, markings stop where another street crosses; `t` is the distance to that street's centre line.
    between = across > HALF_ROAD + 3.2
    zebra = (across > HALF_ROAD + 0.4) & (across < HALF_ROAD + 2.8)
    middle, border = across < 0.16, np.abs(across - (HALF_ROAD - 2.3)) < 0.1
    dashes = (axis % 4.2) < 2.1
    stripes = road & (axis % 1.5 < 0.75)
    for mask, colour in (
        (middle[:, None] & (between & dashes)[None], (238, 208, 90)),
        (border[:, None] & between[None], (225, 225, 225)),
        (stripes[:, None] & zebra[None], (235, 235, 235)),
    ):
        image[mask | mask.T] = colour
    coarse = rng.normal(0, 7, (256, 256, 1)).repeat(8, 0).repeat(8, 1)
    image += coarse + rng.normal(0, 6, (GROUND_PIXELS, GROUND_PIXELS, 1))
    return image.clip(0, 255).astype(np.uint8)
