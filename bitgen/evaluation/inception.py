"""The Inception network of 2015-12-05, which defines FID, sFID and the Inception score.

It is Inception v3 (Szegedy et al., arXiv 1512.00567) as in TensorFlow's
`classify_image_graph_def.pb`: average pooling excludes the padding, the last block has maximum
pooling, and there are 1,008 classes. Layers have the names of PyTorch's port,
github.com/mseitzer/pytorch-fid.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.lax import Precision
from jaxtyping import Array, Float

SIZE = 299  # pixels a side of its images
CLASSES = 1008
POOL = 2048
SPATIAL_CHANNELS = 7  # of the 17 x 17 map that sFID looks at

Unit = tuple[str, int, tuple[int, int]]  # name, channels, kernel
Branch = tuple[Any, ...]  # units; the first may be a pooling, the last a pair of units to fork to


def _pool_branch(kind: str, channels: int) -> Branch:
    return (kind, ("branch_pool", channels, (1, 1)))


def _block_a(pool: int) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 64, (1, 1)),),
        (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))),
        (
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ),
        _pool_branch("average", pool),
    )


def _block_c(width: int) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 192, (1, 1)),),
        (
            ("branch7x7_1", width, (1, 1)),
            ("branch7x7_2", width, (1, 7)),
            ("branch7x7_3", 192, (7, 1)),
        ),
        (
            ("branch7x7dbl_1", width, (1, 1)),
            ("branch7x7dbl_2", width, (7, 1)),
            ("branch7x7dbl_3", width, (1, 7)),
            ("branch7x7dbl_4", width, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ),
        _pool_branch("average", 192),
    )


def _block_e(pooling: str) -> tuple[Branch, ...]:
    return (
        (("branch1x1", 320, (1, 1)),),
        (
            ("branch3x3_1", 384, (1, 1)),
            (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
        ),
        (
            ("branch3x3dbl_1", 448, (1, 1)),
            ("branch3x3dbl_2", 384, (3, 3)),
            (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
        ),
        _pool_branch(pooling, 192),
    )


# name, channels, kernel, stride, padding; 'pool' is a 3x3 maximum with stride 2
STEM: tuple[tuple[str, int, tuple[int, int], int, str] | str, ...] = (
    ("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    ("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    ("Conv2d_2b_3x3", 64, (3, 3), 1, "SAME"),
    "pool",
    ("Conv2d_3b_1x1", 80, (1, 1), 1, "VALID"),
    ("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    "pool",
)
# The outputs of a block's branches are concatenated in this order.
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (("branch3x3", 384, (3, 3)),),
        (
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ),
        ("pool",),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3))),
        (
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, (3, 3)),
        ),
        ("pool",),
    ),
    "Mixed_7b": _block_e("average"),
    "Mixed_7c": _block_e("maximum"),
}
REDUCING = ("Mixed_6a", "Mixed_7a")  # the last unit of each branch has stride 2 and no padding


def unit_names() -> Iterator[tuple[str, str]]:
    """Yields each convolution's name in PyTorch's port and in TensorFlow's graph."""
    stem = [unit[0] for unit in STEM if not isinstance(unit, str)]
    yield from ((name, _numbered("conv", i)) for i, name in enumerate(stem))
    for i, (block, branches) in enumerate(BLOCKS.items()):
        scope, towers = _numbered("mixed", i), 0
        for branch in branches:
            units = [unit for unit in branch if not isinstance(unit, str)]
            if not units:
                continue
            place = scope
            if len(branch) > 1:  # a single convolution stands in the block's own scope
                place, towers = f"{scope}/{_numbered('tower', towers)}", towers + 1
            for j, unit in enumerate(units):
                if isinstance(unit[0], str):
                    yield f"{block}.{unit[0]}", f"{place}/{_numbered('conv', j)}"
                else:
                    fork = (f"{place}/mixed/{_numbered('conv', n)}" for n in range(len(unit)))
                    yield from zip((f"{block}.{u[0]}" for u in unit), fork, strict=True)


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


class ConvNorm(nn.Module):
    """Convolution, batch normalisation with stored statistics, ReLU."""

    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
        """Returns the activations."""
        # The highest precision: the default of TPUs and GPUs for float32 changes FID.
        x = nn.Conv(
            self.channels,
            self.kernel,
            self.stride,
            self.padding,
            use_bias=False,
            precision=Precision.HIGHEST,
            name="conv",
        )(x)
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, (self.channels,)
        scale = self.param("scale", ones, shape, jnp.float32)
        bias = self.param("bias", zeros, shape, jnp.float32)
        mean = self.param("mean", zeros, shape, jnp.float32)
        var = self.param("var", ones, shape, jnp.float32)
        factor = scale / jnp.sqrt(var + 1e-3)
        x = (x - mean.reshape(1, 1, 1, -1)) * factor.reshape(1, 1, 1, -1)
        return nn.relu(x + bias.reshape(1, 1, 1, -1))


class Inception(nn.Module):
    """Images [b, 299, 299, 3] in [-1, 1] to the features that the metrics use."""

    @nn.compact
    def __call__(self, images: Float[Array, "b 299 299 3"]) -> dict[str, Float[Array, "b ..."]]:
        """Returns pool [b, 2048], spatial [b, 2023] and logits [b, 1008] (without bias).

        spatial is the first 7 channels of TensorFlow's `mixed_6/conv`, in the order row, column,
        channel.
        """
        x, spatial = images, None
        for unit in STEM:
            x = _reduce(x) if isinstance(unit, str) else ConvNorm(*unit[1:], name=unit[0])(x)
        for block, branches in BLOCKS.items():
            outputs = [self._branch(block, branch, x) for branch in branches]
            if block == "Mixed_6d":
                spatial = outputs[0][..., :SPATIAL_CHANNELS]
            x = jnp.concatenate(outputs, axis=-1)
        assert spatial is not None
        pool = jnp.mean(x, axis=(1, 2))
        dense = nn.Dense(CLASSES, use_bias=False, precision=Precision.HIGHEST, name="fc")
        return {
            "pool": pool,
            "spatial": spatial.reshape(len(spatial), -1),
            "logits": dense(pool),
        }

    def _branch(self, block: str, branch: Branch, x: Array) -> Array:
        poolings = {
            "pool": _reduce,
            "average": lambda x: nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False),
            "maximum": lambda x: nn.max_pool(x, (3, 3), padding="SAME"),
        }
        for i, unit in enumerate(branch):
            if isinstance(unit, str):
                x = poolings[unit](x)
            elif isinstance(unit[0], str):
                reducing = block in REDUCING and i == len(branch) - 1
                x = self._unit(block, unit, x, reducing)
            else:
                x = jnp.concatenate([self._unit(block, u, x, False) for u in unit], axis=-1)
        return x

    def _unit(self, block: str, unit: Unit, x: Array, reducing: bool) -> Array:
        name, channels, kernel = unit
        stride, padding = (2, "VALID") if reducing else (1, "SAME")
        return ConvNorm(channels, kernel, stride, padding, name=f"{block}_{name}")(x)


def _reduce(x: Array) -> Array:
    return nn.max_pool(x, (3, 3), strides=(2, 2))
