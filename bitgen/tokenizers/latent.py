"""The base class of autoencoders with continuous latents, or bits by any quantiser."""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import UserError, choose
from bitgen.tokenizers.quantizers import QUANTIZERS, make_quantizer


class LatentTokenizer(nn.Module):
    """Defines encode, decode and the training path from `_latents` and `_pixels`.

    Codes are latents, float32 [b,h,w,c], with quantizer "none". Others quantise the latents to
    bits, bool [b,h,w,k], k = c, and the decoder reads the quantiser's values instead of latents.
    Subclasses have `latents`, the number of channels, `_latents(images, train)`, and
    `_pixels(values, train)`, which returns the images and the input of the last convolution.
    """

    quantizer: str = "none"  # or bernoulli, sign, spherical
    group_size: int = 8  # bits of a group in the entropy loss of "sign"
    deterministic: bool = False  # bits of "bernoulli" are rounded in training too

    image_scale = 1.0  # the last convolution's output to images in [-1, 1]

    @property
    def bits(self) -> int:
        """Bits of a cell, 0 for continuous latents."""
        return 0 if self.quantizer == "none" else self.latents

    @property
    def stochastic(self) -> bool:
        """Whether generators are trained on drawn bits."""
        return self.quantizer == "bernoulli" and not self.deterministic

    def encode(self, images: Float[Array, "b H W c"]) -> Array:
        """Returns the latents of images in [-1, 1], or their bits, without randomness."""
        latents = self._latents(images, False)
        return self._quantizer().bits(latents) if self.bits else latents

    def decode(self, codes: Array) -> Float[Array, "b H W c"]:
        """Returns images in about [-1, 1], not clipped, for latents or bits."""
        return self._pixels(self._quantizer().codes(codes) if self.bits else codes, False)[0]

    def probs(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w k"]:
        """Returns the probability of each bit for images in [-1, 1].

        Raises UserError for quantizers other than bernoulli, whose bits have no probabilities.
        """
        if self.quantizer != "bernoulli":
            raise UserError(
                f"a tokenizer with quantizer {self.quantizer!r} has no bit probabilities: "
                "encode it (config.train.stochastic_bits=False), or use quantizer 'bernoulli'"
            )
        return jax.nn.sigmoid(self._latents(images, False))

    def __call__(
        self, images: Float[Array, "b H W c"], *, train: bool
    ) -> tuple[Float[Array, "b H W c"], dict[str, Any]]:
        """Returns the reconstruction, with straight-through gradients, and a dict for the losses.

        The dict holds `losses` (name to scalar), `last_input`, the input of `last_layer`, and
        `bits` unless latents are continuous. Training draws bernoulli bits with the rng 'bits'.
        """
        values = self._latents(images, train)
        aux: dict[str, Any] = {"losses": {}}
        if self.bits:
            key = self.make_rng("bits") if train and self.stochastic else None
            quantized = self._quantizer()(values, key)
            values = quantized.codes
            aux = {"losses": quantized.losses, "bits": quantized.bits}
        images, last_input = self._pixels(values, train)
        return images, {**aux, "last_input": last_input}

    def _latents(self, images: Array, train: bool) -> Array:
        raise NotImplementedError

    def _pixels(self, values: Array, train: bool) -> tuple[Array, Array]:
        raise NotImplementedError

    def _quantizer(self) -> Any:
        settings = {
            "bernoulli": {"deterministic": self.deterministic},
            "sign": {"groups": self.latents // max(self.group_size, 1)},
        }
        return make_quantizer(self.quantizer, **settings.get(self.quantizer, {}))

    def _check_quantizer(self) -> None:
        """Raises UserError for an unknown quantizer or a group size that does not divide."""
        choose("quantizer", self.quantizer, ["none", *QUANTIZERS])
        size = self.group_size
        if self.quantizer == "sign" and (size < 1 or self.latents % size):
            raise UserError(
                f"{self.latents} bits do not split into groups of group_size {size}: "
                "choose a divisor (8 is usual, its 256 codes are enumerated)"
            )
