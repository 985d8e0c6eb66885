"""Plots by matplotlib as uint8 `[H, W, 3]`: training curves, metrics, and use of the bits."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from bitgen.errors import UserError

_DPI = 100
# The metrics of speed in metrics.jsonl.
_SPEED = ("step", "data_wait", "images_per_second", "mfu")

Points = Sequence[tuple[float, float]]


def plot_points(
    points: Points, x_name: str, y_name: str, labels: Sequence[str] = ()
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a plot of points joined in order, with labels if there are any."""
    figure, (axes,) = _figure(1)
    axes.plot(*np.transpose(points), marker="o")
    for (x, y), label in zip(points, labels, strict=bool(labels)):
        axes.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points")
    _name_axes(axes, x_name, y_name, points)
    return _render(figure)


def plot_curves(
    curves: Mapping[str, Points], x_name: str, y_name: str
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a plot of several lines with a legend."""
    figure, (axes,) = _figure(1)
    for name, points in curves.items():
        axes.plot(*np.transpose(points), label=name)
    axes.legend()
    _name_axes(axes, x_name, y_name, [point for points in curves.values() for point in points])
    return _render(figure)


def plot_bits(
    ones: Float[np.ndarray, "s k"], entropy: Float[np.ndarray, "s k"], names: Sequence[str] = ()
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns bars of how often each bit is set and of its entropy in bits, one row per scale."""
    figure, panels = _figure(2 * len(ones), columns=2, height=2.2)
    for i, (share, information) in enumerate(zip(ones, entropy, strict=True)):
        scale = f", {names[i]}" if names else ""
        for axes, values, title in (
            (panels[2 * i], share, "share of ones"),
            (panels[2 * i + 1], information, "entropy"),
        ):
            axes.bar(np.arange(len(values)), values, width=0.9)
            axes.set(title=title + scale, xlabel="bit", xlim=(-1, len(values)), ylim=(0, 1))
    return _render(figure)


def training_curves(
    metrics: str | os.PathLike, names: Sequence[str] = (), columns: int = 3
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a plot of each metric of `metrics.jsonl` over steps.

    Args:
      metrics: the file, or its workdir.
      names: metrics to plot; by default all except those of speed.
      columns: plots per row.

    Raises UserError if the file cannot be read or has none of the metrics.
    """
    path = Path(metrics)
    path = path / "metrics.jsonl" if path.is_dir() else path
    rows = _read_metrics(path)
    found = {name: None for row in rows for name in row if name not in _SPEED}
    for name in names:
        if not any(name in row for row in rows):
            raise UserError(f"{path} has no metric {name!r}, have {sorted(found)}")
    curves = {}
    for name in names or found:
        # A resumed run may have written a step twice; the last one counts.
        values = {row["step"]: row[name] for row in rows if isinstance(row.get(name), int | float)}
        if values:
            curves[name] = sorted(values.items())
    if not curves:
        raise UserError(f"{path} has no numbers yet")
    figure, panels = _figure(len(curves), columns=min(columns, len(curves)))
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        axes.plot(*np.transpose(points), marker="." if len(points) < 20 else "")
        _name_axes(axes, "step", name, points)
    return _render(figure)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}") from None
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UserError(f"{path} holds no metrics of a run: a line without a step")
    return rows


def _figure(panels: int, columns: int = 1, height: float = 4.2) -> tuple[Any, list[Any]]:
    """Returns a figure without pyplot's global state, and its axes."""
    from matplotlib.figure import Figure  # takes half a second to import

    rows = -(-panels // columns)
    figure = Figure((6.4 * columns, height * rows), dpi=_DPI, layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    return figure, axes


def _name_axes(axes: Any, x_name: str, y_name: str, points: Points) -> None:
    axes.set(xlabel=x_name, ylabel=y_name)
    axes.grid(alpha=0.3)
    if all(float(x).is_integer() for x, _ in points):  # steps and layers have no fractions
        axes.xaxis.get_major_locator().set_params(integer=True)


def _render(figure: Any) -> UInt8[np.ndarray, "H W 3"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
