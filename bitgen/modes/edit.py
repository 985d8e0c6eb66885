"""Mode `edit`: BiGR's zero-shot edits of the user's own picture (`samplers.edits`)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bitgen import __version__
from bitgen.errors import choose
from bitgen.files import write_json
from bitgen.hub import model_directory
from bitgen.images import editing
from bitgen.images.decode import center_crop
from bitgen.images.grids import sheet
from bitgen.images.output import write_png
from bitgen.runtime.distributed import check_single
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import make_mesh, replicated
from bitgen.samplers.edits import (
    KINDS,
    EditInput,
    EditResult,
    check_settings,
    edit_picture,
    read_input,
)

_COLUMNS = 9  # of the sheet


def run(config: Any, workdir: Path) -> None:
    """Writes `edit_00.png` and so on, `edit.png` with all of them, and `edit.json`.

    With `config.edit.blend` also `blended_00.png` and so on, in the size of the user's picture. The
    generator is `config.generator`, or the one trained in the workdir. Raises UserError for
    settings that contradict each other, files that cannot be read, an area that marks no token or
    all of them, labels out of range, and models that cannot edit.
    """
    # ------------------------------------------------- settings, checked before models are loaded
    check_single("--mode=edit")
    settings = config.edit
    kind = choose("kind of edit", settings.kind, KINDS)
    check_settings(settings, kind)
    source = read_input(settings, kind)

    # ------------------------------------------------------------------------------------ models
    mesh = make_mesh(**config.mesh)
    generator, tokenizer = model_directory.load_pair(config, workdir, replicated(mesh))

    # ----------------------------------------------------------------------------- draw and write
    result = edit_picture(config, source, generator, tokenizer, mesh)
    blended = []
    if settings.blend:
        blended = [blend_view(settings.kind, source, image) for image in result.images]
    drawn = [int(mask.sum()) for masks in result.job.rounds for mask in masks]
    report = {
        "bitgen": __version__,
        "edit": settings.to_dict(),
        "classes": result.labels,
        "seed": config.seed,
        "plan": dataclasses.asdict(result.plan),
        "generator": _identity(generator),
        "tokenizer": _identity(tokenizer),
        "tokens": int(np.prod(generator.module.grid)),
        "tokens_drawn": sum(drawn),
        "passes": drawn,
    }
    write(workdir, result, blended, report)
    counts = f"{sum(drawn)} tokens drawn a variant, the grid has {report['tokens']}"
    log_info(f"wrote {workdir / 'edit.png'}: {len(result.images)} images, {counts}")


def blend_view(
    kind: str, source: EditInput, view: UInt8[np.ndarray, "S S 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the user's whole picture with the drawn area blended into it.

    As in BiGR's script, outpainting blends the kept area into the drawn picture instead.
    """
    assert source.picture is not None
    assert source.area is not None
    left, top, side = square = editing.crop_square(source.picture, len(view))
    visible = np.zeros_like(source.area)
    visible[top : top + side, left : left + side] = True
    original = np.asarray(source.picture)
    drawn = editing.paste_crop(source.picture, square, view)
    pair = (drawn, original) if kind == "outpaint" else (original, drawn)
    return editing.blend(*pair, source.area & visible)


def write(
    workdir: Path,
    result: EditResult,
    blended: list[UInt8[np.ndarray, "H W 3"]],
    report: dict[str, Any],
) -> None:
    """Writes all files, replacing those of an earlier edit; `edit.json` is written last."""
    (workdir / "edit.json").unlink(missing_ok=True)
    for pattern in ("edit_[0-9]*.png", "blended_[0-9]*.png"):
        for old in workdir.glob(pattern):
            old.unlink()
    names, cells, blends = [], [], []
    for i, (image, detail) in enumerate(zip(result.images, result.details, strict=True)):
        names.append({**detail, "file": f"edit_{i:02d}.png"})
        write_png(workdir / f"edit_{i:02d}.png", image)
        cells.append((", ".join(f"{key} {value:g}" for key, value in detail.items()), image))
        if blended:
            names[-1]["blended"] = f"blended_{i:02d}.png"
            write_png(workdir / f"blended_{i:02d}.png", blended[i])
            view = center_crop(Image.fromarray(blended[i]), image.shape[0])
            blends.append((f"blended {detail['variant']}", view))
    # A variant of several rounds is one row, a long interpolation several rows.
    columns = report["edit"]["rounds"] if report["edit"]["kind"] == "enrich" else _COLUMNS
    rows = [result.inputs] if result.inputs else []
    for part in (cells, blends):
        rows += [part[i : i + columns] for i in range(0, len(part), columns)]
    write_png(workdir / "edit.png", sheet(rows))
    write_json(workdir / "edit.json", {**report, "images": names})


def _identity(model: model_directory.Model) -> dict[str, Any]:
    return {"path": model.path, **{name: model.info.get(name) for name in ("family", "digest")}}
