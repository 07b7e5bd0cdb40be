from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curator_stages.dedup.perceptual import close_pairs, perceptual_hashes
from curator_stages.stages.perceptual_dedup import find_look_alikes
from curator_stages.stages.transcode import encode_h264
from nemo_cosmos.video_io import read_video
from tests.unit.curator_stages.samples import real_frames
from tests.unit.curator_stages.stages.test_set_stages import record


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), most_apart=st.integers(0, 31))
def test_pairs_are_those_of_brute_force(seed: int, most_apart: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (60, 256), dtype=np.uint8)
    for copy in range(30, 60):  # each differs from another one in 0 to 40 bits
        bits[copy] = bits[copy - 30]
        bits[copy, rng.permutation(256)[: rng.integers(0, 41)]] ^= 1
    apart = (bits[:, None] != bits).sum(-1)
    expected = {(i, j, int(apart[i, j])) for i in range(60) for j in range(i + 1, 60) if apart[i, j] <= most_apart}
    # A second kind of hash, of the middles, is held against the first one of others and not against its own kind.
    middles = np.roll(bits, 7, axis=0)
    to_middles = (middles[:, None] != bits).sum(-1)
    expected |= {
        (min(i, j), max(i, j), int(to_middles[i, j]))
        for i in range(60)
        for j in range(60)
        if i != j and to_middles[i, j] <= most_apart
    }
    pairs = close_pairs(np.stack([np.packbits(kind, axis=1) for kind in (bits, middles)], axis=1), most_apart)
    assert {pair for some in pairs for pair in zip(*(part.tolist() for part in some), strict=True)} == expected


@pytest.fixture(scope="module")
def bikes() -> np.ndarray:
    return np.stack(real_frames("bikes", 0, 48, size=128))


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.unpackbits(perceptual_hashes(a)[0] ^ perceptual_hashes(b)[0]).sum())


@pytest.mark.parametrize("change", ["encoded", "smaller", "brighter", "grey"])
def test_a_changed_copy_looks_the_same(bikes: np.ndarray, change: str) -> None:
    changed = {
        "encoded": lambda: read_video(encode_h264(bikes, fps=25, crf=38, gop=25))[0],
        "smaller": lambda: np.stack([cv2.resize(f, (72, 72), interpolation=cv2.INTER_AREA) for f in bikes]),
        "brighter": lambda: np.clip(bikes * 0.8 + 40, 0, 255).astype(np.uint8),
        "grey": lambda: np.stack(
            [cv2.cvtColor(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) for f in bikes]
        ),
    }[change]()
    assert distance(bikes, changed) <= 20


def test_another_video_and_another_time_look_different(bikes: np.ndarray) -> None:
    assert distance(bikes, np.stack(real_frames("bigbuckbunny", 0, 48, size=128))) > 60
    assert distance(bikes, np.stack(real_frames("bikes", 120, 168, size=128))) > 30


@pytest.mark.parametrize("share", [0.95, 0.9, 0.8, 0.75])
def test_a_cropped_copy_looks_like_the_middle(bikes: np.ndarray, share: float) -> None:
    edge = round(128 * (1 - share) / 2)
    whole, cropped = perceptual_hashes(bikes), perceptual_hashes(bikes[:, edge : 128 - edge, edge : 128 - edge])
    assert min(int(np.unpackbits(own ^ cropped[0]).sum()) for own in whole) <= 31


def test_a_dark_clip_has_no_hash(bikes: np.ndarray) -> None:
    assert perceptual_hashes(bikes // 64) is None


def test_the_better_copy_is_kept_and_one_video_is_not_compared_with_itself() -> None:
    same = np.zeros((5, 2, 32), np.uint8)
    same[4] = 255
    records = [record("a", pixels=50), record("b", pixels=200), record("c"), record("d", pixels=90), record("e")]
    records[3] = type(records[3])(**vars(records[3]) | {"source_video": "b.mp4"})
    found = find_look_alikes(records, same, 20)
    assert {row: duplicate.of for row, duplicate in found.items()} == {0: 1, 2: 1, 3: 2}
    rolled = [record("a", rollout="x"), record("b", rollout="y"), record("c", rollout="x")]
    assert {row: d.of for row, d in find_look_alikes(rolled, same[:3], 20).items()} == {2: 0}


def test_many_clips_that_all_look_alike_are_not_compared_one_by_one() -> None:
    count, calls = 2000, 0
    records = [record(f"{i:04d}") for i in range(count)]

    find_look_alikes(records[:2], np.zeros((2, 4, 32), np.uint8), 31)  # which imports what it needs

    def notice(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(notice)
    try:
        found = find_look_alikes(records, np.zeros((count, 4, 32), np.uint8), 31)
    finally:
        sys.setprofile(None)
    assert calls < 50 * count  # of Python functions; pair by pair these are 2 million and more
    assert {row: duplicate.of for row, duplicate in found.items()} == dict.fromkeys(range(1, count), 0)
