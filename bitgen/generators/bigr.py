"""BiGR (Hao et al., arXiv 2410.14672): a bidirectional transformer over binary tokens.

A class token precedes the image's tokens. Masked tokens are replaced by a learned vector, and the
transformer's output at each token conditions the Bernoulli head that draws its bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from bitgen.heads.bernoulli import BernoulliHead
from bitgen.nn.attention import Implementation, SelfAttention
from bitgen.nn.embeddings import grid_rotations
from bitgen.nn.mlp import SwiGLU, swiglu_width
from bitgen.nn.norms import Dtype, RMSNorm
from bitgen.nn.remat import Dropout, Remat, scan_layers


class BiGR(nn.Module):
    """Class labels to bits [b, h, w, k]; see `hidden`, `loss` and `samplers.masked`."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    bits: int = 24
    grid: tuple[int, int] = (16, 16)
    num_classes: int = 1000
    denoiser_width: int = 1024
    denoiser_layers: int = 3
    diffusion_steps: int = 256
    predict_flip: bool = True
    focal: float = 0.0
    alpha: float = -1.0
    vlb_weight: float = 0.0
    adaln: bool = True
    class_tokens: int = 1
    label_dropout: float = 0.1
    dropout: float = 0.1
    mlp_multiple: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    attention: Implementation = "auto"
    unroll: bool = False  # the scan over layers: faster steps, slower compilation
    remat: Remat = False
    dtype: Dtype = jnp.float32

    @property
    def tokens(self) -> int:
        """Tokens of an image, n."""
        return self.grid[0] * self.grid[1]

    def setup(self):
        normal, zeros, width = nn.initializers.normal, nn.initializers.zeros, self.width

        def table(name, rows):
            return self.param(name, normal(0.02), (rows, width), jnp.float32)

        self.mask_token = self.param("mask_token", normal(1.0), (width,), jnp.float32)
        self.class_embedding = table("class_embedding", self.num_classes + 1)
        self.position_embedding = table("position_embedding", self.tokens)
        self.bits_embedding = nn.Dense(width, kernel_init=normal(0.02), dtype=self.dtype)
        if self.adaln:
            self.shared_modulation = nn.Dense(
                6 * width, kernel_init=zeros, dtype=self.dtype, name="adaln"
            )
        self.norm = RMSNorm(self.norm_eps)
        self.denoiser = BernoulliHead(
            self.bits,
            self.denoiser_width,
            self.denoiser_layers,
            steps=self.diffusion_steps,
            predict_flip=self.predict_flip,
            focal=self.focal,
            alpha=self.alpha,
            vlb_weight=self.vlb_weight,
            remat=self.remat,
            dtype=self.dtype,
        )

    def embed_labels(self, labels: Int[Array, " b"]) -> Float[Array, "b d"]:
        """Returns class embeddings; the label `num_classes` is the null class."""
        return self.class_embedding[labels]

    def hidden(
        self,
        bits: Bool[Array, "b n k"],
        mask: Bool[Array, "b n"],
        classes: Float[Array, "b d"],
        *,
        train: bool = False,
    ) -> Float[Array, "b n d"]:
        """Returns the head's conditioning, float32; bits where `mask` is true are ignored."""
        h, _ = self._transformer(bits, mask, classes, train=train, features=False)
        cond = self.norm(h)[:, self.class_tokens :].astype(jnp.float32)
        return cond + self.position_embedding[None]

    def features(
        self, bits: Bool[Array, "b h w k"], labels: Int[Array, " b"]
    ) -> Float[Array, "l b n d"]:
        """Returns the residual stream after each layer with no token masked, to probe it."""
        bits = bits.reshape(len(bits), self.tokens, self.bits)
        mask = jnp.zeros(bits.shape[:2], bool)
        _, features = self._transformer(
            bits, mask, self.embed_labels(labels), train=False, features=True
        )
        return features[:, :, self.class_tokens :]

    def loss(
        self, bits: Bool[Array, "b h w k"], labels: Int[Array, " b"], *, train: bool = True
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean loss over masked tokens and metrics; the rng is named 'loss'.

        Every image masks the same share of its tokens, cos(pi/2 u) with u uniform, at least one
        token. Training replaces labels by the null class with probability `label_dropout`.
        """
        ratio_key, mask_key, label_key, head_key = jax.random.split(self.make_rng("loss"), 4)
        b, n = bits.shape[0], self.tokens
        bits = bits.reshape(b, n, self.bits)
        ratio = jax.random.randint(ratio_key, (), 0, n) / n
        count = jnp.maximum(jnp.floor(n * jnp.cos(np.pi / 2 * ratio)), 1)
        order = jnp.argsort(jax.random.uniform(mask_key, (b, n)), axis=1)
        mask = jnp.argsort(order, axis=1) < count
        if train and self.label_dropout > 0:
            drop = jax.random.bernoulli(label_key, self.label_dropout, (b,))
            labels = jnp.where(drop, self.num_classes, labels)
        cond = self.hidden(bits, mask, self.embed_labels(labels), train=train)
        losses, metrics = self.denoiser.loss(
            bits.reshape(b * n, -1), cond.reshape(b * n, -1), head_key
        )
        weights = mask.reshape(-1) / mask.sum()
        metrics = {name: jnp.sum(value * weights) for name, value in metrics.items()}
        return jnp.sum(losses * weights), {**metrics, "mask_ratio": count / n}

    @nn.compact
    def _transformer(self, bits, mask, classes, *, train: bool, features: bool):
        """Returns the last residual stream [b, m, d], and all [l, b, m, d] if `features`."""
        x = self.bits_embedding(bits.astype(self.dtype))
        x = jnp.where(mask[..., None], self.mask_token.astype(self.dtype)[None, None], x)
        classes = jnp.repeat(classes[:, None], self.class_tokens, axis=1).astype(self.dtype)
        x = jnp.concatenate([classes, x], axis=1)
        modulation = None
        if self.adaln:
            modulation = self.shared_modulation(nn.silu(classes))
            modulation = modulation.reshape(*classes.shape[:2], 6, self.width)
        layers = scan_layers(_Block, self.layers, 2, remat=self.remat, unroll=self.unroll)(
            self.heads,
            swiglu_width(self.width, self.mlp_multiple),
            self.norm_eps,
            self.dropout if train else 0.0,
            self.attention,
            features,
            self.dtype,
            name="layers",
        )
        return layers(x, modulation, self._rotations())

    def _rotations(self):
        cells = grid_rotations(*self.grid, self.width // self.heads, self.rope_base)
        # Zeros, not the identity: the class token's query and key are zero.
        front = np.zeros((self.class_tokens, *cells.shape[1:]), np.float32)
        return jnp.asarray(np.concatenate([front, cells]))


class _Block(nn.Module):
    heads: int
    mlp_hidden: int
    norm_eps: float
    dropout: float
    attention: Implementation
    features: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, modulation, rotations):
        width = x.shape[-1]
        attention = SelfAttention(self.heads, self.attention, self.dtype, name="attention")
        mlp = SwiGLU(self.mlp_hidden, width, dtype=self.dtype, name="mlp")
        drop = Dropout(self.dropout)
        attention_norm = RMSNorm(self.norm_eps, name="attention_norm")
        mlp_norm = RMSNorm(self.norm_eps, name="mlp_norm")
        if modulation is None:
            x = x + drop(attention(attention_norm(x), rotations))
            x = x + drop(mlp(mlp_norm(x)))
        else:
            init = nn.initializers.normal(width**-0.5)
            offset = self.param("modulation_offset", init, (6, width), jnp.float32)
            m = modulation + offset.astype(self.dtype)[None, None]
            shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, :, i] for i in range(6))
            y = attention_norm(x) * (1 + scale1) + shift1
            x = x + gate1 * drop(attention(y, rotations))
            y = mlp_norm(x) * (1 + scale2) + shift2
            x = x + gate2 * drop(mlp(y))
        return x, x if self.features else None
