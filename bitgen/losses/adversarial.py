"""PatchGAN discriminator, its hinge losses, and the weight that balances them with reconstruction.

Follows Binary Latent Diffusion (arXiv 2304.04820, ZeWang95/BinaryLatentDiffusion), which follows
pix2pix (arXiv 1611.07004) and VQGAN (arXiv 2012.09841).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bitgen.errors import UserError

# PyTorch's default for a convolution: uniform within 1/sqrt(fan in).
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    Statistics are float32 and of the global batch under `jit`. Training updates the running ones if
    `batch_stats` is mutable; unlike flax's, the variance averages unbiased estimates.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)

        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean = jnp.mean(x, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(x - _per_channel(mean)), axis=(0, 1, 2))
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                keep = 1 - self.momentum
                running_mean.value = keep * running_mean.value + self.momentum * mean
                running_var.value = keep * running_var.value + self.momentum * unbiased
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        y = (x - _per_channel(mean)) * _per_channel(factor) + _per_channel(bias)
        return y.astype(self.dtype)


def _per_channel(vector: Float[Array, " c"]) -> Float[Array, "1 1 1 c"]:
    return vector.reshape(1, 1, 1, -1)


class PatchDiscriminator(nn.Module):
    """PatchGAN: images [b, H, W, 3] in [-1, 1] to a logit for each patch.

    Returns float32 logits [b, h, w, 1], h = H // 2**layers - 2: 30 for 256 pixels and three layers.
    Images are mapped to `pixel_range` first, (0, 1) in Binary Latent Diffusion. `train` normalises
    by the batch and updates `batch_stats`. Raises UserError for bad settings or small images.
    """

    width: int = 64
    layers: int = 3
    pixel_range: tuple[float, float] = (0.0, 1.0)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b H W 3"], *, train: bool = False
    ) -> Float[Array, "b h w 1"]:
        self._check(images)
        low, high = self.pixel_range
        x = (images + 1) * ((high - low) / 2) + low

        x = nn.leaky_relu(self._conv(0, self.width, stride=2, use_bias=True)(x), 0.2)
        for i in range(1, self.layers + 1):
            features = self.width * min(2**i, 8)
            x = self._conv(i, features, stride=2 if i < self.layers else 1, use_bias=False)(x)
            x = BatchNorm(dtype=self.dtype, name=f"norm_{i}")(x, train=train)
            x = nn.leaky_relu(x, 0.2)
        logits = self._conv(self.layers + 1, 1, stride=1, use_bias=True)(x)
        return logits.astype(jnp.float32)

    def _conv(self, i: int, features: int, *, stride: int, use_bias: bool) -> nn.Conv:
        return nn.Conv(
            features,
            (4, 4),
            strides=stride,
            padding=1,  # not "SAME", which differs at stride 1
            use_bias=use_bias,
            kernel_init=_kernel_init,
            dtype=self.dtype,
            name=f"conv_{i}",
        )

    def _check(self, images: Array):
        _check_layers(self.layers)
        if not self.pixel_range[0] < self.pixel_range[1]:
            raise UserError(
                f"discriminator pixel_range {self.pixel_range} is empty: give (low, high)"
            )
        least = 3 * 2**self.layers
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < least:
            raise UserError(
                f"a discriminator of {self.layers} layers needs images [b, H, W, 3] of at least "
                f"{least} pixels a side, got {images.shape}: use larger images or fewer layers"
            )


def discriminator_layout(layers: int = 3) -> list[tuple[int, str, str]]:
    """Returns (index in PyTorch's `main.N.*`, our module name, kind) of each layer with tensors.

    Kinds are "conv" (weight, bias), "conv_no_bias" (weight) and "batch_norm" (weight, bias,
    running_mean, running_var, and num_batches_tracked, which is unused). Raises UserError if
    layers < 1.
    """
    _check_layers(layers)
    layout = [(0, "conv_0", "conv")]
    for i in range(1, layers + 1):
        layout.append((3 * i - 1, f"conv_{i}", "conv_no_bias"))
        layout.append((3 * i, f"norm_{i}", "batch_norm"))
    return [*layout, (3 * layers + 2, f"conv_{layers + 1}", "conv")]


def _check_layers(layers: int):
    if layers < 1:
        raise UserError(f"discriminator layers must be 1 or more, got {layers}: 3 is usual")


def hinge_discriminator_loss(
    real_logits: Float[Array, "..."], fake_logits: Float[Array, "..."]
) -> Float[Array, ""]:
    """Returns half the mean of relu(1 - real) plus half the mean of relu(1 + fake)."""
    real = jnp.mean(nn.relu(1 - real_logits.astype(jnp.float32)))
    fake = jnp.mean(nn.relu(1 + fake_logits.astype(jnp.float32)))
    return 0.5 * (real + fake)


def generator_loss(fake_logits: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns minus the mean logit of the reconstructions."""
    return -jnp.mean(fake_logits.astype(jnp.float32))


def lecam_loss(
    real_logits: Float[Array, "..."],
    fake_logits: Float[Array, "..."],
    running: dict[str, Float[Array, ""]],
) -> Float[Array, ""]:
    """Returns LeCam's regulariser of a discriminator (arXiv 2104.03310).

    `running` holds moving averages of the mean logits, "real" and "fake". Penalises real logits
    above the fake average and fake ones below the real average, squared: the one-sided form of the
    authors' code, google/lecam-gan.
    """
    above = nn.relu(real_logits.astype(jnp.float32) - running["fake"])
    below = nn.relu(running["real"] - fake_logits.astype(jnp.float32))
    return jnp.mean(jnp.square(above)) + jnp.mean(jnp.square(below))


def adaptive_weight(
    recon_gradient: PyTree, gan_gradient: PyTree, maximum: float = 1.0
) -> Float[Array, ""]:
    """Returns |recon gradient| / (|gan gradient| + 1e-4) clipped to [0, maximum], a constant.

    The gradients are those of two losses at the decoder's last kernel, arrays or trees, as in VQGAN
    (arXiv 2012.09841).
    """

    def norm(tree):
        leaves = jax.tree.leaves(tree)
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))

    ratio = norm(recon_gradient) / (norm(gan_gradient) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


class LastLayerGradients(NamedTuple):
    """The output of `last_layer_gradients`, one entry a loss."""

    values: tuple[Float[Array, ""], ...]
    metrics: tuple[Any, ...]
    images: tuple[Float[Array, "b H W c"], ...]  # dL/d(images)
    kernels: tuple[Float[Array, "kh kw d c"], ...]  # dL/d(kernel)


def last_layer_gradients(
    losses: Sequence[Callable[[Array], tuple[Array, Any]]],
    images: Float[Array, "b H W c"],
    hidden: Float[Array, "b H W d"],
    *,
    kernel_size: tuple[int, int] = (3, 3),
    image_scale: float = 1.0,
) -> LastLayerGradients:
    """Returns the gradients of image losses at the decoder's last kernel, without the decoder.

    The last layer is linear in its kernel: images = image_scale · (hidden * kernel + bias) +
    constant, a convolution of stride 1, "SAME" padding and odd `kernel_size`. So dL/d(kernel)
    follows from dL/d(images) and `hidden`, and each loss is differentiated once, at the images:

        images, hidden = decode(params, ...)
        gradients = last_layer_gradients((recon, gan), images, hidden)
        weight = adaptive_weight(*gradients.kernels)
        loss = weighted_loss(images, gradients, (1.0, weight))    # under jax.grad of params

    Each loss maps float32 images to (scalar, metrics). `image_scale` is 2 for a decoder whose last
    layer gives pixels in [0, 1]. The outputs are constants to gradients. Raises UserError for
    shapes that do not fit such a layer.
    """
    if images.ndim != 4 or hidden.shape[:-1] != images.shape[:-1]:
        raise UserError(
            f"last_layer_gradients needs hidden [b, H, W, d] beside images [b, H, W, c], got "
            f"{hidden.shape} and {images.shape}: hidden is the input of the last convolution"
        )
    if any(size % 2 == 0 for size in kernel_size):
        raise UserError(f"last_layer_gradients needs an odd kernel_size, got {kernel_size}")
    # Stopped here as well as at the end, so that no second derivatives are traced.
    images, hidden = jax.lax.stop_gradient((images, hidden))
    images = images.astype(jnp.float32)
    hidden = hidden.astype(jnp.float32)
    kernel = jax.ShapeDtypeStruct((*kernel_size, hidden.shape[-1], images.shape[-1]), jnp.float32)

    def last_layer(kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(hidden, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return image_scale * y

    to_kernel = jax.linear_transpose(last_layer, kernel)
    entries = []
    for loss in losses:
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(images)
        (kernel_gradient,) = to_kernel(gradient)
        entries.append((value, metrics, gradient, kernel_gradient))
    return LastLayerGradients(*jax.lax.stop_gradient(tuple(zip(*entries, strict=True))))


def weighted_loss(
    images: Float[Array, "b H W c"],
    gradients: LastLayerGradients,
    weights: Sequence[Float[Array, ""] | float],
) -> Float[Array, ""]:
    """Returns the sum of weight · loss, whose gradient `last_layer_gradients` has computed.

    Its gradient at `images` is that of the weighted losses, which are not differentiated again.
    Weights are constants to gradients.
    """
    weights = jax.lax.stop_gradient(tuple(weights))
    total = sum(w * value for w, value in zip(weights, gradients.values, strict=True))
    cotangent = sum(w * g for w, g in zip(weights, gradients.images, strict=True))
    images = images.astype(jnp.float32)
    # The second term is zero; only its gradient counts.
    return total + jnp.sum((images - jax.lax.stop_gradient(images)) * cotangent)
