"""A plain convolutional autoencoder with one vector an image, a baseline for small experiments.

Unpadded convolutions and a linear layer, mirrored by transposed convolutions, as in
defgsus/nn-experiments (`experiments/ae/baseline.yml`).
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import UserError
from bitgen.nn.conv import conv, torch_kernel_init
from bitgen.nn.norms import Dtype
from bitgen.tokenizers.latent import LatentTokenizer


class ConvAutoencoder(LatentTokenizer):
    """Images of one size to `code` latents, or bits, in a 1x1 grid and back.

    The defaults compress 32x32 images to 24 times fewer numbers. Raises UserError when first used
    with settings that fit no model.
    """

    channels: int = 3
    image_size: int = 32
    widths: tuple[int, ...] = (24, 32, 48)
    kernel: int = 5  # odd
    code: int = 128
    dtype: Dtype = jnp.float32

    grid = (1, 1)
    last_layer = ("conv_out",)  # path of the last convolution, for GAN losses

    @property
    def latents(self) -> int:
        """Channels of the latents."""
        return self.code

    @property
    def _side(self) -> int:
        """Side of the linear layer's input in pixels."""
        return self.image_size - len(self.widths) * (self.kernel - 1)

    def setup(self):
        if not self.widths or self.kernel % 2 == 0 or self.kernel < 1 or self._side < 1:
            raise UserError(
                f"conv_ae needs an odd kernel and images larger than what its layers take off, got "
                f"kernel {self.kernel}, widths {self.widths}, image_size {self.image_size}"
            )
        self._check_quantizer()
        unpadded = {"padding": "VALID"}
        self.convs = [conv(w, self.kernel, None, self.dtype, **unpadded) for w in self.widths]
        linear = {"kernel_init": torch_kernel_init, "dtype": self.dtype}
        self.linear_in = nn.Dense(self.code, **linear)
        self.linear_out = nn.Dense(self._side**2 * self.widths[-1], **linear)
        # A transposed convolution of stride 1 is a convolution with full padding.
        self.deconvs = [
            conv(w, self.kernel, None, self.dtype, padding=self.kernel - 1)
            for w in self.widths[-2::-1]
        ]
        self.conv_out = conv(self.channels, self.kernel, None, self.dtype)

    def _latents(self, images: Array, train: bool) -> Float[Array, "b 1 1 c"]:
        del train
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise UserError(
                f"conv_ae of image_size {self.image_size} got images of "
                f"{images.shape[1]}x{images.shape[2]} pixels: resize them"
            )
        x = images.astype(self.dtype)
        for layer in self.convs:
            x = nn.relu(layer(x))
        return self.linear_in(x.reshape(len(x), 1, 1, -1)).astype(jnp.float32)

    def _pixels(self, values: Array, train: bool) -> tuple[Array, Array]:
        del train
        x = self.linear_out(values.astype(self.dtype))
        x = x.reshape(len(x), self._side, self._side, self.widths[-1])
        for layer in self.deconvs:
            x = nn.relu(layer(x))
        margin = self.kernel // 2  # for the last layer to preserve the size of its input
        x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        return self.conv_out(x).astype(jnp.float32), x
