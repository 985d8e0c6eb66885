"""Released checkpoints, and `zoo:NAME`, which fetches and converts one.

A converted model lies in the cache, `models/NAME` below $BITGEN_CACHE or ~/.cache/bitgen. A file
that cannot be downloaded is put by hand where `placed` says.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitgen import build
from bitgen.errors import UserError, choose

PREFIX = "zoo:"


@dataclass(frozen=True)
class Entry:
    """One released checkpoint."""

    name: str
    kind: Literal["tokenizer", "generator"]
    family: str
    size: str  # which of its family it is, in few words
    pixels: int
    file: str
    gigabytes: float | None  # to download
    repository: str | None  # on the Hugging Face Hub
    folder: str = ""  # of the file in the repository
    url: str = ""  # where to get the file by hand, if it is on no hub
    wrapped: str | None = None  # the key under which the file holds the state dict
    expected: str = ""  # published quality
    tokenizer: str = ""  # name of the entry whose bits a generator makes
    hparams: Mapping[str, Any] = field(default_factory=dict)  # where not the family's defaults

    @property
    def usable(self) -> bool:
        """Whether bitgen has the family."""
        return self.family in build.FAMILIES[self.kind]

    @property
    def source(self) -> str:
        """Where the file is, to be read by a person."""
        if self.repository is None:
            return self.url
        return f"huggingface.co/{self.repository} {self.folder}{self.file}"


def _binary_ae(name: str, size: str, file: str, gigabytes: float | None, **fields: Any) -> Entry:
    hparams = fields.pop("hparams")
    pixels = hparams.get("image_size", 256)
    return Entry(
        name, "tokenizer", "binary_ae", size, pixels, file, gigabytes, hparams=hparams, **fields
    )


def _bigr(name: str, size: str, gigabytes: float, tokenizer: str, **fields: Any) -> Entry:
    hparams = fields.pop("hparams")
    return Entry(
        name,
        "generator",
        "bigr",
        size,
        16 * hparams.get("grid", (16, 16))[0],
        f"{name}.pt",
        gigabytes,
        "haoosz/BiGR",
        "gpt/",
        wrapped="ema",
        tokenizer=tokenizer,
        hparams=hparams,
        **fields,
    )


def _bitvae(size: str, rfid_256: float, psnr_256: float, rfid_512: float, psnr_512: float) -> Entry:
    return Entry(
        f"bitvae_{size}",
        "tokenizer",
        "bitvae",
        size,
        256,
        f"infinity_vae_{size}.pth",
        None,
        "FoundationVision/Infinity",
        wrapped="vae",
        expected=f"rFID {rfid_256}, PSNR {psnr_256}; 512 px: {rfid_512}, {psnr_512}",
        hparams={"bits": int(size[1:3])},
    )


def _bitdance(size: str, fid: float, **hparams: Any) -> Entry:
    return Entry(
        f"bitdance_{size.replace('-', '_')}",
        "generator",
        "bitdance",
        size,
        256,
        f"BitDance_{size.replace('-', '_')}.pt",
        None,
        "shallowdream204/BitDance-ImageNet",
        wrapped="ema",
        expected=f"FID {fid}",
        tokenizer="bitdance_ae_d16c32",
        hparams=hparams,
    )


def _dcae(size: str, trained: str, expected: str = "", **hparams: Any) -> Entry:
    return Entry(
        f"dc_ae_{size}_{trained}",
        "tokenizer",
        "dcae",
        f"{size}, sana" if trained == "sana" else size,
        512,
        "model.safetensors",
        None,
        f"mit-han-lab/dc-ae-{size}-{trained}-1.0",
        wrapped="state_dict",  # in .pt files of the same names
        expected=expected,
        hparams=hparams,
    )


def _deeper(*widths: int) -> dict[str, Any]:
    """The settings of f32c32 with more stages of attention."""
    defaults = build.fields_of("tokenizer", "dcae")
    words = {"depths": 2, "blocks": "attention", "norms": "rms", "activations": "silu"}
    more = {"widths": widths} | {name: (word,) * len(widths) for name, word in words.items()}
    return {
        f"{side}_{name}": defaults[f"{side}_{name}"] + values
        for side in ("encoder", "decoder")
        for name, values in more.items()
    }


_DRIVE = "https://drive.google.com/drive/folders/"
_L = {"width": 1024, "layers": 24, "heads": 16, "denoiser_width": 1024, "denoiser_layers": 3}
_L_512 = {**_L, "grid": (32, 32), "denoiser_width": 1280, "denoiser_layers": 6}
_XL = {"width": 1280, "layers": 36, "heads": 20, "denoiser_width": 1280, "denoiser_layers": 6}
_XXL = {"width": 1536, "layers": 48, "heads": 24, "denoiser_width": 1536, "denoiser_layers": 8}
_F64 = {"latent_channels": 128, **_deeper(2048)}
_F128 = {"latent_channels": 512, **_deeper(2048, 2048)}
_SANA = {
    "encoder_depths": (2, 2, 2, 3, 3, 3),
    "encoder_blocks": ("res",) * 3 + ("attention_5",) * 3,
    "decoder_depths": (3,) * 6,
    "decoder_blocks": ("res",) * 3 + ("attention_5",) * 3,
    "decoder_norms": ("rms",) * 6,
    "decoder_activations": ("silu",) * 6,
    "downsample": "conv",
    "upsample": "interpolate",
}

_BITDANCE_L = {"width": 1024, "layers": 32, "heads": 16, "head_width": 1024, "head_layers": 8}
_BITDANCE_H = {
    **{"width": 1280, "layers": 40, "heads": 20},
    **{"head_width": 1280, "head_layers": 12, "head_modulations": 3},
}

_ENTRIES = (
    # Binary Latent Diffusion, ZeWang95/BinaryLatentDiffusion.
    _binary_ae(
        "bld_bae_c64",
        "C64",
        "binaryae_ema_8100000.th",
        None,
        repository=None,
        url=f"{_DRIVE}1CFlixXLnEHZ0jaRLXLS4d_bJMZwG-Iih",
        expected="fair on any image",
        hparams={"bits": 64},
    ),
    _binary_ae(
        "bld_bae_c128",
        "C128",
        "binaryae_ema_10200000.th",
        None,
        repository=None,
        url=f"{_DRIVE}1rlWjd5iDOydTrxJyfvLZ8oDogRB3HiMe",
        expected="better than C64",
        hparams={"bits": 128, "decoder_multiplier": 3.0},
    ),
    # BiGR, haoosz/BiGR.
    _binary_ae(
        "bigr_bae_d24",
        "d24",
        "binaryae_ema_1000000.th",
        0.33,
        repository="haoosz/BiGR",
        folder="bae/bae_d24/",
        hparams={"bits": 24},
    ),
    _binary_ae(
        "bigr_bae_d32",
        "d32",
        "binaryae_ema_950000.th",
        0.33,
        repository="haoosz/BiGR",
        folder="bae/bae_d32/",
        hparams={"bits": 32},
    ),
    _binary_ae(
        "bigr_bae_d32_512",
        "d32, 512 px",
        "binaryae_ema_720000.th",
        0.32,
        repository="haoosz/BiGR",
        folder="bae/bae_d32_512/",
        hparams={"bits": 32, "image_size": 512},
    ),
    _bigr(
        "bigr_L_d24",
        "d24, L",
        1.35,
        "bigr_bae_d24",
        expected="FID 2.71",
        hparams={**_L, "bits": 24},
    ),
    _bigr(
        "bigr_XL_d24",
        "d24, XL",
        3.20,
        "bigr_bae_d24",
        expected="FID 2.49",
        hparams={**_XL, "bits": 24},
    ),
    _bigr(
        "bigr_XXL_d24",
        "d24, XXL",
        5.92,
        "bigr_bae_d24",
        expected="FID 2.36",
        hparams={**_XXL, "bits": 24},
    ),
    _bigr("bigr_XXL_d32", "d32, XXL", 5.92, "bigr_bae_d32", hparams={**_XXL, "bits": 32}),
    _bigr(
        "bigr_L_d32_512",
        "d32, L, 512 px",
        1.49,
        "bigr_bae_d32_512",
        hparams={**_L_512, "bits": 32},
    ),
    # BitVAE, FoundationVision/BitVAE.
    _bitvae("d16", 1.22, 20.9, 0.31, 22.6),
    _bitvae("d24", 0.75, 22.0, 0.30, 23.5),
    _bitvae("d32", 0.61, 22.7, 0.23, 24.4),
    _bitvae("d64", 0.33, 24.9, 0.15, 26.4),
    _bitvae("d32reg", 0.75, 21.9, 0.32, 23.6),
    Entry(
        "bitvae_patchify_d14",
        "tokenizer",
        "bitvae",
        "d14, patches of 2x2",
        256,
        "infinity_vae_d56_f8_14_patchify.pth",
        None,
        "FoundationVision/Infinity",
        wrapped="vae",
        hparams={"bits": 56, "patch": 2, "multipliers": (1, 2, 4, 4)},
    ),
    # DC-AE, mit-han-lab/efficientvit; "mix" and "in" are the networks of one size.
    _dcae("f32c32", "in"),
    _dcae("f64c128", "in", "512 px: rFID 0.217, PSNR 26.15, SSIM 0.71, LPIPS 0.080", **_F64),
    _dcae("f128c512", "in", **_F128),
    _dcae("f32c32", "mix"),
    _dcae("f64c128", "mix", **_F64),
    _dcae("f128c512", "mix", **_F128),
    _dcae("f32c32", "sana", "MJHQ at 1024 px: rFID 0.339, PSNR 29.31", **_SANA),
    # BitDance, shallowdream204/BitDance.
    Entry(
        "bitdance_ae_d16c32",
        "tokenizer",
        "gfq_ae",
        "d16c32",
        256,
        "ae_d16c32.pt",
        None,
        "shallowdream204/BitDance-ImageNet",
        wrapped="state_dict",
    ),
    _bitdance("B-1x", 1.68),
    _bitdance("B-4x", 1.69, together=4),
    _bitdance("B-16x", 1.91, together=16),
    _bitdance("L-1x", 1.31, **_BITDANCE_L),
    _bitdance("H-1x", 1.24, **_BITDANCE_H),
)
ZOO = {entry.name: entry for entry in _ENTRIES}


def get(name: str) -> Entry:
    """Returns an entry by name; raises UserError if there is none, or none that can be used yet."""
    entry = choose("model of the zoo", name.removeprefix(PREFIX), ZOO)
    if not entry.usable:
        raise UserError(f"{entry.name} is a {entry.family}, which this version cannot load yet")
    return entry


def settings(entry: Entry) -> dict[str, Any]:
    """Returns every setting of a usable entry's module."""
    defaults = build.fields_of(entry.kind, entry.family)
    return {
        name: entry.hparams.get(name, value)
        for name, value in defaults.items()
        if name not in build.RUN_FIELDS
    }


def find(family: str, hparams: Mapping[str, Any]) -> Entry | None:
    """Returns the entry of a family that agrees with all the settings given, if there is one."""
    for entry in ZOO.values():
        if entry.family == family and entry.usable:
            ours = settings(entry)
            if all(ours.get(name) == _tuple(value) for name, value in hparams.items()):
                return entry
    return None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has lists only


def describe(family: str, hparams: Mapping[str, Any]) -> str:
    """Returns the sizes of a model in few words: those of its entry, if it is in the zoo."""
    if entry := find(family, hparams):
        return entry.size
    if "latent_channels" in hparams:
        widths = hparams["encoder_widths"]
        return f"f{2 ** (len(widths) - 1)}c{hparams['latent_channels']}, width {widths[-1]}"
    bits = f"d{hparams['bits']}"
    if "layers" in hparams:
        return f"{bits}, {hparams['layers']} layers of width {hparams['width']}"
    return f"{bits}, {hparams['image_size']} px, width {hparams['width']}"


def resolve(path: str | os.PathLike) -> Path:
    """Returns the model directory of zoo:NAME, fetched and converted on first use; any other path
    as it is.

    Raises UserError for an unknown name, and if the file is neither there nor can be downloaded:
    which file to get, and where to put it.
    """
    if not str(path).startswith(PREFIX):
        return Path(path)
    entry = get(str(path))
    directory = cache() / "models" / entry.name
    finished = directory / "model.json"
    if not finished.is_file():
        with _locked(directory):
            if not finished.is_file():  # another process may have been faster
                _convert(_file(entry), directory, entry)
    return directory


def cache() -> Path:
    """Returns the directory that zoo models and files put by hand are in."""
    return Path(os.environ.get("BITGEN_CACHE") or Path.home() / ".cache" / "bitgen").absolute()


def placed(entry: Entry) -> Path:
    """Returns where a file is found that is put there by hand."""
    return cache() / "files" / entry.name / entry.file


def table() -> str:
    """Returns the zoo as a table of text."""
    rows = [("NAME", "FAMILY", "SIZE", "PIXELS", "GB", "EXPECTED", "FROM")]
    for entry in ZOO.values():
        rows.append(
            (
                entry.name,
                entry.family + ("" if entry.usable else " (not yet)"),
                entry.size.removesuffix(f", {entry.pixels} px"),
                str(entry.pixels),
                "" if entry.gigabytes is None else f"{entry.gigabytes:.2f}",
                entry.expected,
                entry.source,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _file(entry: Entry) -> Path:
    """Returns the checkpoint file, put by hand or downloaded."""
    by_hand = placed(entry)
    if by_hand.parent.is_dir():
        for path in by_hand.parent.iterdir():
            # BitDance's authors renamed their files from 1X to 1x.
            if path.name.lower() == by_hand.name.lower() and path.is_file():
                return path
    help_ = f"get {entry.file} from {entry.source} and put it at {by_hand}"
    if entry.repository is None:
        raise UserError(f"{entry.name} is on no hub: {help_}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError:
        install = "pip install 'bitgen[convert]'"
        raise UserError(
            f"downloading {entry.name} needs huggingface_hub: {install}, or {help_}"
        ) from None
    logging.set_verbosity_error()  # our one line says what its lines for each try would
    try:
        # Into the hub's own cache: what another program fetched is found, what broke off resumes.
        return Path(hf_hub_download(entry.repository, f"{entry.folder}{entry.file}"))
    except Exception as e:  # of three libraries, none of which has a class for all its errors
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise UserError(f"{entry.name} cannot be downloaded: {reason}; {help_}") from None


def _convert(file: Path, directory: Path, entry: Entry) -> None:
    # A process of its own: what asks for the model may span hosts and hold the accelerator.
    command = [sys.executable, "-m", "bitgen.convert", str(file), str(directory)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    # Some of these also hold an average, which the original does not read.
    weights = ["--weights=model"] if entry.wrapped == "vae" else []
    command += [*weights, f"--model={entry.name}"]
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{file} cannot be converted to {entry.name}: see the lines above")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time work on a directory of the cache."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"cannot write {directory.parent} ({e.strerror}): set BITGEN_CACHE to a directory"
        ) from None
    with directory.with_name(directory.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
