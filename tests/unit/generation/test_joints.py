"""A long video of the embedded WFM shows no joints between its chunks."""

import numpy as np
import pytest

from nemo_cosmos.generation.open import open_world_model
from nemo_cosmos.generation.sampling import SamplingConfig
from nemo_cosmos.simulation.rendering import choose_gl

CHUNK, NUM_FRAMES, PER_LATENT = 17, 33, 8
HELDOUT_DRIVES = (1_000_000, 1_000_001, 1_000_002)


@pytest.fixture(scope="module")
def videos():
    """Drives through towns that no training saw, generated in two chunks from their first frame and their actions."""
    choose_gl()
    from nemo_cosmos.simulation import street

    drives = [street.roll_out(seed, name="d", num_frames=NUM_FRAMES, size=128, fps=10.0) for seed in HELDOUT_DRIVES]
    with open_world_model("diffusion_tiny_action") as model:
        made = model.generate(
            [""] * len(drives),
            SamplingConfig(num_frames=NUM_FRAMES, chunk_frames=CHUNK),
            first_frames=[drive.cameras["front"].frames[:1] for drive in drives],
            actions=np.stack([drive.actions for drive in drives]),
        )
    return np.stack(made).astype(np.float32)


def test_frames_change_no_more_at_a_joint_than_between_latent_frames_inside_a_chunk(videos):
    change = np.abs(np.diff(videos, axis=1)).mean((0, 2, 3, 4))
    joint = CHUNK - 1
    # Pictures change most from the last frame of a latent frame to the first of the next one. A joint is one of these
    # places; the others beside it lie inside the two chunks.
    assert change[joint] <= max(change[joint - PER_LATENT], change[joint + PER_LATENT])


def test_brightness_and_contrast_hardly_drift(videos):
    first, second = videos[:, 1:CHUNK], videos[:, CHUNK:]
    # Each chunk encodes anew what the one before decoded, which costs some contrast: 5 % were measured.
    assert abs(second.mean() - first.mean()) < 3
    assert 0.85 < second.std() / first.std() < 1.1
