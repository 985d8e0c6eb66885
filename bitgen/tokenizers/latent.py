"""What autoencoders with a vector a cell share: continuous latents, or bits by any quantiser."""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import UserError, choose
from bitgen.tokenizers.quantizers import QUANTIZERS, make_quantizer


class LatentTokenizer(nn.Module):
    """Latents, or their bits: the encode, decode and training path of `_latents` and `_pixels`.

    With quantizer "none" codes are latents, float32 [b,h,w,c]. With another, the latents are what
    it quantises: codes are bool [b,h,w,k], k = c, and the decoder reads the quantiser's values in
    place of latents. Subclasses have `latents` channels, `_latents(images, train)` and
    `_pixels(values, train)`, which returns the images and what entered the last convolution.
    """

    quantizer: str = "none"  # bernoulli | sign | spherical | none: continuous latents
    group_size: int = 8  # bits whose codes the entropy loss of "sign" spreads together
    deterministic: bool = False  # "bernoulli" rounds instead of drawing bits in training

    @property
    def bits(self) -> int:
        """Bits of a cell; 0 if latents are continuous."""
        return 0 if self.quantizer == "none" else self.latents

    @property
    def stochastic(self) -> bool:
        """Whether a generator is trained on drawn bits."""
        return self.quantizer == "bernoulli" and not self.deterministic

    @property
    def image_scale(self) -> float:
        """What `last_layer`'s output is multiplied by to be images in [-1, 1]."""
        return 1.0

    def encode(self, images: Float[Array, "b H W c"]) -> Array:
        """Returns the latents of images in [-1, 1], or their bits, nothing drawn."""
        latents = self._latents(images, False)
        return self._quantizer().bits(latents) if self.bits else latents

    def decode(self, codes: Array) -> Float[Array, "b H W c"]:
        """Returns images in about [-1, 1], not clipped, for what `encode` returns."""
        return self._pixels(self._quantizer().codes(codes) if self.bits else codes, False)[0]

    def probs(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w k"]:
        """Returns the probability of each bit for images in [-1, 1].

        Raises UserError for a quantizer other than bernoulli: its bits have none.
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
        """Returns the reconstruction and what the losses need, gradients straight through bits.

        The second value holds `losses` (name to scalar), `last_input`, the activation that enters
        `last_layer`, and, unless latents are continuous, `bits`. Training draws bernoulli bits with
        the rng named 'bits'.
        """
        values = self._latents(images, train)
        aux: dict[str, Any] = {"losses": {}}
        if self.bits:
            drawn = train and self.quantizer == "bernoulli" and not self.deterministic
            key = self.make_rng("bits") if drawn else None
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
        """Raises UserError for an unknown quantizer, or groups that the bits do not fill."""
        choose("quantizer", self.quantizer, ["none", *QUANTIZERS])
        size = self.group_size
        if self.quantizer == "sign" and (size < 1 or self.latents % size):
            raise UserError(
                f"{self.latents} bits do not split into groups of group_size {size}: "
                "choose a divisor (8 is usual, its 256 codes are enumerated)"
            )
