"""BitDance (shallowdream204/BitDance `imagenet_gen/`): an autoregressive transformer over bits.

Class tokens precede the image's tokens, which are drawn in groups of `together` in parallel; the
transformer's output at a group conditions the rectified-flow head that draws the next group.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.heads.rectified_flow import RectifiedFlowHead
from bitgen.nn.attention import Implementation, SelfAttention
from bitgen.nn.embeddings import grid_rotations
from bitgen.nn.mlp import SwiGLU, swiglu_width
from bitgen.nn.norms import Dtype, RMSNorm
from bitgen.nn.remat import Dropout, Remat, scan_layers


class BitDance(nn.Module):
    """Class labels to bits [b, h, w, k]; see `hidden`, `loss` and `samplers.autoregressive`."""

    width: int = 768
    layers: int = 24
    heads: int = 12
    bits: int = 32
    grid: tuple[int, int] = (16, 16)
    num_classes: int = 1000
    class_tokens: int = 64
    together: int = 1  # tokens drawn in parallel, p; "parallel_num"
    patch_order: bool = True  # groups are square patches, else consecutive tokens of a raster scan
    cells: int = 1  # cells along the side of a token, "patch_size"
    head_width: int = 768
    head_layers: int = 6
    head_modulations: int = 2
    time_mean: float = -0.8
    time_std: float = 0.8
    draws: int = 4  # times and noises a token in training
    flip_rate: float = 0.0  # context bits are flipped with probability rate * u, u uniform
    label_dropout: float = 0.1
    dropout: float = 0.0
    mlp_multiple: int = 256
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    attention: Implementation = "auto"
    unroll: bool = False  # the scan over layers: faster steps, slower compilation
    remat: Remat = False
    dtype: Dtype = jnp.float32

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.grid[0] // self.cells, self.grid[1] // self.cells

    @property
    def tokens(self) -> int:
        """Tokens of an image, n."""
        return math.prod(self.token_grid)

    @property
    def token_bits(self) -> int:
        """Bits of a token, k."""
        return self.bits * self.cells**2

    @property
    def first(self) -> int:
        """Number of class and query tokens, which precede the image's tokens."""
        return self.class_tokens + self.together - 1

    @property
    def length(self) -> int:
        """Length of the sequence, which leaves out the last group: it is never an input."""
        return self.first + self.tokens - self.together

    def setup(self):
        self._check()

        def table(name, *rows):
            init, shape = nn.initializers.normal(0.02), (*rows, self.width)
            return self.param(name, init, shape, jnp.float32)

        self.class_embedding = table("class_embedding", self.num_classes + 1, self.class_tokens)
        self.position_embedding = table("position_embedding", self.tokens)
        if self.together > 1:
            self.query_tokens = table("query_tokens", self.together - 1)
        hidden = int(self.width * 1.5)
        self.bits_in = SwiGLU(hidden, self.width, fused=True, use_bias=True, dtype=self.dtype)
        self.input_norm = RMSNorm(self.norm_eps)
        self.norm = RMSNorm(self.norm_eps)
        self.head = RectifiedFlowHead(
            self.token_bits,
            self.head_width,
            self.head_layers,
            self.head_modulations,
            self.together,
            self.time_mean,
            self.time_std,
            self.draws,
            self.remat,
            dtype=self.dtype,
        )

    @nn.nowrap
    def block(self, *, dropout: float = 0.0, features: bool = False, scanned: bool = False):
        """Returns one layer of the transformer, unbound, or the scan over all as `layers`."""
        cls: Any = Block
        options: dict[str, Any] = {"parent": None}
        if scanned:
            cls = scan_layers(Block, self.layers, 1, remat=self.remat, unroll=self.unroll)
            options = {"name": "layers"}
        return cls(
            self.heads,
            self.class_tokens - 1,
            self.together,
            swiglu_width(self.width, self.mlp_multiple),
            self.norm_eps,
            dropout,
            self.attention,
            features,
            self.dtype,
            **options,
        )

    @nn.nowrap
    def order(self, bits: Bool[Array, "b h w k"]) -> Bool[Array, "b g p k"]:
        """Returns an image's tokens in the order in which groups of p are drawn."""
        b, (h, w), c, k = len(bits), self.token_grid, self.cells, self.bits
        x = bits.reshape(b, h, c, w, c, k).transpose(0, 1, 3, 5, 2, 4).reshape(b, h, w, -1)
        if s := self._side:
            x = x.reshape(b, h // s, s, w // s, s, -1).swapaxes(2, 3)
        return x.reshape(b, -1, self.together, self.token_bits)

    @nn.nowrap
    def arrange(self, groups: Bool[Array, "b g p k"]) -> Bool[Array, "b h w k"]:
        """Returns the image of tokens in drawing order: undoes `order`."""
        b, (h, w), c, k = len(groups), self.token_grid, self.cells, self.bits
        x = groups.reshape(b, h, w, -1)
        if s := self._side:
            x = groups.reshape(b, h // s, w // s, s, s, -1).swapaxes(2, 3)
        x = x.reshape(b, h, w, k, c, c).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(b, h * c, w * c, k)

    def embed_labels(self, labels: Int[Array, " b"]) -> Float[Array, "b first d"]:
        """Returns the start of the sequence; the label `num_classes` is the null class."""
        x = self.class_embedding[labels]
        if self.together > 1:
            query = self.query_tokens[None]
            x = jnp.concatenate([x, jnp.broadcast_to(query, (len(x), *query.shape[1:]))], axis=1)
        return self.input_norm(x.astype(self.dtype))

    def embed_bits(self, tokens: Bool[Array, "b n k"]) -> Float[Array, "b n d"]:
        """Returns the transformer's inputs for tokens."""
        return self.input_norm(self.bits_in((tokens * 2.0 - 1).astype(self.dtype)))

    def condition(
        self, x: Float[Array, "b n d"], positions: Float[Array, "n d"]
    ) -> Float[Array, "b n d"]:
        """Returns the head's conditioning, float32, from the residual stream of a group."""
        return self.norm(x).astype(jnp.float32) + positions.astype(jnp.float32)[None]

    def hidden(
        self, bits: Bool[Array, "b h w k"], labels: Int[Array, " b"], *, train: bool = False
    ) -> Float[Array, "b n d"]:
        """Returns the head's conditioning at each token, in drawing order, float32.

        The conditioning of a group depends on the label and the groups before it.
        """
        x, _ = self._transformer(bits, labels, train=train, features=False)
        return self.condition(x[:, -self.tokens :], self.position_embedding)

    def features(
        self, bits: Bool[Array, "b h w k"], labels: Int[Array, " b"]
    ) -> Float[Array, "l b n d"]:
        """Returns the residual stream after each layer at the positions that predict the tokens."""
        _, features = self._transformer(bits, labels, train=False, features=True)
        return features[:, :, -self.tokens :]

    def loss(
        self, bits: Bool[Array, "b h w k"], labels: Int[Array, " b"], *, train: bool = True
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss over tokens and metrics; the rng is named 'loss'.

        Training replaces labels by the null class with probability `label_dropout`, and flips bits
        of the context, not of the targets.
        """
        flip_key, label_key, head_key = jax.random.split(self.make_rng("loss"), 3)
        context = flip(bits, self.flip_rate, flip_key) if train else bits
        if train and self.label_dropout > 0:
            drop = jax.random.bernoulli(label_key, self.label_dropout, labels.shape)
            labels = jnp.where(drop, self.num_classes, labels)
        cond = self.hidden(context, labels, train=train)
        losses, metrics = self.head.loss(
            self.order(bits).reshape(-1, self.together, self.token_bits),
            cond.reshape(-1, self.together, self.width),
            head_key,
        )
        return losses.mean(), jax.tree.map(jnp.mean, metrics)

    @nn.nowrap
    def rotations(self) -> np.ndarray:
        """Returns the rotary (cos, sin) of every position [length, head_dim/2, 2]."""
        cells = grid_rotations(
            *self.token_grid,
            self.width // self.heads,
            self.rope_base,
            offset=1.5,
            columns_first=True,
        )
        h, w = self.token_grid
        if s := self._side:
            cells = cells.reshape(h // s, s, w // s, s, *cells.shape[1:]).swapaxes(1, 2)
            cells = cells.reshape(h * w, -1, 2)
        front = np.zeros((self.first, *cells.shape[1:]), np.float32)
        front[..., 0] = 1  # class and query tokens are not rotated
        return np.concatenate([front, cells])[: self.length]

    @nn.compact
    def _transformer(self, bits, labels, *, train: bool, features: bool):
        """Returns the last residual stream [b, m, d], and all [l, b, m, d] if `features`."""
        groups = self.order(bits)[:, :-1]  # [b, g - 1, p, k]
        tokens = groups.reshape(len(bits), -1, self.token_bits)
        x = jnp.concatenate([self.embed_labels(labels), self.embed_bits(tokens)], axis=1)
        dropout = self.dropout if train else 0.0
        layers = self.block(dropout=dropout, features=features, scanned=True)
        return layers(x, jnp.asarray(self.rotations()))

    @property
    def _side(self) -> int:
        """Side of a group's square patch, 0 if groups are in raster order."""
        return math.isqrt(self.together) if self.patch_order and self.together > 1 else 0

    def _check(self) -> None:
        h, w = self.token_grid
        if self.grid != (h * self.cells, w * self.cells):
            raise UserError(f"bitdance's grid {self.grid} is not a multiple of cells {self.cells}")
        s = self._side
        if s and (s * s != self.together or h % s or w % s):
            raise UserError(
                f"bitdance draws square patches that tile its grid of {h} x {w} tokens: patches of "
                f"together={self.together} tokens do not"
            )
        if self.tokens % self.together:
            raise UserError(f"{self.tokens} tokens are not a multiple of together={self.together}")


class Block(nn.Module):
    """A layer of the transformer, over a whole sequence or with a cache of keys and values."""

    heads: int
    prefix: int  # tokens before the first group
    group: int  # tokens of a group
    mlp_hidden: int
    norm_eps: float
    dropout: float
    attention: Implementation
    features: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, rotations, cache=None, start: Any = 0):
        """Returns x and the new cache if one is given (see `SelfAttention`), or x if `features`."""
        drop = Dropout(self.dropout)
        attention = SelfAttention(self.heads, self.attention, self.dtype, name="attention")
        mlp = SwiGLU(self.mlp_hidden, x.shape[-1], fused=True, dtype=self.dtype, name="mlp")
        y = RMSNorm(self.norm_eps, name="attention_norm")(x)
        # With a cache, x is the start of the sequence or one group, which attends to all before it
        # and to itself.
        whole = cache is None or isinstance(start, int)
        mask = block_causal_mask(x.shape[1], self.prefix, self.group) if whole else None
        if cache is None:
            y = attention(y, rotations, mask)
        else:
            y, cache = attention(y, rotations, mask, cache, start)
        x = x + drop(y)
        x = x + drop(mlp(RMSNorm(self.norm_eps, name="mlp_norm")(x)))
        return x, cache if cache is not None else x if self.features else None


def flip(bits: Bool[Array, "*b"], rate: float, key: PRNGKeyArray) -> Bool[Array, "*b"]:
    """Returns bits that are each flipped with probability rate * u, u uniform and drawn a bit."""
    threshold_key, flip_key = jax.random.split(key)
    thresholds = rate * jax.random.uniform(threshold_key, bits.shape)
    return bits ^ (jax.random.uniform(flip_key, bits.shape) < thresholds)


def block_causal_mask(length: int, prefix: int, block: int) -> Bool[np.ndarray, "n n"]:
    """Returns an attention mask, causal but full within each block of tokens after the prefix."""
    blocks = np.maximum(np.arange(length) - prefix, -1) // block
    same = (blocks[:, None] == blocks[None]) & (blocks[None] >= 0)
    return np.tri(length, dtype=bool) | same
