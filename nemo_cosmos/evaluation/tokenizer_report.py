"""The record of a tokenizer's quality, and its report: one HTML page, one plot, one sheet of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_cosmos.contracts import Record
from nemo_cosmos.evaluation.codebook import CodebookUse
from nemo_cosmos.evaluation.plots import rate_distortion_chart
from nemo_cosmos.evaluation.rate_distortion import RatePoint, psnr_at
from nemo_cosmos.evaluation.reconstruction import PERCEPTUAL_CROP, SeamMeasures, VideoMeasures
from nemo_cosmos.files import write_json, written_aside
from nemo_cosmos.html_page import Cell, Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES_FILE, REPORT_FILE, SHEET_FILE, PLOT_FILE = "measures.json", "report.html", "sheet.png", "rate_distortion.png"

_ERROR_GAIN = 4
_CELL_WIDTH, _CELL_HEIGHT = 360, 200
_BEST = {"PSNR dB": "max", "SSIM": "max", "LPIPS-like": "min"}


@dataclass(frozen=True, kw_only=True)
class FrechetResult(Record):
    """Distance between original and rebuilt clips."""

    distance: float
    features: str
    """The network and what is made of its output. Not I3D: no FVD or rFVD."""
    num_clips: int
    """On each side. Below `num_features` the covariances are singular: the distance of them is still exact, but they
    say little of all video there is, so compare only at an equal number of clips."""
    num_features: int


@dataclass(frozen=True, kw_only=True)
class TokenizerEvaluation(Record):
    """All that was measured of a tokenizer; means over videos unless said otherwise."""

    tokenizer: str
    fingerprint: str
    data: str
    """The folder measured."""
    coding: str
    """How videos were cut, in words."""
    stored_as: str
    """What the bits count, in words."""
    methods: dict[str, dict[str, float]]
    """`psnr_db`, `ssim`, `lpips_like` by method, the tokenizer first."""
    by_source: dict[str, float]
    """The tokenizer's PSNR, dB, by domain."""
    num_clips: int
    num_stored: int | None
    """Numbers kept per clip by every method, where all clips have one size."""
    bits_per_pixel: float
    codebook: CodebookUse | None
    frechet: FrechetResult | None
    codecs: dict[str, tuple[RatePoint, ...]]
    """By codec, a point for each of `crfs`."""
    crfs: tuple[int, ...]
    missing_codecs: dict[str, str] = field(default_factory=dict)
    """Codecs that were not measured, and why."""
    seams: SeamMeasures | None
    videos: tuple[VideoMeasures, ...]
    failed: dict[str, str]
    """Files that could not be measured, and why."""

    def summary(self) -> dict[str, Any]:
        """The figures alone, for a terminal."""
        return {
            "methods": self.methods,
            "num_clips": self.num_clips,
            "bits_per_pixel": self.bits_per_pixel,
            "stored_as": self.stored_as,
            "psnr_db_at_equal_bits": self.psnr_at_equal_bits(),
            "frechet_distance": None if self.frechet is None else self.frechet.distance,
            "codebook": None if self.codebook is None else self.codebook.to_dict(),
            "seams": None if self.seams is None else self.seams.to_dict(),
            "missing_codecs": self.missing_codecs,
            "failed": self.failed,
        }

    def psnr_at_equal_bits(self) -> dict[str, float | None]:
        """PSNR of each codec at the tokenizer's bits per pixel, dB; None outside the measured rates."""
        return {name: psnr_at(curve, self.bits_per_pixel) for name, curve in self.codecs.items()}


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """A frame on the sheet."""

    label: str
    truth: np.ndarray
    """uint8 [H, W, 3]."""
    rebuilt: np.ndarray
    """The same shape."""


def write_tokenizer_report(folder: str | Path, evaluation: TokenizerEvaluation, rows: Sequence[SheetRow]) -> Path:
    """Writes the measures as JSON, the sheet and the plot as PNG, and all together as one self-contained page.

    Args:
        folder: Where.
        evaluation: The measures.
        rows: Frames for the sheet, at least one.

    Returns:
        The page's path.

    Raises:
        UserError: The disk is full or the folder is read-only.
    """
    from PIL import Image

    folder = Path(folder)
    write_json(
        folder / MEASURES_FILE, {**evaluation.to_dict(), "psnr_db_at_equal_bits": evaluation.psnr_at_equal_bits()}
    )
    with written_aside(folder / SHEET_FILE) as aside:
        Image.fromarray(comparison_sheet(rows)).save(aside)
    if evaluation.codecs:
        with written_aside(folder / PLOT_FILE) as aside:
            _chart(evaluation).savefig(aside, dpi=150)
    return _page(evaluation, folder / SHEET_FILE).write(folder / REPORT_FILE)


def comparison_sheet(rows: Sequence[SheetRow]) -> np.ndarray:
    """Lays originals, reconstructions and their difference, four times enlarged, side by side.

    Args:
        rows: One line of the sheet each; pictures may differ in size, and are scaled to fit 360x200 pixels.

    Returns:
        uint8 RGB [H, W, 3].
    """
    from PIL import Image, ImageDraw, ImageFont

    lines = [[Image.fromarray(p).resize(_fitted(p), Image.Resampling.LANCZOS) for p in _pictures(row)] for row in rows]
    font, gap, top, caption = ImageFont.load_default(size=15), 6, 30, 26
    width = max(line[0].width for line in lines)
    height = top + sum(line[0].height + caption for line in lines)
    sheet = Image.new("RGB", (gap + 3 * (width + gap), height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("original", "reconstruction", f"error x {_ERROR_GAIN}")):
        draw.text((gap + column * (width + gap), top / 2), title, fill="#1d2430", font=font, anchor="lm")
    y = top
    for row, line in zip(rows, lines, strict=True):
        for column, picture in enumerate(line):
            sheet.paste(picture, (gap + column * (width + gap), y))
        y += line[0].height + caption
        draw.text((gap, y - caption / 2 - 2), row.label, fill="#5b6675", font=font, anchor="lm")
    return np.asarray(sheet)


def _pictures(row: SheetRow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    error = np.abs(row.truth.astype(np.int16) - row.rebuilt) * _ERROR_GAIN
    return row.truth, row.rebuilt, error.clip(0, 255).astype(np.uint8)


def _fitted(picture: np.ndarray) -> tuple[int, int]:
    """Width and height of the largest copy that fits a cell of the sheet."""
    height, width = picture.shape[:2]
    scale = min(_CELL_WIDTH / width, _CELL_HEIGHT / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _chart(evaluation: TokenizerEvaluation) -> Figure:
    return rate_distortion_chart(
        evaluation.codecs,
        name=evaluation.tokenizer,
        point=RatePoint(bits_per_pixel=evaluation.bits_per_pixel, psnr_db=evaluation.methods["tokenizer"]["psnr_db"]),
        videos=[RatePoint(bits_per_pixel=v.bits_per_pixel or 0.0, psnr_db=v.psnr_db) for v in evaluation.videos],
    )


def _page(evaluation: TokenizerEvaluation, sheet: Path) -> Page:
    page = Page(
        f"Tokenizer {evaluation.tokenizer}",
        f"{evaluation.num_clips} videos and pictures of {evaluation.data}, rebuilt and compared.",
    )
    page.text(f"Coded as {evaluation.coding}. Bits: {evaluation.stored_as}.")
    page.section("Reconstruction")
    rows: list[list[Cell]] = [
        [name, values["psnr_db"], values["ssim"], values["lpips_like"]] for name, values in evaluation.methods.items()
    ]
    page.table(["method", *_BEST], rows, highlight_best=_BEST)
    page.table(["measure", ""], _single_figures(evaluation))
    page.text(
        f"LPIPS-like is of the first, middle and last frame, at most the middle {PERCEPTUAL_CROP}x{PERCEPTUAL_CROP} "
        "pixels of each; its network is not that of LPIPS."
    )
    page.section("Side by side").image(
        sheet, "Middle frame of each: original, reconstruction, error four times enlarged"
    )
    if evaluation.codecs or evaluation.missing_codecs:
        _add_codecs(page, evaluation)
    if evaluation.frechet:
        _add_frechet(page, evaluation.frechet)
    if evaluation.seams:
        _add_seams(page, evaluation.seams)
    page.section("Videos").table(*_video_rows(evaluation.videos))
    if evaluation.failed:
        page.section("Left out").table(["file", "reason"], [[name, why] for name, why in evaluation.failed.items()])
    return page


def _single_figures(evaluation: TokenizerEvaluation) -> list[list[Cell]]:
    rows: list[list[Cell]] = [["bits per pixel", evaluation.bits_per_pixel]]
    if evaluation.codebook:
        use = evaluation.codebook
        rows.append([f"share of the {use.codebook_size:,} codes used by {use.num_tokens:,} tokens", use.share_used])
        rows.append(["perplexity of the codes", use.perplexity])
    if evaluation.frechet:
        rows.append([f"Fréchet distance, {evaluation.frechet.num_clips} clips", evaluation.frechet.distance])
    return [*rows, *([f"PSNR dB, {source}", value] for source, value in evaluation.by_source.items())]


def _add_codecs(page: Page, evaluation: TokenizerEvaluation) -> None:
    page.section("Rate and distortion")
    if evaluation.codecs:
        page.text(
            "The same frames encoded by video codecs at several constant rate factors, their encoders' medium preset, "
            "4:2:0; the bits are those of the raw stream's file, headers included. A tokenizer's code is counted "
            "plainly, without the entropy coding that the codecs have."
        )
        page.image(_chart(evaluation), "Mean over the videos; further left and up is better")
        rows: list[list[Cell]] = [
            [name, crf, point.bits_per_pixel, point.psnr_db]
            for name, curve in evaluation.codecs.items()
            for crf, point in zip(evaluation.crfs, curve, strict=True)
        ]
        page.table(["codec", "CRF", "bits per pixel", "PSNR dB"], rows)
        equal: list[list[Cell]] = [
            [evaluation.tokenizer, evaluation.methods["tokenizer"]["psnr_db"]],
            *([name, value] for name, value in evaluation.psnr_at_equal_bits().items()),
        ]
        page.text(f"At the tokenizer's {evaluation.bits_per_pixel:.4g} bits per pixel, between measured points:")
        page.table(["method", "PSNR dB at equal bits"], equal)
    for name, reason in evaluation.missing_codecs.items():
        page.text(f"{name} was not measured: {reason}")


def _add_frechet(page: Page, frechet: FrechetResult) -> None:
    page.section("Fréchet distance")
    page.text(
        f"Between {frechet.num_clips} original clips and their reconstructions: {frechet.distance:.4g}. "
        f"Features: {frechet.features}. This is not I3D, so the figure is neither FVD nor rFVD."
    )
    if frechet.num_clips <= frechet.num_features:
        page.text(
            f"With no more clips than the {frechet.num_features:,} features the covariances are singular. The distance "
            "of these covariances is exact all the same; as an estimate for all video it is biased, so compare only "
            "figures of equally many clips."
        )


def _add_seams(page: Page, seams: SeamMeasures) -> None:
    page.section("Seams")
    page.text(
        f"At {seams.num_joints} places where windows of {seams.window_frames} frames meet, or would meet, and "
        "elsewhere. A step in quality that is larger at joints than elsewhere is seen as a pulse."
    )
    page.table(
        ["measure", "at joints", "elsewhere"],
        [
            ["PSNR of frames, dB", seams.psnr_at_joints_db, seams.psnr_elsewhere_db],
            ["PSNR of the change from frame to frame, dB", seams.change_at_joints_db, seams.change_elsewhere_db],
            ["step of the PSNR from frame to frame, dB", seams.step_at_joints_db, seams.step_elsewhere_db],
        ],
    )


def _video_rows(videos: Sequence[VideoMeasures]) -> tuple[list[str], list[list[Cell]]]:
    rows: list[list[Cell]] = [
        [v.name, v.num_frames, f"{v.width}x{v.height}", v.psnr_db, v.ssim, v.lpips_like, v.bits_per_pixel]
        for v in videos
    ]
    return ["video", "frames", "size", *_BEST, "bits per pixel"], rows
