"""Grids of images, captions and bit planes; all pictures are uint8 `[H, W, 3]`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from bitgen.errors import UserError


def grid(images: UInt8[np.ndarray, "n H W 3"], columns: int) -> UInt8[np.ndarray, "gH gW 3"]:
    """Returns images in rows of `columns`, in order; unused cells are black."""
    images = np.asarray(images)
    if columns < 1 or images.ndim != 4:
        raise UserError(
            f"a grid takes images [n, H, W, 3] and columns >= 1, got {list(images.shape)} "
            f"and {columns}"
        )
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.zeros((rows * columns, height, width, channels), images.dtype)
    cells[:n] = images
    cells = cells.reshape(rows, columns, height, width, channels)
    return cells.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def paired_grid(
    above: UInt8[np.ndarray, "n H W 3"], below: UInt8[np.ndarray, "n H W 3"], columns: int
) -> UInt8[np.ndarray, "gH gW 3"]:
    """Returns rows of `columns` images, each above the row of their counterparts."""
    columns = min(columns, len(above))
    starts = range(0, len(above) // columns * columns, columns)
    rows = [part[start : start + columns] for start in starts for part in (above, below)]
    return grid(np.concatenate(rows), columns)


_LABEL = 18  # pixels of a cell's label

_GAP = 6  # between cells

_PAGE = (225, 225, 225)  # neither black nor white, as masks are

_SMALLEST = 128  # side of a cell, so that labels fit


def sheet(rows: list[list[tuple[str, UInt8[np.ndarray, "S S 3"]]]]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns rows of square pictures of one size, each below its label."""
    size = rows[0][0][1].shape[0]
    scale = -(-_SMALLEST // size)
    side = size * scale
    width, height = side + _GAP, side + _LABEL + _GAP
    columns = max(map(len, rows))
    page = Image.new("RGB", (columns * width + _GAP, len(rows) * height + _GAP), _PAGE)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for i, row in enumerate(rows):
        for j, (label, picture) in enumerate(row):
            left, top = j * width + _GAP, i * height + _GAP
            pen.text((left + 1, top), label, fill="black", font=font)
            cell = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            page.paste(cell, (left, top + _LABEL))
    return np.asarray(page)


_CAPTION = 124  # pixels of the narrowest cell of a sheet, less a margin

_PLANES = 8  # in a row


def captioned_grid(
    images: UInt8[np.ndarray, "n S S 3"], captions: Sequence[str], columns: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns images in rows of `columns`, each below its caption; long captions are cut."""
    if columns < 1 or len(images) != len(captions) or not len(images):
        raise UserError(
            f"a captioned grid takes a caption an image and a column at least, got {len(images)} "
            f"images, {len(captions)} captions, {columns} columns"
        )
    width = max(_CAPTION, images.shape[2])
    cells = [(_cut(text, width), image) for text, image in zip(captions, images, strict=True)]
    return sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])


def bit_planes(
    bits: Bool[np.ndarray, "h w k"], image: UInt8[np.ndarray, "S S 3"] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the planes of a code, one for each bit of a token, white where it is set.

    `image`, the image of the code, comes first. Give the bits of one scale.
    """
    bits = np.asarray(bits)
    if bits.ndim != 3 or bits.dtype != bool:
        raise UserError(f"planes are of bool [h, w, k], got {bits.dtype} {list(bits.shape)}")
    side = max(bits.shape[:2]) if image is None else len(image)
    cells = []
    for i in range(bits.shape[-1]):
        plane = Image.fromarray(bits[..., i].astype(np.uint8) * 255).convert("RGB")
        plane = plane.resize((side, side), Image.Resampling.NEAREST)
        cells.append((f"bit {i}, {bits[..., i].mean():.0%}", np.asarray(plane)))
    rows = [] if image is None else [[("image", image)]]
    return sheet(rows + [cells[i : i + _PLANES] for i in range(0, len(cells), _PLANES)])


def _cut(text: str, width: int) -> str:
    """Returns the text, cut to a width in the font of `sheet`."""
    font = ImageFont.load_default(size=13)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
