"""One self-contained HTML page: text, tables, pictures and videos, all embedded, nothing fetched from outside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeGuard

import numpy as np

from nemo_cosmos.errors import user_error
from nemo_cosmos.files import written_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Picture = np.ndarray | Figure | str | Path
    """uint8 RGB [H, W, 3], a matplotlib figure, or the path of a PNG, JPEG or WebP file."""

Cell = str | float | int | None
Best = Literal["max", "min"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --paper: #ffffff; --card: #f5f7f9; --line: #dde3e9;
  --best: #d9f2df; --accent: #3a7d12; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --paper: #12161c; --card: #1b212a;
  --line: #323b47; --best: #1d4429; --accent: #8fd14f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.2rem 1.4rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: 1rem; border-top: 2px solid var(--accent); }
.lead { color: var(--soft); font-size: 1.08rem; margin: 0; max-width: 75ch; }
p { max-width: 85ch; margin: .5rem 0; }
.scroll { overflow-x: auto; margin: .9rem 0; }
table { border-collapse: collapse; font-size: .93rem; }
th, td { padding: .38rem .85rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.best { background: var(--best); font-weight: 600; }
figure { margin: 1rem 0; padding: .7rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure img, figure video { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figure img.plot { background: #ffffff; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .5rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0 0; }
.tiles div { flex: 1 1 8.5rem; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.tiles b { display: block; font-size: 1.55rem; line-height: 1.25; }
.tiles span { color: var(--soft); font-size: .88rem; }
.grid { display: grid; gap: .8rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(var(--width), 100%), 1fr)); }
.grid figure { margin: 0; }
.grid img, .grid video { width: 100%; }
"""


class Page:
    """A page built from top to bottom; what adds a part returns the page itself."""

    def __init__(self, title: str, lead: str) -> None:
        """Starts a page.

        Args:
            title: Heading and window title.
            lead: One or two sentences under the heading.
        """
        self._title = title
        self._parts = [f"<h1>{_escaped(title)}</h1>", f'<p class="lead">{_escaped(lead)}</p>']

    def section(self, title: str) -> Self:
        """Starts a section."""
        return self._add(f"<h2>{_escaped(title)}</h2>")

    def text(self, text: str) -> Self:
        """Adds a paragraph of plain text."""
        return self._add(f"<p>{_escaped(text)}</p>")

    def table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        highlight_best: Mapping[str, Best] | None = None,
    ) -> Self:
        """Adds a table; numbers are aligned right and shortened by `format_cell`, None is shown as a dash.

        Args:
            headers: One word or two per column.
            rows: One cell per header in each.
            highlight_best: For a header, whether its largest or smallest number is marked.

        Raises:
            ValueError: A row has another length than the headers, or `highlight_best` names no header.
        """
        unknown = sorted(set(highlight_best or {}) - set(headers))
        if unknown or any(len(row) != len(headers) for row in rows):
            lengths = sorted({len(row) for row in rows})
            raise ValueError(
                f"table: {len(headers)} headers, rows of {lengths} cells, unknown columns to mark {unknown}"
            )
        best = {
            headers.index(name): _best(rows, headers.index(name), how) for name, how in (highlight_best or {}).items()
        }
        numeric = {i for i in range(len(headers)) if any(_is_number(row[i]) for row in rows)}
        head = "".join(
            f'<th class="{"number" if i in numeric else ""}">{_escaped(h)}</th>' for i, h in enumerate(headers)
        )
        body = "".join(
            "<tr>" + "".join(_cell(c, i in numeric, best.get(i)) for i, c in enumerate(row)) + "</tr>" for row in rows
        )
        return self._add(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def tiles(self, items: Sequence[tuple[str, str]]) -> Self:
        """Adds figures in large type side by side: what each is, and its value."""
        tiles = (f"<div><b>{_escaped(value)}</b><span>{_escaped(name)}</span></div>" for name, value in items)
        return self._add(f'<div class="tiles">{"".join(tiles)}</div>')

    def image(self, image: Picture, caption: str) -> Self:
        """Adds a picture: JPEG for arrays, SVG for figures, a PNG or JPEG file as it is.

        Raises:
            UserError: The array is not uint8 [H, W, 3], or the file is missing or of another kind.
        """
        return self._add(_figure(_image_tag(image, caption), caption))

    def video(self, path: str | Path, caption: str) -> Self:
        """Adds an mp4 file as a player.

        Raises:
            UserError: The file is missing.
        """
        return self._add(_figure(_video_tag(path), caption))

    def gallery(self, items: Sequence[tuple[Picture, str]], *, min_width_px: int = 240) -> Self:
        """Adds pictures with captions side by side, as many in a row as find `min_width_px` each."""
        return self._grid([_figure(_image_tag(image, caption), caption) for image, caption in items], min_width_px)

    def videos(self, items: Sequence[tuple[str | Path, str]], *, min_width_px: int = 240) -> Self:
        """Adds videos with captions side by side, as many in a row as find `min_width_px` each."""
        return self._grid([_figure(_video_tag(path), caption) for path, caption in items], min_width_px)

    def to_html(self) -> str:
        """Returns the whole document."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_escaped(self._title)}</title><style>{_STYLE}</style>"
        )
        body = "\n".join(self._parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'

    def write(self, path: str | Path) -> Path:
        """Writes the page, aside and renamed.

        Raises:
            UserError: The disk is full or the folder is read-only.
        """
        path = Path(path)
        with written_aside(path) as aside:
            aside.write_text(self.to_html(), encoding="utf-8")
        return path

    def _grid(self, figures: list[str], min_width_px: int) -> Self:
        return self._add(f'<div class="grid" style="--width: {min_width_px}px">{"".join(figures)}</div>')

    def _add(self, part: str) -> Self:
        self._parts.append(part)
        return self


def format_cell(value: Cell) -> str:
    """Shortens a number to four significant digits (no exponent from 0.0001 up); None becomes a dash."""
    if value is None:
        return "–"
    if not _is_number(value) or isinstance(value, int | np.integer):
        return f"{value:,}" if _is_number(value) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def frame_sheet(
    rows: Sequence[np.ndarray], labels: Sequence[str], *, columns: int, cell_height: int | None = None
) -> np.ndarray:
    """Lays evenly spaced frames of several videos under each other, with labels at the left and frame numbers above.

    Args:
        rows: Videos, each uint8 [T, H, W, 3]; one size and length for all.
        labels: One text per row; line breaks are kept.
        columns: How many frames to show of each.
        cell_height: Height of a frame on the sheet in pixels; the video's own by default.

    Returns:
        The sheet, uint8 RGB [H, W, 3].

    Raises:
        ValueError: The videos differ in shape, or there are no rows, labels or columns for them.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = {row.shape for row in rows}
    if len(shapes) != 1 or len(rows) != len(labels) or columns < 1:
        raise ValueError(
            f"frame_sheet: {len(labels)} labels for {len(rows)} rows of shapes {shapes}, {columns} columns"
        )
    num_frames, old_height, old_width, _ = rows[0].shape
    height = cell_height or old_height
    width = round(old_width * height / old_height)
    font_size = max(11, height // 8)
    font = ImageFont.load_default(size=font_size)
    gap, top = max(2, height // 40), font_size + 8
    left = max(_text_width(label, font) for label in labels) + 2 * font_size
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    picked = np.linspace(0, num_frames - 1, columns).round().astype(int)
    for column, frame in enumerate(picked):
        x = left + column * (width + gap)
        draw.text((x + width / 2, top / 2), f"frame {frame}", fill="#5b6675", font=font, anchor="mm")
        for row, video in enumerate(rows):
            cell = Image.fromarray(video[frame]).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (x, top + row * (height + gap)))
    for row, label in enumerate(labels):
        place = (left - font_size, top + row * (height + gap) + height / 2)
        draw.multiline_text(place, label, fill="#1d2430", font=font, anchor="rm", align="right")
    return np.asarray(sheet)


def _text_width(label: str, font: FreeTypeFont | ImageFont) -> int:
    return max(int(font.getlength(line)) for line in label.split("\n"))


def _escaped(text: object) -> str:
    return html.escape(str(text), quote=True)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _best(rows: Sequence[Sequence[Cell]], column: int, how: Best) -> float | None:
    cells = [row[column] for row in rows]
    numbers = [cell for cell in cells if _is_number(cell) and np.isfinite(cell)]
    return (max if how == "max" else min)(numbers, default=None)


def _cell(value: Cell, numeric: bool, best: float | None) -> str:
    names = ["number"] * numeric + ["best"] * (best is not None and value == best)
    return f'<td class="{" ".join(names)}">{_escaped(format_cell(value))}</td>'


def _figure(tag: str, caption: str) -> str:
    return f"<figure>{tag}<figcaption>{_escaped(caption)}</figcaption></figure>"


def _image_tag(image: Picture, caption: str) -> str:
    if isinstance(image, np.ndarray):
        kind, data, plot = "jpeg", _jpeg(image), ""
    elif isinstance(image, str | Path):
        kind, data, plot = *_picture_file(Path(image)), ""
    else:
        kind, data, plot = "svg+xml", _svg(image), ' class="plot"'
    return f'<img{plot} alt="{_escaped(caption)}" src="{_data_uri(f"image/{kind}", data)}">'


def _video_tag(path: str | Path) -> str:
    path = Path(path)
    if not path.is_file():
        raise user_error("video", str(path), "an existing mp4 file", "Run the step that writes it.")
    return f'<video controls autoplay loop muted playsinline src="{_data_uri("video/mp4", path.read_bytes())}"></video>'


def _picture_file(path: Path) -> tuple[str, bytes]:
    kind = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise user_error("picture", str(path), "an existing PNG, JPEG or WebP file", "Run the step that writes it.")
    return kind, path.read_bytes()


def _jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise user_error("picture", f"{image.dtype} {image.shape}", "uint8 [H, W, 3]", "Convert it before adding it.")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
