from __future__ import annotations

import base64
import errno
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from nemo_cosmos.errors import UserError
from nemo_cosmos.html_page import Page, format_cell, frame_sheet
from nemo_cosmos.video_io import write_video


@pytest.fixture
def clip() -> np.ndarray:
    ramp = np.linspace(0, 255, 48, dtype=np.uint8)
    return np.stack([np.broadcast_to(np.roll(ramp, 4 * t)[None, :, None], (32, 48, 3)) for t in range(9)])


def _embedded(page: Page, kind: str) -> bytes:
    return base64.b64decode(re.search(rf'src="data:{re.escape(kind)};base64,([^"]+)"', page.to_html()).group(1))


def test_text_is_escaped_everywhere():
    bad = "<script>&\"'"
    image = np.zeros((4, 4, 3), np.uint8)
    page = Page(bad, bad).section(bad).text(bad).table([bad], [[bad]]).image(image, bad).to_html()
    assert "<script>" not in page
    # Title twice, lead, section, text, header, cell, caption and the picture's alternative text.
    assert page.count("&lt;script&gt;&amp;&quot;&#x27;") == 9


def test_everything_is_embedded_and_decodes(tmp_path, clip):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    png = tmp_path / "picture.png"
    Image.fromarray(clip[0]).save(png)
    video = write_video(tmp_path / "clip.mp4", clip, fps=10)
    page = (
        Page("t", "l").image(clip[0], "array").image(figure, "figure").gallery([(png, "file")]).videos([(video, "v")])
    )
    path = page.write(tmp_path / "page.html")

    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|@import|url\(", text)
    assert set(re.findall(r'src="([a-z]+:[a-z0-9/+]+)', text)) == {
        "data:image/jpeg",
        "data:image/svg+xml",
        "data:image/png",
        "data:video/mp4",
    }
    assert _embedded(page, "video/mp4") == video.read_bytes()
    decoded = np.asarray(Image.open(io.BytesIO(_embedded(page, "image/jpeg"))))
    # JPEG at quality 90 without chroma subsampling on a smooth ramp.
    assert np.abs(decoded.astype(int) - clip[0]).mean() < 3


def test_table_marks_the_best_and_aligns_numbers():
    page = Page("t", "l").table(
        ["method", "PSNR", "error"],
        [["a", 20.0, 0.5], ["b", 25.123456, None], ["c", float("nan"), 0.25]],
        highlight_best={"PSNR": "max", "error": "min"},
    )
    assert re.findall(r'<td class="number best">([^<]+)</td>', page.to_html()) == ["25.12", "0.25"]
    assert '<td class="">a</td>' in page.to_html()


@pytest.mark.parametrize(("rows", "best"), [([["a"]], {}), ([["a", 1]], {"other": "max"})])
def test_table_refuses_what_does_not_fit(rows, best):
    with pytest.raises(ValueError, match="table: 2 headers"):
        Page("t", "l").table(["x", "y"], rows, highlight_best=best)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        ("word", "word"),
        (3, "3"),
        (105_653_696, "105,653,696"),
        (0.12345678, "0.1235"),
        (12345.6, "12,346"),
        (True, "True"),
    ],
)
def test_format_cell(value, shown):
    assert format_cell(value) == shown


def test_pictures_that_cannot_be_shown_are_refused(tmp_path):
    page = Page("t", "l")
    with pytest.raises(UserError, match="uint8"):
        page.image(np.zeros((4, 4, 3), np.float32), "float")
    with pytest.raises(UserError, match="missing.png"):
        page.image(tmp_path / "missing.png", "missing")
    with pytest.raises(UserError, match=r"missing\.mp4"):
        page.video(tmp_path / "missing.mp4", "missing")


def test_a_full_disk_is_told_and_leaves_the_old_page(tmp_path, monkeypatch):
    path = Page("old", "l").write(tmp_path / "page.html")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="disk is full"):
        Page("new", "l").write(path)
    assert "old" in path.read_text()
    assert os.listdir(tmp_path) == ["page.html"]


def test_frame_sheet_shows_first_and_last_frames(clip):
    sheet = frame_sheet([clip, 255 - clip], ["truth", "a model\nof ours"], columns=3)
    assert sheet.dtype == np.uint8
    gap = 2
    for row, video in enumerate([clip, 255 - clip]):
        bottom = sheet.shape[0] - gap - (1 - row) * (32 + gap)
        right = sheet.shape[1] - gap
        np.testing.assert_array_equal(sheet[bottom - 32 : bottom, right - 48 : right], video[-1])
        left = right - 2 * (48 + gap)
        np.testing.assert_array_equal(sheet[bottom - 32 : bottom, left - 48 : left], video[0])


def test_frame_sheet_refuses_rows_of_different_shape(clip):
    with pytest.raises(ValueError, match="frame_sheet"):
        frame_sheet([clip, clip[:4]], ["a", "b"], columns=2)
