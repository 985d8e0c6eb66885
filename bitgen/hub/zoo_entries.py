"""Published checkpoints with their sizes and files, files of metrics, and numbers of parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitgen import build


@dataclass(frozen=True)
class Entry:
    """One released checkpoint."""

    name: str
    family: str
    size: str  # which of its family it is, in few words
    path: str  # of the file in the repository
    repository: str = ""  # on the Hugging Face Hub
    url: str = ""  # where to get the file by hand, if it is on no hub
    gigabytes: float | None = None  # to download
    expected: str = ""  # published quality
    tokenizer: str = ""  # name of the entry whose bits a generator makes
    hparams: Mapping[str, Any] = field(default_factory=dict)  # where not the family's defaults

    @property
    def kind(self) -> str:
        """Whether it is a tokenizer or a generator."""
        return "generator" if self.family in build.GENERATORS else "tokenizer"

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def source(self) -> str:
        """The address of the file, for people."""
        return self.url or f"huggingface.co/{self.repository} {self.path}"


@dataclass(frozen=True)
class WeightsFile:
    """A published file that a metric reads."""

    name: str
    family: str  # the network that it holds; also its folder in the cache
    url: str
    gigabytes: float
    sha256: str = ""  # its first digits, where they are published

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.url.rsplit("/", 1)[1]


def _bigr_ae(size: str, steps: int, gigabytes: float, **hparams: Any) -> Entry:
    return Entry(
        f"bigr_bae_{size}",
        "binary_ae",
        size.replace("_512", ", 512 px"),
        f"bae/bae_{size}/binaryae_ema_{steps}.th",
        "haoosz/BiGR",
        gigabytes=gigabytes,
        hparams=hparams,
    )


def _bigr(
    model: str, code: str, gigabytes: float, fid: float | None = None, **hparams: Any
) -> Entry:
    return Entry(
        f"bigr_{model}_{code}",
        "bigr",
        f"{code.removesuffix('_512')}, {model}{', 512 px' if code.endswith('_512') else ''}",
        f"gpt/bigr_{model}_{code}.pt",
        "haoosz/BiGR",
        gigabytes=gigabytes,
        expected=f"FID {fid}" if fid else "",
        tokenizer=f"bigr_bae_{code}",
        hparams=hparams,
    )


def _bitvae(size: str, rfid_256: float, psnr_256: float, rfid_512: float, psnr_512: float) -> Entry:
    return Entry(
        f"bitvae_{size}",
        "bitvae",
        size,
        f"infinity_vae_{size}.pth",
        "FoundationVision/Infinity",
        expected=f"rFID {rfid_256}, PSNR {psnr_256}; 512 px: {rfid_512}, {psnr_512}",
        hparams={"bits": int(size[1:3])},
    )


def _bitdance(name: str, fid: float, **hparams: Any) -> Entry:
    return Entry(
        f"bitdance_{name}",
        "bitdance",
        name.replace("_", "-"),
        f"BitDance_{name}.pt",
        "shallowdream204/BitDance-ImageNet",
        expected=f"FID {fid}",
        tokenizer="bitdance_ae_d16c32",
        hparams=hparams,
    )


def _dcae(size: str, trained: str, expected: str = "", **hparams: Any) -> Entry:
    return Entry(
        f"dc_ae_{size}_{trained}",
        "dcae",
        f"{size}, sana" if trained == "sana" else size,
        "model.safetensors",
        f"mit-han-lab/dc-ae-{size}-{trained}-1.0",
        expected=expected,
        hparams=hparams,
    )


def _deeper(*widths: int) -> dict[str, Any]:
    """Returns the settings of f32c32 with more stages of attention."""
    defaults = build.fields_of("tokenizer", "dcae")
    words = {"depths": 2, "blocks": "attention", "norms": "rms", "activations": "silu"}
    more = {"widths": widths} | {name: (word,) * len(widths) for name, word in words.items()}
    return {
        f"{side}_{name}": defaults[f"{side}_{name}"] + values
        for side in ("encoder", "decoder")
        for name, values in more.items()
    }


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
    Entry(
        "bld_bae_c64",
        "binary_ae",
        "C64",
        "binaryae_ema_8100000.th",
        url="https://drive.google.com/drive/folders/1CFlixXLnEHZ0jaRLXLS4d_bJMZwG-Iih",
        expected="fair on any image",
        hparams={"bits": 64},
    ),
    Entry(
        "bld_bae_c128",
        "binary_ae",
        "C128",
        "binaryae_ema_10200000.th",
        url="https://drive.google.com/drive/folders/1rlWjd5iDOydTrxJyfvLZ8oDogRB3HiMe",
        expected="better than C64",
        hparams={"bits": 128, "decoder_multiplier": 3.0},
    ),
    # BiGR, haoosz/BiGR.
    _bigr_ae("d24", 1000000, 0.33, bits=24),
    _bigr_ae("d32", 950000, 0.33, bits=32),
    _bigr_ae("d32_512", 720000, 0.32, bits=32, image_size=512),
    _bigr("L", "d24", 1.35, 2.71, **_L, bits=24),
    _bigr("XL", "d24", 3.20, 2.49, **_XL, bits=24),
    _bigr("XXL", "d24", 5.92, 2.36, **_XXL, bits=24),
    _bigr("XXL", "d32", 5.92, **_XXL, bits=32),
    _bigr("L", "d32_512", 1.49, **_L_512, bits=32),
    # BitVAE, FoundationVision/BitVAE.
    _bitvae("d16", 1.22, 20.9, 0.31, 22.6),
    _bitvae("d24", 0.75, 22.0, 0.30, 23.5),
    _bitvae("d32", 0.61, 22.7, 0.23, 24.4),
    _bitvae("d64", 0.33, 24.9, 0.15, 26.4),
    _bitvae("d32reg", 0.75, 21.9, 0.32, 23.6),
    Entry(
        "bitvae_patchify_d14",
        "bitvae",
        "d14, patches of 2x2",
        "infinity_vae_d56_f8_14_patchify.pth",
        "FoundationVision/Infinity",
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
        "gfq_ae",
        "d16c32",
        "ae_d16c32.pt",
        "shallowdream204/BitDance-ImageNet",
    ),
    _bitdance("B_1x", 1.68),
    _bitdance("B_4x", 1.69, together=4),
    _bitdance("B_16x", 1.91, together=16),
    _bitdance("L_1x", 1.31, **_BITDANCE_L),
    _bitdance("H_1x", 1.24, **_BITDANCE_H),
)

ZOO = {entry.name: entry for entry in _ENTRIES}


def _tiles(latents: int, *widths: int, depths: tuple[int, ...] = (2, 2, 2)) -> dict[str, Any]:
    """Returns the settings of a DC-AE for 32x32 images with one cell and these `depths`."""
    return {
        "image_size": 32,
        "latent_channels": latents,
        "encoder_widths": widths,
        "encoder_depths": (0, 4, 8, *depths),
        "decoder_widths": widths,
        "decoder_depths": (0, 5, 10, *depths),
    }


# DC-AEs of defgsus/nn-experiments, which released no weights.
TILES = {
    "dcae_03": _tiles(32, 64, 128, 256, 256, 512, 512),
    "dcae_04": _tiles(64, 64, 128, 256, 256, 512, 512),
    "dcae_05": _tiles(64, 128, 256, 256, 512, 512, 512),
    "dcae_06": _tiles(64, 64, 128, 256, 256, 512, 1024),
    "dcae_07": _tiles(64, 64, 128, 256, 256, 512, 512, depths=(2, 3, 4)),
}

# Numbers of parameters as published, often rounded down; the others are not published.
PARAMETERS = {
    **{"bigr_L_d24": "336M", "bigr_XL_d24": "799M", "bigr_XXL_d24": "1.48B"},
    **{"bigr_XXL_d32": "1.48B", "bigr_L_d32_512": "373M"},
    **{"dc_ae_f32c32_in": "323M", "dc_ae_f32c32_mix": "323M"},
    **{"dcae_03": "81M", "dcae_04": "81M", "dcae_05": "110M", "dcae_06": "142M", "dcae_07": "106M"},
    **{"bitdance_ae_d16c32": "460M", "bitdance_B_1x": "242M", "bitdance_B_4x": "260M"},
    **{"bitdance_B_16x": "260M", "bitdance_L_1x": "527M", "bitdance_H_1x": "1.0B"},
}

# One network in three files: those of pytorch-fid, of torch-fidelity (which are equal), and the
# graph that ADM's evaluator downloads.
_INCEPTION = {
    "pytorch_fid": (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth"
    ),
    "torch_fidelity": (
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth"
    ),
    "adm": (
        "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/"
        "classify_image_graph_def.pb"
    ),
}

WEIGHTS = {
    name: WeightsFile(name, "inception", url, 0.1, "6726825d" if url.endswith(".pth") else "")
    for name, url in ((f"inception_{tool}", url) for tool, url in _INCEPTION.items())
}
