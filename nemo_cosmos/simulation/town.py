"""A random town: streets in a grid, buildings, trees and parked cars, and where a car may drive.

World axes: x east, y north, z up; metres. The town's centre is the origin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HALF_EXTENT = 100.0
"""Half the side of the ground."""
PITCH = 42.0
"""Distance of neighbouring streets' centre lines."""
STREETS = tuple((k - 1.5) * PITCH for k in range(4))
"""Centre lines, both of the streets along x and of those along y."""
HALF_ROAD = 6.0
SIDEWALK = 2.5
CELL = 0.2
"""Side of a cell of the drivable-area grid."""

FACADES = {
    "red brick": (158, 74, 58),
    "white": (222, 218, 208),
    "grey concrete": (128, 130, 134),
    "yellow": (226, 184, 92),
    "brown brick": (112, 78, 58),
    "pale blue": (136, 172, 204),
    "green": (110, 150, 112),
}
"""Colour of the wall by the name used in captions."""

PAINTS = {
    "red": (0.8, 0.1, 0.1),
    "blue": (0.1, 0.25, 0.75),
    "white": (0.92, 0.92, 0.92),
    "black": (0.08, 0.08, 0.09),
    "silver": (0.6, 0.62, 0.65),
    "yellow": (0.95, 0.8, 0.1),
}

SKIES = {
    "a clear blue sky": ((0.30, 0.55, 0.92), (0.80, 0.90, 1.0), 0.85),
    "an overcast sky": ((0.62, 0.65, 0.70), (0.80, 0.81, 0.83), 0.62),
    "an orange evening sky": ((0.45, 0.42, 0.62), (0.98, 0.66, 0.38), 0.72),
}
"""Colour overhead, colour at the horizon, strength of the sun."""


@dataclass(frozen=True, kw_only=True)
class Building:
    """A box with windows."""

    centre: tuple[float, float]
    half: tuple[float, float]
    height: float
    facade: str
    tall: bool
    """Which of the facade's two window layouts it wears."""


@dataclass(frozen=True, kw_only=True)
class ParkedCar:
    """A car at the kerb."""

    centre: tuple[float, float]
    yaw: float
    paint: str


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A trunk with a crown."""

    centre: tuple[float, float]
    height: float
    crown: float
    green: float


@dataclass(frozen=True, kw_only=True)
class Town:
    """Everything that stands in a town."""

    buildings: tuple[Building, ...]
    parked: tuple[ParkedCar, ...]
    trees: tuple[Tree, ...]
    sky: str
    sun: tuple[float, float, float]
    clearance: np.ndarray
    """float32 [N, N] indexed [y, x]; distance to the nearest place where one may not drive, metres."""

    def clearance_at(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Looks up `clearance`; 0 outside the grid."""
        column = np.floor((x + HALF_EXTENT) / CELL).astype(int)
        row = np.floor((y + HALF_EXTENT) / CELL).astype(int)
        size = len(self.clearance)
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        return np.where(inside, self.clearance[row.clip(0, size - 1), column.clip(0, size - 1)], 0.0)


def build_town(rng: np.random.Generator) -> Town:
    """Draws a town.

    Args:
        rng: Source of all its randomness.
    """
    buildings, trees = [], []
    palette = list(rng.choice(list(FACADES), size=4, replace=False))
    for i in range(-2, 3):
        for j in range(-2, 3):
            _fill_block(rng, (i * PITCH, j * PITCH), palette, buildings, trees)
    parked = _parked_cars(rng)
    angle = rng.uniform(0, 2 * np.pi)
    return Town(
        buildings=tuple(buildings),
        parked=tuple(parked),
        trees=tuple(trees),
        sky=str(rng.choice(list(SKIES))),
        sun=(float(np.cos(angle)), float(np.sin(angle)), -1.1),
        clearance=_clearance(parked),
    )


def _fill_block(
    rng: np.random.Generator,
    centre: tuple[float, float],
    palette: list[str],
    buildings: list[Building],
    trees: list[Tree],
) -> None:
    """Cuts a block into 2 x 2 lots with a building or some trees on each, and plants trees along the kerb."""
    half = PITCH / 2 - HALF_ROAD - SIDEWALK
    cut = rng.uniform(-0.35, 0.35, size=2) * half
    for sx in (-1, 1):
        for sy in (-1, 1):
            edge = np.array([sx, sy]) * half
            middle, size = (cut + edge) / 2, np.abs(edge - cut) / 2
            if rng.random() < 0.15:
                for _ in range(4):
                    spot = middle + rng.uniform(-0.8, 0.8, 2) * size
                    trees.append(_tree(rng, (centre[0] + spot[0], centre[1] + spot[1])))
                continue
            size = size - rng.uniform(0.0, 1.2)
            height = float(rng.uniform(4, 8) if rng.random() < 0.45 else rng.uniform(8, 20))
            buildings.append(
                Building(
                    centre=(centre[0] + middle[0], centre[1] + middle[1]),
                    half=(float(size[0]), float(size[1])),
                    height=height,
                    facade=str(rng.choice(palette)),
                    tall=height > 8,
                )
            )
    kerb = half + SIDEWALK - 0.8
    for side in range(4):
        for along in np.arange(-half + 2, half - 1, 6.0):
            if rng.random() < 0.4:
                offset = ((along, kerb), (along, -kerb), (kerb, along), (-kerb, along))[side]
                trees.append(_tree(rng, (centre[0] + offset[0], centre[1] + offset[1])))


def _tree(rng: np.random.Generator, centre: tuple[float, float]) -> Tree:
    crown = rng.uniform(1.0, 1.9)
    height = rng.uniform(2.2, 3.6) + crown
    return Tree(centre=(float(centre[0]), float(centre[1])), height=height, crown=crown, green=rng.uniform(0.25, 0.6))


def _parked_cars(rng: np.random.Generator) -> list[ParkedCar]:
    cars, kerb, reach = [], HALF_ROAD - 1.1, PITCH / 2 - HALF_ROAD - 4.0
    for line in STREETS:
        for block in range(-2, 3):
            for along in np.arange(block * PITCH - reach, block * PITCH + reach, 6.5):
                for side in (-1, 1):
                    for vertical in (False, True):
                        if rng.random() < 0.22:
                            across = line + side * kerb
                            centre = (across, along) if vertical else (along, across)
                            yaw = np.pi / 2 if vertical else 0.0
                            cars.append(ParkedCar(centre=centre, yaw=yaw, paint=str(rng.choice(list(PAINTS)))))
    return cars


def _clearance(parked: list[ParkedCar]) -> np.ndarray:
    """Distance transform of the roads inside the outermost streets, less the parked cars."""
    import cv2

    axis = np.arange(-HALF_EXTENT, HALF_EXTENT, CELL) + CELL / 2
    on_street = (np.abs(axis[:, None] - np.array(STREETS)) < HALF_ROAD).any(1)
    inside = np.abs(axis) < STREETS[-1] + HALF_ROAD
    free = (on_street[None] | on_street[:, None]) & inside[None] & inside[:, None]
    for car in parked:
        half_x, half_y = (0.95, 2.2) if car.yaw else (2.2, 0.95)
        rows, columns = np.abs(axis - car.centre[1]) < half_y, np.abs(axis - car.centre[0]) < half_x
        free[np.ix_(rows, columns)] = False
    return cv2.distanceTransform(free.astype(np.uint8), cv2.DIST_L2, 5) * CELL
