"""A long video of the embedded WFM shows no joints between its chunks."""

import numpy as np
import pytest

from nemo_cosmos.generation.open import open_world_model
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.simulation.rendering import choose_gl

CHUNK, NUM_FRAMES = 17, 49
HELDOUT_DRIVES = (1_000_000, 1_000_001, 1_000_002)


@pytest.fixture(scope="module")
def videos():
    """Drives through towns that no training saw, generated in chunks from their first frame and their actions."""
    choose_gl()
    street = pytest.importorskip("nemo_cosmos.simulation.street")
    drives = [street.roll_out(seed, name="d", num_frames=NUM_FRAMES, size=128, fps=10.0) for seed in HELDOUT_DRIVES]
    with open_world_model("diffusion_tiny_action") as model:
        return np.stack(
            model.generate(
                [""] * len(drives),
                SamplingConfig(num_frames=NUM_FRAMES, chunk_frames=CHUNK),
                first_frames=[drive.cameras["front"].frames[:1] for drive in drives],
                actions=np.stack([drive.actions for drive in drives]),
            )
        )


def test_frames_change_no_more_at_a_joint_than_inside_a_chunk(videos):
    change = np.abs(np.diff(videos.astype(np.float32), axis=1)).mean((0, 2, 3, 4))
    joints = np.arange(CHUNK - 1, NUM_FRAMES - 1, CHUNK - 1)
    inside = np.delete(change, joints)
    print("joints", change[joints], "inside: mean", inside.mean(), "largest", inside.max())
    assert change[joints].max() <= inside.max()


def test_brightness_and_contrast_do_not_drift(videos):
    chunks = np.split(videos[:, 1:].astype(np.float32), 3, axis=1)
    means, deviations = (np.array([f(chunk) for chunk in chunks]) for f in (np.mean, np.std))
    print(means, deviations)
    assert np.abs(means - means[0]).max() < 10
    assert (deviations / deviations[0]).min() > 0.7
