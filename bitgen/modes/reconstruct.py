"""Mode `reconstruct`: images through a tokenizer and back, and the errors."""

from pathlib import Path
from typing import Any

from bitgen.evaluation.reconstruction import bit_entropy, make_metrics, measure_data, scale_names
from bitgen.files import write_json
from bitgen.hub import model_directory
from bitgen.images.grids import bit_planes, paired_grid
from bitgen.images.output import write_png
from bitgen.images.plots import plot_bits
from bitgen.runtime.distributed import check_mesh, is_first
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import make_mesh, replicated
from bitgen.runtime.watchdog import guard

_ROWS = 4  # of originals in the picture

_WORDS = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.3f}", "lpips": "LPIPS {:.3f}"}

_WORDS |= {"rfid": "rFID {:.2f}", "bits_used": "{:.0%} of the bits in use"}

_WORDS |= {"bits_dead": "{:.0f} dead", "bits_entropy": "{:.3f} bits of entropy each"}


def run(config: Any, workdir: Path) -> None:
    """Writes `reconstructions.png` (images above reconstructions) and `reconstructions.json`.

    For a tokenizer with bits also `bits.png` (how often each bit of each scale is set, and its
    entropy) and `bit_planes.png` (those of the first image at its finest scale). The tokenizer is
    `config.tokenizer`, or the one trained in the workdir. rFID and LPIPS are measured if
    `config.reconstruct` has a protocol and weights for them. Raises UserError for missing files.
    """
    settings, mesh = config.reconstruct, make_mesh(**config.mesh)
    check_mesh(mesh)
    with guard(workdir, "reconstruct", config.train.stuck_after) as watch:
        watch.report("loading the tokenizer", slow=True)
        path = config.tokenizer or workdir / "model"
        tokenizer = model_directory.load(path, "tokenizer", replicated(mesh))
        metrics, show = make_metrics(settings, mesh), _ROWS * settings.columns
        found = measure_data(tokenizer, config.data, settings, mesh, metrics, watch, show=show)
        if is_first():
            _write(workdir, settings, tokenizer, metrics, found)
    words = [
        text.format(found.values[name]) for name, text in _WORDS.items() if name in found.values
    ]
    log_info(
        f"{found.values['images']} images of split {settings.split!r}: {', '.join(words)}; "
        f"{workdir / 'reconstructions.png'}"
    )


def _write(workdir: Path, settings: Any, tokenizer: Any, metrics: Any, found: Any) -> None:
    original, made = found.shown["original"], found.shown["reconstruction"]
    write_png(workdir / "reconstructions.png", paired_grid(original, made, settings.columns))
    if len(found.ones):
        names = scale_names(tokenizer.module)
        write_png(workdir / "bits.png", plot_bits(found.ones, bit_entropy(found.ones), names))
        write_png(workdir / "bit_planes.png", bit_planes(found.shown["finest"][0], made[0]))
    report = {
        "tokenizer": tokenizer.path,
        "protocol": settings.protocol,
        "weights": metrics.digest,
        **found.values,
    }
    write_json(workdir / "reconstructions.json", report)
