"""The Bernoulli diffusion head of BiGR (arXiv 2410.14672), which draws the k bits of a token.

Bits are noised towards fair coin flips over T steps (Binary Latent Diffusion, arXiv 2304.04820) and
denoised by a small network, conditioned on the transformer's output for that token.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.nn.embeddings import sinusoids
from bitgen.nn.norms import Dtype, layer_norm
from bitgen.nn.remat import Remat, remat_layer

_TIME_FREQUENCIES = 256


class BernoulliHead(nn.Module):
    """Predicts the clean bits, or which bits to flip, from noisy bits, step and conditioning."""

    bits: int
    width: int
    layers: int
    steps: int = 256  # T of the noise schedule
    predict_flip: bool = True
    focal: float = 0.0  # exponent of (1 - p); negative for plain cross-entropy
    alpha: float = -1.0  # weight of ones; -1 balances ones and zeros in each token
    vlb_weight: float = 0.0  # weight of the variational bound, "aux"
    remat: Remat = False
    dtype: Dtype = jnp.float32

    def setup(self):
        self.time_in, self.time_out, self.bits_in, self.cond_in = (
            nn.Dense(self.width, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype)
            for _ in range(4)
        )
        block = remat_layer(_Block, self.remat)
        self.blocks = [block(self.width, self.dtype) for _ in range(self.layers)]
        self.final = _Final(self.bits, self.dtype)

    def time_table(self) -> Float[Array, "T w"]:
        """Returns the embedding of every step, 0-based."""
        x = sinusoids(jnp.arange(self.steps), _TIME_FREQUENCIES).astype(self.dtype)
        return self.time_out(nn.silu(self.time_in(x)))

    def cond_embedding(self, cond: Float[Array, "*b d"]) -> Float[Array, "*b w"]:
        """Returns the embedding of the conditioning, which does not depend on the step."""
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
        """Returns each token's loss and metrics at a random step."""
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
        """Returns each bit's loss, `bce` and `accuracy`, given 1-based steps and uniform noise."""
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
        """Returns the probability of each bit after denoising in `steps` of the T steps.

        `keys` [b] draw each image's noise; `scale` guides the logits away from `uncond`.
        """
        shape = (*cond.shape[1:2], self.bits)

        def uniforms(i):
            return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, i), shape))(keys)

        return self.sample_given(cond, uncond, uniforms, steps, scale, temperature)

    def sample_given(self, cond, uncond, uniforms, steps: int, scale, temperature):
        """As `sample`, with noise uniforms(i) -> [b, m, k], i = 0 for the start, then each step."""
        times = chain_times(self.steps, steps)
        # The embeddings of conditionings and steps are the same throughout the chain.
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
    """Returns `steps` evenly spaced steps of `total`, 1-based and ascending.

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
    """Returns the probability of a one at step t of `total`, given that of the clean bit.

    The linear schedule keeps a bit with probability 1 - t / total, else flips a fair coin.
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
    keep = (total - t) / (total - previous)  # probability to keep a bit from `previous` to t

    def joint(clean, noisy):
        return marginal(clean, previous, total) * (noisy * keep + 0.5 * (1 - keep))

    one, zero = joint(clean, noisy), joint(1 - clean, 1 - noisy)
    return one / (one + zero + epsilon)


class _Block(nn.Module):
    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, modulation):
        init = nn.initializers.normal(0.02)
        y, gate = _modulated(x, modulation, 3, self.dtype)
        y = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="mlp_in")(y)
        y = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="mlp_out")(nn.silu(y))
        return x + gate * y


class _Final(nn.Module):
    bits: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, modulation):
        (y,) = _modulated(x, modulation, 2, self.dtype)
        zeros = nn.initializers.zeros
        return nn.Dense(self.bits, kernel_init=zeros, dtype=self.dtype, name="linear")(y)


def _modulated(x, modulation, chunks, dtype):
    """Returns x after an adaptive layer norm, and the gate if there are three `chunks`."""
    dense = nn.Dense(
        chunks * x.shape[-1], kernel_init=nn.initializers.zeros, dtype=dtype, name="modulation"
    )
    shift, scale, *gate = jnp.split(dense(modulation), chunks, axis=-1)
    return layer_norm(x) * (1 + scale) + shift, *gate


def _unflip(logits, noisy):
    """Returns the logits of clean ones from the logits of flips."""
    return jnp.where(noisy > 0.5, -logits, logits)


def _cross_entropy(logits, targets):
    return nn.softplus(logits) - logits * targets


def _focal_loss(logits, targets, *, gamma: float, alpha: float):
    probs = jax.nn.sigmoid(logits)
    missed = jnp.clip(probs + targets - 2 * probs * targets, 1e-6, 1 - 1e-6)
    loss = _cross_entropy(logits, targets) * missed**gamma
    if alpha == -1:
        # The rarer value of a token's bits weighs more; 1/k keeps the weight of one that is absent.
        ones = targets.mean(-1, keepdims=True)
        return loss * ((1 - ones) * targets + ones * (1 - targets) + 1 / targets.shape[-1])
    if alpha > 0:
        return loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss


def _variational_bound(x0_logits, bits, noisy, t, total: int):
    """Returns the cross-entropy of the bits at t - 1 under the predicted posterior."""
    clean = jax.nn.sigmoid(x0_logits)
    predicted = jnp.where(t == 1, clean, posterior(clean, noisy, t, t - 1, total, 1e-6))
    predicted = predicted.clip(1e-6, 1 - 1e-6)
    target = posterior(bits, noisy, t, t - 1, total, 1e-6).clip(0.0, 1.0)
    return -(target * jnp.log(predicted) + (1 - target) * jnp.log(1 - predicted))
