"""Mode `edit`: BiGR's zero-shot applications on the user's own picture.

Inpaint, outpaint, class-conditional edit, class interpolation and enrichment (Hao et al.,
arXiv 2410.14672). Unlike the reference, exactly the masked tokens are drawn, on the schedule of
their own number, and a known token never changes.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bitgen import __version__
from bitgen.errors import choose
from bitgen.hub import model_directory
from bitgen.hub.model_directory import Model
from bitgen.images import editing, grids
from bitgen.images.crops import center_crop
from bitgen.images.files import write_png
from bitgen.runtime.distributed import check_single
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import make_mesh, replicated
from bitgen.samplers.edits import KINDS, Cell, Source, check_settings, perform, read_source

_IN_A_ROW = 9  # pictures of the sheet


def run(config: Any, workdir: Path) -> None:
    """Writes `edit_00.png` and on, `edit.png` with all of them, and `edit.json` below the workdir.

    With `config.edit.blend` also `blended_00.png` and on, in the size of the user's picture. The
    generator is `config.generator`, or the one that was trained in the workdir. Raises UserError
    for settings that do not go together, files that cannot be read, an area that marks no token or
    all of them, labels out of range, and models that cannot do it.
    """
    # ---- What was asked for, checked before anything large is loaded ----
    check_single("--mode=edit")
    settings = config.edit
    kind = choose("kind of edit", settings.kind, KINDS)
    check_settings(settings, kind)
    source = read_source(settings, kind)

    # ---- Models ----
    mesh = make_mesh(**config.mesh)
    generator, tokenizer = model_directory.load_pair(config, workdir, replicated(mesh))

    # ---- Drawing ----
    drawn = perform(config, source, generator, tokenizer, mesh)
    images = drawn.images
    blended = [blend_view(settings.kind, source, image) for image in images if settings.blend]

    # ---- Results ----
    report = {
        "bitgen": __version__,
        "edit": settings.to_dict(),
        "classes": drawn.labels,
        "seed": config.seed,
        "plan": dataclasses.asdict(drawn.plan),
        "generator": _identity(generator),
        "tokenizer": _identity(tokenizer),
        "tokens": int(np.prod(generator.module.grid)),
        "tokens_drawn": sum(int(mask.sum()) for masks in drawn.work.rounds for mask in masks),
        "passes": [int(mask.sum()) for masks in drawn.work.rounds for mask in masks],
        "images": drawn.names,
    }
    if jax.process_index() == 0:
        write(workdir, drawn.inputs, images, blended, report)
    counts = f"{report['tokens_drawn']} tokens drawn a variant, the grid has {report['tokens']}"
    log_info(f"wrote {workdir / 'edit.png'}: {len(images)} images, {counts}")


def blend_view(
    kind: str, source: Source, view: UInt8[np.ndarray, "S S 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the user's whole picture with what was drawn blended into it.

    As in BiGR's script the drawn area is blended into the original, and when outpainting the kept
    area into what was drawn.
    """
    assert source.picture is not None
    assert source.area is not None
    left, top, side = square = editing.crop_square(source.picture, len(view))
    seen = np.zeros_like(source.area)
    seen[top : top + side, left : left + side] = True
    original = np.asarray(source.picture)
    drawn = editing.paste_crop(source.picture, square, view)
    pair = (drawn, original) if kind == "outpaint" else (original, drawn)
    return editing.blend(*pair, source.area & seen)


def write(
    workdir: Path,
    inputs: list[Cell],
    images: UInt8[np.ndarray, "i S S 3"],
    blended: list[UInt8[np.ndarray, "H W 3"]],
    report: dict[str, Any],
) -> None:
    """Writes all files in place of an earlier edit's; `edit.json` is the last."""
    (workdir / "edit.json").unlink(missing_ok=True)
    for name in ("edit_[0-9]*.png", "blended_[0-9]*.png"):
        for old in workdir.glob(name):
            old.unlink()
    cells, blends = [], []
    for image, name in zip(images, report["images"], strict=True):
        write_png(workdir / name["file"], image)
        detail = [f"{key} {value:g}" for key, value in name.items() if key in ("ratio", "round")]
        cells.append((", ".join([f"variant {name['variant']}", *detail]), image))
    for image, name in zip(blended, report["images"] if blended else [], strict=True):
        write_png(workdir / name["blended"], image)
        view = center_crop(Image.fromarray(image), images.shape[1])
        blends.append((f"blended {name['variant']}", view))
    # A variant of several rounds is a row; of a long interpolation several.
    columns = report["edit"]["rounds"] if report["edit"]["kind"] == "enrich" else _IN_A_ROW
    rows = [inputs] if inputs else []
    for part in (cells, blends):
        rows += [part[i : i + columns] for i in range(0, len(part), columns)]
    write_png(workdir / "edit.png", grids.sheet(rows))
    (workdir / "edit.json").write_text(json.dumps(report, indent=2) + "\n")


def _identity(model: Model) -> dict[str, Any]:
    return {"path": model.path, **{name: model.info.get(name) for name in ("family", "digest")}}
