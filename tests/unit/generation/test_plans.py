"""What is planned before anything runs: chunks, the canvas, and the layout of the ranks."""

import numpy as np
import pytest

from nemo_cosmos.errors import UserError
from nemo_cosmos.generation.canvas import Canvas
from nemo_cosmos.generation.chunks import Chunk, plan_chunks
from nemo_cosmos.generation.layout import GenerationLayout


@pytest.mark.parametrize(
    ("num_frames", "chunk_frames", "overlap_frames", "chunks"),
    [
        (17, None, 1, [(0, 17)]),
        (9, 17, 1, [(0, 9)]),
        (17, 17, 9, [(0, 17)]),
        (33, 17, 1, [(0, 17), (16, 17)]),
        (41, 17, 1, [(0, 17), (16, 17), (32, 9)]),
        (33, 17, 9, [(0, 17), (8, 17), (16, 17)]),
    ],
)
def test_chunks_overlap_and_cover_the_video(num_frames, chunk_frames, overlap_frames, chunks):
    planned = plan_chunks(num_frames, chunk_frames=chunk_frames, overlap_frames=overlap_frames, temporal_compression=8)
    assert planned == [Chunk(start=start, num_frames=count) for start, count in chunks]
    frames = [
        f for i, c in enumerate(planned) for f in range(c.start, c.start + c.num_frames)[overlap_frames * (i > 0) :]
    ]
    assert frames == list(range(num_frames))


def test_a_chunk_has_the_actions_between_its_own_frames():
    rows = np.arange(32)
    first, second = plan_chunks(33, chunk_frames=17, overlap_frames=1, temporal_compression=8)
    assert rows[first.actions].tolist() == list(range(16))
    assert rows[second.actions].tolist() == list(range(16, 32))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((16, None, 1), "num_frames: got 16.*nearest is 17"),
        ((33, 16, 1), "chunk_frames: got 16"),
        ((33, 17, 2), "overlap_frames: got 2.*nearest is 1"),
    ],
)
def test_counts_that_the_tokenizer_does_not_admit_are_refused(counts, message):
    num_frames, chunk_frames, overlap_frames = counts
    with pytest.raises(UserError, match=message):
        plan_chunks(num_frames, chunk_frames=chunk_frames, overlap_frames=overlap_frames, temporal_compression=8)


def test_a_canvas_is_whole_tokens_and_gives_the_picture_back():
    canvas = Canvas.covering(30, 5, token=16)
    frames = np.random.default_rng(0).integers(0, 255, (2, 30, 5, 3), dtype=np.uint8)
    padded = canvas.pad(frames)
    assert padded.shape == (2, 32, 16, 3)
    assert (padded[:, 30] == padded[:, 28]).all()
    assert (canvas.crop(padded) == frames).all()
    whole = Canvas.covering(32, 48, token=16)
    assert (whole.padded_height, whole.padded_width) == (32, 48)
    with pytest.raises(UserError, match="height, width"):
        Canvas.covering(0, 16, token=16)


@pytest.mark.parametrize(
    ("layout", "fitting"),
    [
        (GenerationLayout(), {1}),
        (GenerationLayout(tensor=2, context=2), {4}),
        (GenerationLayout(context=2, split_guidance=True), {4}),
        (GenerationLayout(shard_weights=True), {2, 3, 4, 8}),
        (GenerationLayout(context=2, shard_weights=True), {2, 4, 8}),
        (GenerationLayout(shard_weights=True, split_guidance=True), {2}),
    ],
)
def test_ranks_without_work_of_their_own_are_refused(layout, fitting):
    for world_size in (1, 2, 3, 4, 8):
        if world_size in fitting:
            layout.check(world_size)
        else:
            with pytest.raises(UserError, match=f"number of processes: got {world_size}"):
                layout.check(world_size)
