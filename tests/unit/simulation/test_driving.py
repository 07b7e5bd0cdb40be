from __future__ import annotations

import numpy as np
import pytest

from nemo_cosmos.simulation.driving import ACCELERATION, MAX_SPEED, WHEELBASE, advance, drive, follow, is_free
from nemo_cosmos.simulation.town import build_town


def test_steady_curve_has_the_bicycle_models_radius() -> None:
    state = np.array([0, 0, 0, 5.0, 0.2, 0, 0])
    states = follow(state, np.full((40, 2), [5.0, 0.2]), 0.1)
    yaw_rate = 5.0 * np.tan(0.2) / WHEELBASE
    assert states[-1, 2] == pytest.approx(4.0 * yaw_rate, rel=1e-9)
    radius = WHEELBASE / np.tan(0.2)
    # Chords of 0.025 s at 0.38 rad/s: the midpoint rule is off by (yaw step)^2 / 24 of the radius.
    np.testing.assert_allclose(np.linalg.norm(states[:, :2] - [0, radius], axis=1), radius, rtol=1e-4)


def test_speed_follows_the_command_within_the_engines_limit() -> None:
    state = advance(np.zeros(7), np.array([10.0, 0.0]), 0.1)
    assert state[3] == pytest.approx(0.1 * ACCELERATION)
    assert state[5] < 0, "the nose rises when the car speeds up"


@pytest.mark.parametrize("seed", range(4))
def test_the_driver_hits_nothing_and_is_lively(seed: int) -> None:
    rng = np.random.default_rng(seed)
    town = build_town(rng)
    track = drive(rng, town, 65, 10.0)
    assert track.states.shape == (65, 7) and track.controls.shape == (64, 2)
    assert is_free(town, track.states).all()
    np.testing.assert_array_equal(follow(track.states[0], track.controls, 0.1), track.states)
    path = np.linalg.norm(np.diff(track.states[:, :2], axis=0), axis=1).sum()
    assert path > 15, "repeating the last frame would be a fair prediction"
    assert np.abs(track.states[:, 3]).max() <= MAX_SPEED + 1e-9


def test_drives_turn_both_ways_and_change_speed() -> None:
    town = build_town(np.random.default_rng(0))
    tracks = [drive(np.random.default_rng(seed), town, 65, 10.0).states for seed in range(10)]
    turned = np.concatenate([t[16:, 2] - t[:-16, 2] for t in tracks])
    change = np.concatenate([t[16:, 3] - t[:-16, 3] for t in tracks])
    assert (turned > 0.5).mean() > 0.05 and (turned < -0.5).mean() > 0.05
    assert (change > 2).mean() > 0.05 and (change < -2).mean() > 0.05


def test_houses_and_trees_stand_off_the_drivable_area() -> None:
    town = build_town(np.random.default_rng(5))
    for thing in (*town.buildings, *town.trees, *town.parked):
        assert town.clearance_at(*np.array(thing.centre)) == 0
    for house in town.buildings:
        corners = np.array(house.centre) + np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * house.half
        assert (town.clearance_at(corners[:, 0], corners[:, 1]) == 0).all()
