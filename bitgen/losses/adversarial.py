"""PatchGAN discriminator, its hinge losses, and the weight that balances them with reconstruction.

The network and the training rule are those of Binary Latent Diffusion (arXiv 2304.04820,
ZeWang95/BinaryLatentDiffusion), which took them from pix2pix (arXiv 1611.07004) and VQGAN
(arXiv 2012.09841).
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

    Statistics are float32 and over the whole batch, also when it is sharded under `jit`. The
    running variance takes the unbiased estimate; flax's own layer takes the biased one. With
    `train` the running statistics move only if `batch_stats` is mutable.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], *, train: bool) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))

        x = x.astype(jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean = jnp.mean(x, axis=(0, 1, 2))
            var = jnp.mean(jnp.square(x - _per_channel(mean)), axis=(0, 1, 2))
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                count = x.size // channels
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
    """PatchGAN: each logit judges one patch of an image [b, H, W, 3] in [-1, 1].

    Returns float32 logits [b, h, w, 1], h = H // 2**layers - 2: 30 for a 256-pixel image and three
    layers. `pixel_range` is the range the network works in: (0, 1) in Binary Latent
    Diffusion, (-1, 1) leaves the images as they are. `train` normalises by the batch and moves the
    running statistics in `batch_stats`. UserError on bad settings and on images that are too small.
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
            padding=((1, 1), (1, 1)),  # "SAME" gives other sizes at stride 1
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
    """The PyTorch network as (index in `main.N.*`, our module name, kind), in order.

    Kinds: "conv" (weight, bias), "conv_no_bias" (weight), "batch_norm" (weight, bias,
    running_mean, running_var; also num_batches_tracked, which nothing here needs). Activations hold
    no tensors and are left out. UserError if `layers` is less than 1.
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
    """Half the mean of relu(1 - real) plus half the mean of relu(1 + fake); logits of any shape."""
    real = jnp.mean(nn.relu(1 - real_logits.astype(jnp.float32)))
    fake = jnp.mean(nn.relu(1 + fake_logits.astype(jnp.float32)))
    return 0.5 * (real + fake)


def generator_loss(fake_logits: Float[Array, "..."]) -> Float[Array, ""]:
    """Minus the mean logit of the reconstructions; logits of any shape."""
    return -jnp.mean(fake_logits.astype(jnp.float32))


def lecam_loss(
    real_logits: Float[Array, "..."],
    fake_logits: Float[Array, "..."],
    running: dict[str, Float[Array, ""]],
) -> Float[Array, ""]:
    """LeCam's regulariser of a discriminator (arXiv 2104.03310); logits of any shape.

    `running` holds the moving averages of the mean logit as "real" and "fake". Squared is by how
    much a real logit lies above the fake average, and a fake one below the real average: the
    one-sided form of the authors' code, google/lecam-gan.
    """
    above = nn.relu(real_logits.astype(jnp.float32) - running["fake"])
    below = nn.relu(running["real"] - fake_logits.astype(jnp.float32))
    return jnp.mean(jnp.square(above)) + jnp.mean(jnp.square(below))


def adaptive_weight(
    recon_gradient: PyTree, gan_gradient: PyTree, maximum: float = 1.0
) -> Float[Array, ""]:
    """|recon gradient| / (|gan gradient| + 1e-4), clipped to [0, maximum], without a gradient.

    Each is the gradient of one loss at the decoder's last kernel (any shape, or a tree), as
    `last_layer_gradients` gives them. The rule of VQGAN (arXiv 2012.09841).
    """
    ratio = _norm(recon_gradient) / (_norm(gan_gradient) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


def _norm(tree: PyTree) -> Float[Array, ""]:
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


class LastLayerGradients(NamedTuple):
    """What `last_layer_gradients` gives, one entry a loss, in the order of the losses."""

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
    """Gradients of several image losses at the decoder's last kernel, without a pass through it.

    The last layer is linear in its kernel: images = image_scale · (hidden * kernel + bias) +
    constant, a convolution of stride 1 and "SAME" padding, `kernel_size` odd. So dL/d(kernel)
    follows from dL/d(images) and `hidden`, and each loss is walked back once, down to the images:

        images, hidden = decode(params, ...)
        gradients = last_layer_gradients((recon, gan), images, hidden)
        weight = adaptive_weight(*gradients.kernels)
        loss = weighted_loss(images, gradients, (1.0, weight))    # under jax.grad of params

    Each loss maps float32 images to (scalar, metrics); metrics are passed on as they are.
    `image_scale` is 2 for a decoder whose last layer gives pixels in [0, 1] that are then mapped to
    [-1, 1]. Nothing that is returned carries a gradient. UserError if the shapes cannot belong to
    such a layer.
    """
    if images.ndim != 4 or hidden.shape[:-1] != images.shape[:-1]:
        raise UserError(
            f"last_layer_gradients needs hidden [b, H, W, d] beside images [b, H, W, c], got "
            f"{hidden.shape} and {images.shape}: hidden is the input of the last convolution"
        )
    if any(size % 2 == 0 for size in kernel_size):
        raise UserError(f"last_layer_gradients needs an odd kernel_size, got {kernel_size}")
    # Stopped here as well as at the end: no second derivatives are traced.
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
    """The sum of weight · loss, with the gradients that `last_layer_gradients` already took.

    Its gradient with respect to `images`, and so to all below them, is that of the weighted losses;
    the losses themselves are not walked back again. Weights are constants to the gradient.
    """
    weights = jax.lax.stop_gradient(tuple(weights))
    total = sum(w * value for w, value in zip(weights, gradients.values, strict=True))
    cotangent = sum(w * g for w, g in zip(weights, gradients.images, strict=True))
    images = images.astype(jnp.float32)
    # The second term is zero; only its gradient counts.
    return total + jnp.sum((images - jax.lax.stop_gradient(images)) * cotangent)
