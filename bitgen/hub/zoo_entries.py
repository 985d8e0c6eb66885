"""What is published: checkpoints with sizes and files, files of metrics, counts of parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bitgen import build


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


@dataclass(frozen=True)
class WeightsFile:
    """A published file that a metric reads as it is."""

    name: str
    family: str  # the network that it holds; also its folder in the cache
    url: str
    gigabytes: float
    sha256: str = ""  # its first digits, where they are published

    @property
    def file(self) -> str:
        """Its name."""
        return self.url.rsplit("/", 1)[1]


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


def _tiles(latents: int, *widths: int, depths: tuple[int, ...] = (2, 2, 2)) -> dict[str, Any]:
    """A DC-AE of 32x32 images, one cell each; `depths` of its stages of attention."""
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

# Parameters as the authors print them, often rounded down; what is not here is not published.
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
