"""The Bernoulli diffusion head: a small network that turns a token's conditioning into k bits.

Bits are noised towards fair coins over T steps (Binary Latent Diffusion, arXiv 2304.04820), and
denoised given the transformer's output for that token (BiGR, arXiv 2410.14672).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.nn.norms import Dtype, layer_norm
from bitgen.nn.remat import Remat, remat_layer
from bitgen.nn.sinusoids import sinusoids

_TIME_FREQUENCIES = 256


class BernoulliHead(nn.Module):
    """Predicts from noisy bits, step and conditioning the clean bits, or which bits to flip."""

    bits: int
    width: int
    layers: int
    steps: int = 256  # T of the noise schedule
    predict_flip: bool = True
    focal: float = 0.0  # exponent of (1 - p); negative: plain cross-entropy
    alpha: float = -1.0  # weight of ones; -1: by their frequency in each token
    vlb_weight: float = 0.0  # of the variational bound, "aux"
    remat: Remat = False
    dtype: Dtype = jnp.float32

    def setup(self):
        def dense(features):
            init = nn.initializers.normal(0.02)
            return nn.Dense(features, kernel_init=init, dtype=self.dtype)

        self.time_in, self.time_out = dense(self.width), dense(self.width)
        self.bits_in, self.cond_in = dense(self.width), dense(self.width)
        block = remat_layer(_Block, self.remat)
        self.blocks = [block(self.width, self.dtype) for _ in range(self.layers)]
        self.final = _Final(self.bits, self.width, self.dtype)

    def time_table(self) -> Float[Array, "T w"]:
        """Returns the embedding of every step, 0-based."""
        x = sinusoids(jnp.arange(self.steps), _TIME_FREQUENCIES).astype(self.dtype)
        return self.time_out(nn.silu(self.time_in(x)))

    def cond_embedding(self, cond: Float[Array, "*b d"]) -> Float[Array, "*b w"]:
        """Returns the part of the modulation that does not depend on the step."""
        return self.cond_in(cond.astype(self.dtype))

    def embed_bits(self, bits: Float[Array, "*b k"]) -> Float[Array, "*b w"]:
        """Returns the network's input for bits in {0, 1}."""
        return self.bits_in((bits * 2 - 1).astype(self.dtype))

    def network(
        self, x: Float[Array, "*b w"], modulation: Float[Array, "*b w"]
    ) -> Float[Array, "*b k"]:
        """Returns float32 logits from embedded bits and the sum of step and cond embeddings."""
        modulation = nn.silu(modulation)
        for block in self.blocks:
            x = block(x, modulation)
        return self.final(x, modulation).astype(jnp.float32)

    def logits(
        self, bits: Float[Array, "m k"], steps: Int[Array, " m"], cond: Float[Array, "m d"]
    ) -> Float[Array, "m k"]:
        """Returns the network's logits for noisy bits in {0, 1} at 0-based steps."""
        modulation = self.cond_embedding(cond) + self.time_table()[steps]
        return self.network(self.embed_bits(bits), modulation)

    def loss(
        self, bits: Bool[Array, "m k"], cond: Float[Array, "m d"], key: PRNGKeyArray
    ) -> tuple[Float[Array, " m"], dict[str, Float[Array, " m"]]]:
        """Returns each token's loss and metrics, at a random step and noise."""
        step_key, noise_key = jax.random.split(key)
        steps = jax.random.randint(step_key, bits.shape[:1], 1, self.steps + 1)
        uniforms = jax.random.uniform(noise_key, bits.shape)
        losses, metrics = self.loss_given(bits.astype(jnp.float32), steps, uniforms, cond)
        return losses.mean(-1), {name: value.mean(-1) for name, value in metrics.items()}

    def loss_given(
        self,
        bits: Float[Array, "m k"],
        steps: Int[Array, " m"],
        uniforms: Float[Array, "m k"],
        cond: Float[Array, "m d"],
    ) -> tuple[Float[Array, "m k"], dict[str, Float[Array, "m k"]]]:
        """Returns the loss of each bit, `bce` and `accuracy`, given 1-based steps and the noise."""
        noisy = (uniforms < marginal(bits, steps[:, None], self.steps)).astype(jnp.float32)
        logits = self.logits(noisy, steps - 1, cond)
        x0_logits = _unflip(logits, noisy) if self.predict_flip else logits
        if self.focal < 0:
            bce = _cross_entropy(x0_logits, bits)
        elif self.predict_flip:
            flips = jnp.abs(bits - noisy)
            bce = _focal_loss(logits, flips, gamma=self.focal, alpha=self.alpha)
        else:
            bce = _focal_loss(logits, bits, gamma=self.focal, alpha=0.0)
        losses = bce
        if self.vlb_weight > 0:
            bound = _variational_bound(x0_logits, bits, noisy, steps[:, None], self.steps)
            losses = bce + self.vlb_weight * bound
        accuracy = ((x0_logits > 0) == (bits > 0.5)).astype(jnp.float32)
        return losses, {"bce": bce, "accuracy": accuracy}

    def sample(
        self,
        cond: Float[Array, "b m d"],
        uncond: Float[Array, "b m d"] | None,
        keys: PRNGKeyArray,
        *,
        steps: int,
        scale: Float[Array, ""] | float = 1.0,
        temperature: float = 1.0,
    ) -> Float[Array, "b m k"]:
        """Returns the probabilities of the bits after a chain of `steps` of the T steps.

        `keys` [b] draw each image's noise; `scale` guides logits away from `uncond`.
        """
        shape = (*cond.shape[1:2], self.bits)

        def uniforms(i):
            return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, i), shape))(keys)

        return self.sample_given(cond, uncond, uniforms, steps, scale, temperature)

    def sample_given(self, cond, uncond, uniforms, steps: int, scale, temperature):
        """As `sample`, with the noise as a function of the draw: 0 the start, then one a step."""
        times = chain_times(self.steps, steps)
        # What does not change over the chain: both conditionings, and the embedding of each step.
        conds = self.cond_embedding(cond)[None]
        if uncond is not None:
            conds = jnp.concatenate([conds, self.cond_embedding(uncond)[None]])  # [2, b, m, w]
        time_table = self.time_table()

        def probs_of_clean(noisy, t):
            x = jnp.broadcast_to(self.embed_bits(noisy)[None], (len(conds), *conds.shape[1:]))
            time = time_table[t - 1].reshape(1, 1, 1, -1)
            logits = self.network(x, conds + time) / temperature
            logits = logits[0] if uncond is None else logits[1] + scale * (logits[0] - logits[1])
            probs = jax.nn.sigmoid(logits)
            return noisy * (1 - probs) + (1 - noisy) * probs if self.predict_flip else probs

        def step(noisy, x):
            i, t, previous = x
            probs = posterior(probs_of_clean(noisy, t), noisy, t, previous, self.steps)
            return (uniforms(i) < probs).astype(jnp.float32), None

        noisy = (uniforms(0) < 0.5).astype(jnp.float32)
        draws = jnp.arange(1, steps)
        walk = (draws, jnp.asarray(times[:0:-1]), jnp.asarray(times[-2::-1]))
        noisy, _ = jax.lax.scan(step, noisy, walk)
        return probs_of_clean(noisy, jnp.asarray(times[0]))


def chain_times(total: int, steps: int) -> np.ndarray:
    """Returns the 1-based steps of a chain, ascending: `steps` of `total`, evenly spaced.

    Raises UserError unless 1 <= steps <= total.
    """
    if not 1 <= steps <= total:
        raise UserError(f"denoiser steps must be from 1 to {total}, got {steps}")
    if steps == total:
        return np.arange(1, total + 1)
    return 1 + (np.linspace(0.0, 1.0, steps) * (total - 1)).astype(int)


def marginal(
    probs: Float[Array, "*b k"], t: Int[Array, "*b 1"] | int, total: int
) -> Float[Array, "*b k"]:
    """Returns the probability of a one at step t of `total`, for probabilities of clean ones.

    The linear schedule keeps a bit with probability 1 - t / total and tosses a coin otherwise.
    """
    keep = 1 - t / total
    return probs * keep + 0.5 * (1 - keep)


def posterior(
    clean: Float[Array, "*b k"],
    noisy: Float[Array, "*b k"],
    t: Int[Array, "*b 1"] | int,
    previous: Int[Array, "*b 1"] | int,
    total: int,
    epsilon: float = 0.0,
) -> Float[Array, "*b k"]:
    """Returns the probability of a one at step `previous` < t, given clean probs and bits at t."""
    keep = (total - t) / (total - previous)  # of a bit, from step `previous` to t

    def joint(clean, noisy):
        return marginal(clean, previous, total) * (noisy * keep + 0.5 * (1 - keep))

    one, zero = joint(clean, noisy), joint(1 - clean, 1 - noisy)
    return one / (one + zero + epsilon)


class _Block(nn.Module):
    width: int
    dtype: Dtype

    def setup(self):
        init, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        self.modulation = nn.Dense(3 * self.width, kernel_init=zeros, dtype=self.dtype)
        self.mlp_in = nn.Dense(self.width, kernel_init=init, dtype=self.dtype)
        self.mlp_out = nn.Dense(self.width, kernel_init=init, dtype=self.dtype)

    def __call__(self, x, modulation):
        shift, scale, gate = jnp.split(self.modulation(modulation), 3, axis=-1)
        y = layer_norm(x) * (1 + scale) + shift
        return x + gate * self.mlp_out(nn.silu(self.mlp_in(y)))


class _Final(nn.Module):
    bits: int
    width: int
    dtype: Dtype

    def setup(self):
        zeros: Any = nn.initializers.zeros
        self.modulation = nn.Dense(2 * self.width, kernel_init=zeros, dtype=self.dtype)
        self.linear = nn.Dense(self.bits, kernel_init=zeros, dtype=self.dtype)

    def __call__(self, x, modulation):
        shift, scale = jnp.split(self.modulation(modulation), 2, axis=-1)
        return self.linear(layer_norm(x) * (1 + scale) + shift)


def _unflip(logits, noisy):
    """Logits of 'this bit is flipped' -> logits of 'the clean bit is one'."""
    return jnp.where(noisy > 0.5, -logits, logits)


def _cross_entropy(logits, targets):
    return nn.softplus(logits) - logits * targets


def _focal_loss(logits, targets, *, gamma: float, alpha: float):
    probs = jax.nn.sigmoid(logits)
    missed = jnp.clip(probs + targets - 2 * probs * targets, 1e-6, 1 - 1e-6)
    loss = _cross_entropy(logits, targets) * missed**gamma
    if alpha == -1:
        # The rarer value of a token's bits weighs more; 1/k keeps a weight where one is absent.
        ones = targets.mean(-1, keepdims=True)
        return loss * ((1 - ones) * targets + ones * (1 - targets) + 1 / targets.shape[-1])
    if alpha > 0:
        return loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss


def _variational_bound(x0_logits, bits, noisy, t, total: int):
    """Cross-entropy of the bits at t - 1 under the posterior of the predicted clean bits."""
    clean = jax.nn.sigmoid(x0_logits)
    predicted = jnp.where(t == 1, clean, posterior(clean, noisy, t, t - 1, total, 1e-6))
    predicted = predicted.clip(1e-6, 1 - 1e-6)
    target = posterior(bits, noisy, t, t - 1, total, 1e-6).clip(0.0, 1.0)
    return -(target * jnp.log(predicted) + (1 - target) * jnp.log(1 - predicted))
