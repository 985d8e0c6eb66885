"""The rectified-flow head of BitDance (shallowdream204/BitDance), which draws the bits of tokens.

Noise flows to the bits in {-1, 1}; the network predicts the end of the flow, conditioned on the
transformer's output for each token. The tokens of a group are drawn in parallel.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.nn.embeddings import sinusoids
from bitgen.nn.matmul import DotGeneral
from bitgen.nn.mlp import SwiGLU
from bitgen.nn.norms import Dtype, layer_norm
from bitgen.nn.remat import Remat, remat_layer

_TIME_FREQUENCIES = 256
_LAST_STEP = 0.05  # length of the final step, which adds no noise, and the minimum of 1 - t
_HEAD_DIM = 64
# The modulations of all steps are computed in one product up to this many numbers, which reads
# their matrices once a token instead of once a step.
_MODULATIONS_AT_ONCE = 2**26

_xavier = nn.initializers.xavier_uniform()


class RectifiedFlowHead(nn.Module):
    """Predicts the clean values of a group of p tokens from noisy values, time and conditioning."""

    bits: int
    width: int
    layers: int
    modulations: int = 2  # adaptive norms, each shared by consecutive layers
    group: int = 1  # p, tokens drawn in parallel, which attend to each other
    time_mean: float = -0.8  # times are sigmoid(mean + std n), n standard normal
    time_std: float = 0.8
    draws: int = 4  # times and noises a group in the loss
    remat: Remat = False
    dtype: Dtype = jnp.float32

    def setup(self):
        if self.layers % self._layers_per_modulation:
            raise UserError(
                f"the head's layers must be a multiple of its modulations, "
                f"got {self.layers} and {self.modulations}"
            )
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros

        def dense(features, init):
            return nn.Dense(
                features, kernel_init=init, dtype=self.dtype, dot_general_cls=DotGeneral
            )

        self.time_in, self.time_out = dense(self.width, normal), dense(self.width, normal)
        self.cond_in, self.bits_in = dense(self.width, _xavier), dense(self.width, _xavier)
        block = remat_layer(_Block, self.remat)
        self.blocks = [block(self.width, self.group > 1, self.dtype) for _ in range(self.layers)]
        chunks = 3 if self.group == 1 else 6
        self.modulation = [dense(chunks * self.width, zeros) for _ in range(self.modulations)]
        self.final_modulation = dense(2 * self.width, zeros)
        self.final = dense(self.bits, zeros)

    @property
    def _layers_per_modulation(self) -> int:
        return max(1, self.layers // self.modulations)

    def embed_times(self, times: Float[Array, "*b"]) -> Float[Array, "*b w"]:
        """Returns the embedding of times in [0, 1]."""
        x = sinusoids(1000.0 * times, _TIME_FREQUENCIES).astype(self.dtype)
        return self.time_out(nn.silu(self.time_in(x)))

    def embed_cond(self, cond: Float[Array, "*b d"]) -> Float[Array, "*b w"]:
        """Returns the embedding of the conditioning, which does not depend on the time."""
        return self.cond_in(cond.astype(self.dtype))

    def modulate(self, embedded: Float[Array, "*b w"]) -> tuple[Array, ...]:
        """Returns the layers' modulations from the sum of time and cond embeddings."""
        y = nn.silu(embedded)
        return (*(m(y) for m in self.modulation), self.final_modulation(y))

    def network(
        self, x: Float[Array, "*b p k"], modulations: tuple[Array, ...]
    ) -> Float[Array, "*b p k"]:
        """Returns the clean values, float32, predicted from noisy ones."""
        y = self.bits_in(x.astype(self.dtype))
        for i, block in enumerate(self.blocks):
            y = block(y, modulations[i // self._layers_per_modulation])
        scale, shift = jnp.split(modulations[-1], 2, axis=-1)
        return self.final(layer_norm(y) * (1 + scale) + shift).astype(jnp.float32)

    def predict(
        self, x: Float[Array, "m p k"], times: Float[Array, " m"], cond: Float[Array, "m p d"]
    ) -> Float[Array, "m p k"]:
        """Returns the clean values predicted from noisy ones, each group at its own time."""
        embedded = self.embed_cond(cond) + self.embed_times(times)[:, None]
        return self.network(x, self.modulate(embedded))

    def loss(
        self, bits: Bool[Array, "m p k"], cond: Float[Array, "m p d"], key: PRNGKeyArray
    ) -> tuple[Float[Array, " m"], dict[str, Float[Array, " m"]]]:
        """Returns each group's loss and metrics, averaged over `draws` times and noises."""
        time_key, noise_key = jax.random.split(key)
        clean = bits.astype(jnp.float32) * 2 - 1
        shape = (self.draws, *clean.shape)
        normals = jax.random.normal(time_key, shape[:2])
        noise = jax.random.normal(noise_key, shape)

        def repeat(x):  # the same conditioning for all draws, [draws m, p, ...]
            return jnp.broadcast_to(x[None], (self.draws, *x.shape)).reshape(-1, *x.shape[1:])

        losses, metrics = self.loss_given(
            repeat(clean),
            normals.reshape(-1),
            noise.reshape(-1, *clean.shape[1:]),
            repeat(self.embed_cond(cond)),
        )

        def mean(x):
            return x.reshape(self.draws, -1).mean(0)

        return mean(losses), jax.tree.map(mean, metrics)

    def loss_given(
        self,
        clean: Float[Array, "m p k"],
        normals: Float[Array, " m"],
        noise: Float[Array, "m p k"],
        embedded_cond: Float[Array, "m p w"],
    ) -> tuple[Float[Array, " m"], dict[str, Float[Array, " m"]]]:
        """Returns the squared error of the velocity, given clean values in {-1, 1} and noise."""
        times = jax.nn.sigmoid(self.time_mean + self.time_std * normals)
        t = times[:, None, None]
        noisy = (1 - t) * noise + t * clean
        embedded = embedded_cond + self.embed_times(times)[:, None]
        predicted = self.network(noisy, self.modulate(embedded))
        # The difference of the two velocities; the noisy values cancel.
        error = (clean - predicted) / jnp.maximum(1 - t, _LAST_STEP)
        accuracy = ((predicted > 0) == (clean > 0)).astype(jnp.float32)
        return jnp.mean(error**2, axis=(1, 2)), {"accuracy": accuracy.mean((1, 2))}

    def sample(
        self,
        cond: Float[Array, "b p d"],
        uncond: Float[Array, "b p d"] | None,
        keys: PRNGKeyArray,
        *,
        steps: int,
        scale: Float[Array, ""] | float = 1.0,
    ) -> Bool[Array, "b p k"]:
        """Returns bits after `steps` noisy steps and one without noise.

        `keys` [b] draw each image's noise; `scale` guides velocities away from `uncond`. Raises
        UserError if steps < 1.
        """
        shape = (self.group, self.bits)

        def noise(i):
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys)

        return self.sample_given(cond, uncond, noise, steps, scale) > 0

    def sample_given(
        self,
        cond: Float[Array, "b p d"],
        uncond: Float[Array, "b p d"] | None,
        noise: Callable[[Any], Float[Array, "b p k"]],
        steps: int,
        scale: Any,
    ) -> Float[Array, "b p k"]:
        """As `sample`, before taking signs, with noise(i), i = 0 for the start, then each step.

        The steps are Euler-Maruyama's.
        """
        if steps < 1:
            raise UserError(f"the head needs at least one step, got {steps}")
        times, lengths = flow_times(steps)
        # The same throughout the flow: [c, b, p, w], c = 2 with guidance.
        conds = self.embed_cond(jnp.stack([cond] if uncond is None else [cond, uncond]))
        embedded_times = self.embed_times(jnp.asarray(times)).reshape(-1, 1, 1, 1, self.width)

        def velocity(x, t, modulations):
            rows = jnp.broadcast_to(x[None], (len(conds), *x.shape))
            clean = self.network(rows, modulations)
            clean = clean[0] if uncond is None else clean[1] + scale * (clean[0] - clean[1])
            return (clean - x) / jnp.maximum(1 - t, _LAST_STEP)

        def step(x, inputs):
            i, t, dt, modulations = inputs
            v = velocity(x, t, self.modulate(conds + modulations) if inside else modulations)
            # The score's drift, t v - x, balances the noise.
            drift = v + t * v - x
            return x + drift * dt + jnp.sqrt(2 * (1 - t) * dt) * noise(i), None

        features = sum(m.features for m in (*self.modulation, self.final_modulation))
        inside = len(times) * math.prod(conds.shape[:-1]) * features > _MODULATIONS_AT_ONCE
        over_time = embedded_times if inside else self.modulate(conds[None] + embedded_times)
        *walk, last = (jax.tree.map(lambda y, i=i: y[i], over_time) for i in (slice(-1), -1))
        inputs = (jnp.arange(1, steps + 1), times[:-1], lengths, walk[0])
        x, _ = jax.lax.scan(step, noise(0), jax.tree.map(jnp.asarray, inputs))
        modulations = self.modulate(conds + last) if inside else last
        return x + _LAST_STEP * velocity(x, times[-1], modulations)


def flow_times(
    steps: int,
) -> tuple[Float[np.ndarray, " steps+1"], Float[np.ndarray, " steps"]]:
    """Returns the times of all steps, from 0, and the lengths of all steps but the last.

    Times are float32 sums as in the original, because the embedding multiplies them by 1,000.
    """
    ends = np.linspace(0, 1 - _LAST_STEP, steps + 1, dtype=np.float32)
    lengths = np.diff(ends)
    times = np.cumsum(np.concatenate([ends[:1], lengths[:-1]]), dtype=np.float32)
    return np.append(times, ends[-1]), lengths


class _Block(nn.Module):
    width: int
    attention: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, modulation):
        scale, shift, gate, *mlp = jnp.split(modulation, 6 if self.attention else 3, axis=-1)
        if self.attention:
            y = self._norm("attention_norm")(x) * (1 + scale) + shift
            x = x + _Attention(self.width, self.dtype, name="attention")(y) * gate
            scale, shift, gate = mlp
        y = self._norm("norm")(x) * (1 + scale) + shift
        hidden = int(self.width * 1.5)
        mlp = SwiGLU(hidden, self.width, True, True, _xavier, dtype=self.dtype, name="mlp")
        return x + mlp(y) * gate

    def _norm(self, name):
        return nn.LayerNorm(1e-6, use_fast_variance=False, dtype=self.dtype, name=name)


class _Attention(nn.Module):
    """Multi-head attention among the p tokens of a group."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        heads = max(1, self.width // _HEAD_DIM)
        dense = functools.partial(
            nn.DenseGeneral, kernel_init=_xavier, dtype=self.dtype, dot_general_cls=DotGeneral
        )
        qkv = dense((3, heads, self.width // heads), name="qkv")(x)
        q, k, v = (qkv[..., i, :, :] for i in range(3))  # [..., p, heads, head_dim]
        scale = q.shape[-1] ** -0.5
        logits = jnp.einsum("...qhc,...khc->...hqk", q * scale, k)
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(self.dtype)
        y = jnp.einsum("...hqk,...khc->...qhc", probs, v)
        return dense(self.width, axis=(-2, -1), name="out")(y)
