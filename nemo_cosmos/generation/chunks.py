"""Cutting a long video into chunks that are generated one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_cosmos.errors import user_error


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Frames that are generated at once."""

    start: int
    """First frame, counted from the start of the video."""
    num_frames: int

    @property
    def actions(self) -> slice:
        """Rows of the video's actions that lead from one of these frames to the next."""
        return slice(self.start, self.start + self.num_frames - 1)


def plan_chunks(
    num_frames: int, *, chunk_frames: int | None, overlap_frames: int, temporal_compression: int
) -> list[Chunk]:
    """Plans a video: each chunk begins with the last `overlap_frames` of the one before it.

    All counts must be 1 + k times the temporal compression. Then each chunk has such a count too; the last one may be
    shorter than the others.

    Args:
        num_frames: Of the video.
        chunk_frames: Of a chunk; None for all in one.
        overlap_frames: That two neighbours share.
        temporal_compression: Frames per latent frame after the first.

    Raises:
        UserError: A count is another one.
    """
    wanted = {"num_frames": num_frames}
    if chunk_frames is not None:
        wanted |= {"chunk_frames": chunk_frames, "overlap_frames": overlap_frames}
    for name, count in wanted.items():
        if count < 1 or (count - 1) % temporal_compression:
            nearest = 1 + max(0, round((count - 1) / temporal_compression)) * temporal_compression
            raise user_error(name, count, f"1 + k * {temporal_compression}", f"The nearest is {nearest}.")
    chunks = [Chunk(start=0, num_frames=min(num_frames, chunk_frames or num_frames))]
    while (end := chunks[-1].start + chunks[-1].num_frames) < num_frames:
        start = end - overlap_frames
        chunks.append(Chunk(start=start, num_frames=min(chunk_frames or num_frames, num_frames - start)))
    return chunks
