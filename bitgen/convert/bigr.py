"""Conversion table of BiGR (haoosz/BiGR); released files hold `{"ema": state dict}`."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitgen.convert.entries import (
    LINEAR,
    Alias,
    Constant,
    Entry,
    Rule,
    Shape,
    count_numbered,
    dense,
    renamed,
    shape_votes,
    squeeze,
    transformer_layers,
)
from bitgen.errors import UserError
from bitgen.generators.bigr import BiGR
from bitgen.nn.mlp import swiglu_width

_REFERENCE_NAMES = {
    "dim": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "binary_size": "bits",
    "num_classes": "num_classes",
    "denoise_hidden_dim": "denoiser_width",
    "num_block_mlp": "denoiser_layers",
    "n_sample_steps": "diffusion_steps",
    "use_adaLN": "adaln",
    "p_flip": "predict_flip",
    "multiple_of": "mlp_multiple",
    "norm_eps": "norm_eps",
    "rope_base": "rope_base",
    "cls_token_num": "class_tokens",
}
_MLP = {"w1": ("gate", LINEAR), "w3": ("up", LINEAR), "w2": ("down", LINEAR)}
_HEAD_DIM = 64  # of every released size
_MULTIPLES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # tried in this order


def hparams_from_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Returns BiGR's settings from the original's hyper-parameters.

    Raises UserError if the tokens are not a square grid or differ from the learned positions.
    """
    # The original's defaults where they differ from ours.
    defaults = {"adaln": False, "predict_flip": False}
    tokens = reference.get("block_size", 256)
    side = math.isqrt(tokens)
    if side * side != tokens or reference.get("seq_len", tokens) != tokens:
        raise UserError(
            f"block_size {tokens} must be a square and equal seq_len {reference.get('seq_len')}"
        )
    found = {**defaults, **renamed(reference, _REFERENCE_NAMES), "grid": (side, side)}
    return {**found, "rope_base": float(found.get("rope_base", 10_000.0))}


def table(hparams: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries between a PyTorch file and the parameters of BiGR with these settings."""
    config = BiGR(**hparams)
    entries: list[Entry] = [
        Rule("mask_tok", "mask_token", squeeze(0)),
        Rule("diffusion_pos_embed_learned", "position_embedding", squeeze(0)),
        Rule("cls_embedding.embedding_table.weight", "class_embedding"),
        *dense("tok_embeddings", "bits_embedding"),
        Rule("norm.weight", "norm/scale"),
        *transformer_layers(config.width, config.heads, _MLP),
        *_denoiser(),
    ]
    if config.adaln:
        entries += dense("adaLN.1", "adaln")
        offset = "layers/modulation_offset"
        entries.append(Rule("layers.{layer}.ada_gss", offset, squeeze(0, 1), stack="layer"))
    entries.append(Alias("diffusion_processor._denoise_fn.{name*}", of="denoise_mlp.{name*}"))
    steps = (config.diffusion_steps + 1,)
    for name in ("k_final", "b_final", "beta", "cumbeta"):
        make = functools.partial(_schedule, name)
        entries.append(Constant(f"diffusion_processor.scheduler.{name}", make, steps))
    return entries


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """Returns BiGR's settings from a file's names and shapes, or None if it has none.

    What no shape tells is taken from the released models: 64 channels per head, predicted flips,
    one class token, and our defaults of the norm and of rotary positions.
    """
    layers = count_numbered(shapes, r"layers\.(\d+)(\..+)?")
    denoiser_layers = count_numbered(shapes, r"denoise_mlp\.blocks\.(\d+)(\..+)?")
    width = shape_votes(shapes, r"layers\.\d+\.(attention|ffn)_norm\.weight", 0)
    hidden = shape_votes(shapes, r"layers\.\d+\.feed_forward\.w[13]\.weight", 0)
    bits = shape_votes(shapes, r"(tok_embeddings|denoise_mlp\.x_embedder)\.weight", 1)
    denoiser_width = shape_votes(shapes, r"denoise_mlp\.blocks\.\d+\.mlp\.\d\.bias", 0)
    if width is None or hidden is None or bits is None or denoiser_width is None:
        return None
    multiples = [m for m in _MULTIPLES if swiglu_width(width, m) == hidden]
    side = math.isqrt(shape_votes(shapes, "diffusion_pos_embed_learned", 1) or 256)
    classes = shape_votes(shapes, r"cls_embedding\.embedding_table\.weight", 0) or 1001
    times = shape_votes(shapes, r"diffusion_processor\.scheduler\.\w+", 0) or 257
    if not multiples or not denoiser_layers:
        return None
    return {
        "width": width,
        "layers": layers,
        "heads": 1 if width % _HEAD_DIM else width // _HEAD_DIM,
        "bits": bits,
        "grid": (side, side),
        "num_classes": classes - 1,
        "denoiser_width": denoiser_width,
        "denoiser_layers": denoiser_layers,
        "diffusion_steps": times - 1,
        "adaln": any(name.startswith("adaLN.") or name.endswith(".ada_gss") for name in shapes),
        "predict_flip": True,
        "mlp_multiple": multiples[0],
        "norm_eps": 1e-5,
        "rope_base": 10_000.0,
        "class_tokens": 1,
    }


def noise_schedule(steps: int) -> dict[str, np.ndarray]:
    """Returns the linear schedule as the original stores it, four arrays float32 [steps + 1].

    At step t a bit x has mean `k_final[t] * x + b_final[t]`, and `beta[t]` is what one step keeps.
    """
    # Summed in float64 as in the original, so that the float32 values are equal bit for bit.
    beta = 1 - 1 / (steps - np.arange(1, steps + 1) + 1)
    keep, coin = [1.0], [0.0]
    for kept in beta:
        keep.append(keep[-1] * kept)
        coin.append(kept * coin[-1] + 0.5 * (1 - kept))
    beta = np.concatenate([[1.0], beta]).astype(np.float32)
    return {
        "k_final": np.array(keep, np.float32),
        "b_final": np.array(coin, np.float32),
        "beta": beta,
        "cumbeta": np.cumprod(beta, dtype=np.float64).astype(np.float32),
    }


def _schedule(name: str, hparams: Mapping[str, Any]) -> np.ndarray:
    return noise_schedule(BiGR(**hparams).diffusion_steps)[name]


def _denoiser() -> list[Entry]:
    names = {
        "t_embedder.mlp.0": "time_in",
        "t_embedder.mlp.2": "time_out",
        "x_embedder": "bits_in",
        "c_embedder": "cond_in",
        "blocks.{block}.mlp.0": "blocks_{block}/mlp_in",
        "blocks.{block}.mlp.2": "blocks_{block}/mlp_out",
        "blocks.{block}.adaLN_modulation.1": "blocks_{block}/modulation",
        "final_layer.linear": "final/linear",
        "final_layer.adaLN_modulation.1": "final/modulation",
    }
    pairs = ((f"denoise_mlp.{torch}", f"denoiser/{ours}") for torch, ours in names.items())
    return [entry for pair in pairs for entry in dense(*pair)]
