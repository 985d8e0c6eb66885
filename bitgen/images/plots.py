"""Plots: training curves, metrics against each other, the use of bits. uint8 `[H, W, 3]`."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from bitgen.errors import UserError
from bitgen.images.grids import grid


def bars(values: dict[str, np.ndarray], height: int = 64) -> UInt8[np.ndarray, "H W 3"]:
    """Draws a row of bars for each name: values [k] in [0, 1], left to right, the name above."""
    count = max(len(row) for row in values.values())
    width = max(2, min(16, 960 // count))
    margin = 14
    picture = Image.new("RGB", (max(count * width, 120), len(values) * (height + margin)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, row) in enumerate(values.items()):
        top = i * (height + margin) + margin
        draw.text((1, top - margin), name, fill="black")
        draw.rectangle((0, top, picture.width, top + height - 1), fill=(225, 225, 225))
        for j, value in enumerate(np.clip(row, 0, 1)):
            if length := round(float(value) * height):
                box = (j * width, top + height - length, (j + 1) * width - 2, top + height - 1)
                draw.rectangle(box, fill=(40, 90, 160))
    return np.asarray(picture)


# Of metrics.jsonl: how the run went, not what was learned.
_SPEED = ("step", "data_wait", "images_per_second", "mfu")


def training_curves(
    metrics: str | os.PathLike, names: Sequence[str] = (), columns: int = 3
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a plot of each metric of `metrics.jsonl` over steps.

    Args:
      metrics: the file, or the workdir that it is in.
      names: of the metrics; all but speeds by default.
      columns: of the page.

    Raises UserError if the file cannot be read or has none of the metrics.
    """
    path = Path(metrics)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}") from None
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UserError(f"{path} holds no metrics of a run: a line without a step")
    found = {name: None for row in rows for name in row if name not in _SPEED}
    for name in names:
        if not any(name in row for row in rows):
            raise UserError(f"{path} has no metric {name!r}, have {sorted(found)}")
    panels = []
    for name in names or found:
        # A run that was resumed may have written a step again: the last counts.
        points = {row["step"]: row[name] for row in rows if isinstance(row.get(name), int | float)}
        if points:
            line = sorted(points.items())
            panels.append(plot(line, [""] * len(line), "step", name, dots=len(line) < 20))
    if not panels:
        raise UserError(f"{path} has no numbers yet")
    columns = min(columns, len(panels))
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % columns)
    return grid(np.stack(panels), columns)


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 480, 90, 40, 40, 60

_INK, _LINE, _GRID = (40, 40, 40), (31, 98, 166), (222, 222, 222)

_COLOURS = (_LINE, (214, 96, 22), (44, 140, 62), (190, 40, 60), (120, 80, 180), (110, 110, 110))


def plot(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    x_name: str,
    y_name: str,
    dots: bool = True,
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a picture of the points, joined in order, each with its label; NaN is left out."""
    kept = [(p, label) for p, label in zip(points, labels, strict=True) if np.isfinite(p).all()]
    page, pen, font, place = _axes([p for p, _ in kept], x_name, y_name)
    places = [place(*p) for p, _ in kept]
    if len(places) > 1:
        pen.line(places, fill=_LINE, width=2)
    for (x, y), (_, label) in zip(places, kept, strict=True) if dots else ():
        pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=_LINE)
        pen.text((x + 6, y - 6), label, fill=_INK, font=font, anchor="ls")
    return np.asarray(page)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a picture of several lines, each with its name in the legend; NaN is left out."""
    kept = {name: [p for p in points if np.isfinite(p).all()] for name, points in series.items()}
    every = [p for points in kept.values() for p in points]
    page, pen, font, place = _axes(every, x_name, y_name)
    widest = max((font.getlength(name) for name in kept), default=0)
    left = _WIDTH - _RIGHT - widest - 8
    for i, (name, points) in enumerate(kept.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        if len(points) > 1:
            pen.line([place(*p) for p in points], fill=colour, width=2)
        down = _TOP + 14 + 20 * i
        pen.line([(left - 30, down), (left - 8, down)], fill=colour, width=3)
        pen.text((left, down), name, fill=_INK, font=font, anchor="lm")
    return np.asarray(page)


def _axes(points: Sequence[tuple[float, float]], x_name: str, y_name: str) -> Any:
    """-> a page with axes that hold the points, its pen and font, and where a point lies on it."""
    page = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    ticks = [_ticks([p[axis] for p in points] or [0.0, 1.0]) for axis in (0, 1)]
    inside = (_WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM)

    def place(x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = ((t[0], t[-1]) for t in ticks)
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return _LEFT + across * inside[0], _HEIGHT - _BOTTOM - up * inside[1]

    for x in ticks[0]:
        across = place(x, ticks[1][0])[0]
        pen.line([(across, _TOP), (across, _HEIGHT - _BOTTOM)], fill=_GRID)
        pen.text((across, _HEIGHT - _BOTTOM + 8), f"{x:g}", fill=_INK, font=font, anchor="ma")
    for y in ticks[1]:
        down = place(ticks[0][0], y)[1]
        pen.line([(_LEFT, down), (_WIDTH - _RIGHT, down)], fill=_GRID)
        pen.text((_LEFT - 8, down), f"{y:g}", fill=_INK, font=font, anchor="rm")
    pen.text((_LEFT + inside[0] / 2, _HEIGHT - 10), x_name, fill=_INK, font=font, anchor="ms")
    pen.text((_LEFT - 60, _TOP - 12), y_name, fill=_INK, font=font, anchor="ls")
    return page, pen, font, place


def _ticks(values: Sequence[float]) -> list[float]:
    """About five round numbers that hold all values between the first and the last."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step = next(step * m for m in (1, 2, 5, 10) if step * m * 5 >= span)
    if all(float(value).is_integer() for value in values):  # layers: there is none between
        step = max(step, 1.0)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]
