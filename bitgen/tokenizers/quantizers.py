"""Quantisers: an encoder's output to bits, and bits to the codes that a decoder reads."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from bitgen.errors import UserError, choose


class Quantized(NamedTuple):
    """The output of a quantiser in training."""

    codes: Float[Array, "*b k"]  # float32, with straight-through gradients
    bits: Bool[Array, "*b k"]
    losses: dict[str, Float[Array, ""]]  # name to scalar: code, entropy, commitment


class Quantizer:
    """Defines `bits`; subclasses have `codes` and `__call__`, the training path."""

    def bits(self, z: Float[Array, "*b k"]) -> Bool[Array, "*b k"]:
        """Returns which values are positive; 0 counts as negative."""
        return z > 0


@dataclasses.dataclass(frozen=True)
class Bernoulli(Quantizer):
    """Bits drawn with probability sigmoid(z), codes 0 and 1 (arXiv 2304.04820)."""

    deterministic: bool = False  # bits are rounded in training too

    def codes(self, bits: Bool[Array, "*b k"]) -> Float[Array, "*b k"]:
        """Returns 0 and 1."""
        return bits.astype(jnp.float32)

    def __call__(self, z: Float[Array, "*b k"], key: PRNGKeyArray | None = None) -> Quantized:
        """Returns codes for logits z; bits are drawn with `key`, rounded without one."""
        z = z.astype(jnp.float32)
        probs = jax.nn.sigmoid(z)
        if key is None or self.deterministic:
            bits = self.bits(z)
        else:
            bits = jax.random.bernoulli(key, probs)
        uncertain = jax.nn.sigmoid(probs) * jax.nn.sigmoid(-probs)
        codes = straight_through(self.codes(bits), probs)
        return Quantized(codes, bits, {"code": jnp.mean(uncertain)})


@dataclasses.dataclass(frozen=True)
class Sign(Quantizer):
    """Signs, codes -1 and 1: the grouped lookup-free quantiser of BitDance, "GFQ"."""

    groups: int = 4
    temperature: float = 0.01

    def codes(self, bits: Bool[Array, "*b k"]) -> Float[Array, "*b k"]:
        """Returns -1 and 1."""
        return bits.astype(jnp.float32) * 2 - 1

    def __call__(self, z: Float[Array, "*b k"], key: PRNGKeyArray | None = None) -> Quantized:
        """Returns the signs of z, and entropy and commitment losses."""
        del key
        z = z.astype(jnp.float32)
        bits = self.bits(z)
        codes = self.codes(bits)
        sample, batch = self.entropies(z)
        commitment = jnp.mean(jnp.square(z - codes))
        losses = {"entropy": sample - batch, "commitment": commitment}
        return Quantized(straight_through(codes, z), bits, losses)

    def entropies(self, z: Float[Array, "*b k"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the mean entropy of a group's code and the entropy of the mean code, in nats.

        All groups are samples of one distribution of codes. Raises UserError if the last axis does
        not split into the groups.
        """
        if self.groups < 1 or z.shape[-1] % self.groups:
            raise UserError(f"{z.shape[-1]} bits do not split into {self.groups} groups")
        size = z.shape[-1] // self.groups
        z = z.reshape(-1, size)  # [m groups, k / groups]
        # The temperature would magnify the errors of a product in less than float32.
        affinities = jnp.matmul(z, jnp.asarray(_all_codes(size)).T, precision="highest")
        logits = 2 * affinities / self.temperature
        log_probs = jax.nn.log_softmax(logits)
        probs = jnp.exp(log_probs)
        mean = probs.mean(0)
        return -jnp.sum(probs * log_probs) / len(z), -jnp.sum(mean * jnp.log(mean + 1e-5))


@dataclasses.dataclass(frozen=True)
class Spherical(Quantizer):
    """Signs of a vector on the unit sphere, codes -1/sqrt(k) and 1/sqrt(k) (arXiv 2406.07548)."""

    inverse_temperature: float = 100.0
    diversity: float = 1.0

    def codes(self, bits: Bool[Array, "*b k"]) -> Float[Array, "*b k"]:
        """Returns points on the unit sphere."""
        return (bits.astype(jnp.float32) * 2 - 1) / bits.shape[-1] ** 0.5

    def __call__(self, z: Float[Array, "*b k"], key: PRNGKeyArray | None = None) -> Quantized:
        """Returns the code nearest to z on the sphere, and entropy and commitment losses."""
        del key
        z = normalized(z.astype(jnp.float32))
        bits = self.bits(z)
        codes = self.codes(bits)
        sample, batch = self.entropies(z)
        entropy = (sample - self.diversity * batch) / self.inverse_temperature
        commitment = jnp.mean(jnp.sum(jnp.square(z - codes), -1))
        losses = {"entropy": entropy, "commitment": commitment}
        return Quantized(straight_through(codes, z), bits, losses)

    def entropies(self, z: Float[Array, "*b k"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the mean entropy of a code and the entropy of the mean, of independent bits."""
        probs = jax.nn.sigmoid(4 * z / z.shape[-1] ** 0.5 * self.inverse_temperature)
        probs = probs.reshape(-1, z.shape[-1])
        return binary_entropy(probs).sum(-1).mean(), binary_entropy(probs.mean(0)).sum()


QUANTIZERS: dict[str, Any] = {"bernoulli": Bernoulli, "sign": Sign, "spherical": Spherical}


def make_quantizer(name: str, **settings: Any) -> Any:
    """Returns a quantiser by name; raises UserError for another name."""
    return choose("quantizer", name, QUANTIZERS)(**settings)


def straight_through(codes: Float[Array, "*b"], soft: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns `codes` with the gradient of `soft`."""
    return soft + jax.lax.stop_gradient(codes - soft)


def normalized(z: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """Returns z on the unit sphere; zero stays zero."""
    return z / jnp.sqrt(jnp.sum(z * z, axis=-1, keepdims=True) + 1e-24)


def binary_entropy(probs: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Returns the entropy of Bernoulli variables in nats."""
    # Not log(1 - p + 1e-8): compilers fold the constants to log(1 - p), which is infinite at 1.
    p, q = probs, 1 - probs
    return -(p * jnp.log(jnp.maximum(p, 1e-8)) + q * jnp.log(jnp.maximum(q, 1e-8)))


def _all_codes(size: int) -> np.ndarray:
    """Returns every code of a group in {-1, 1}, [2^size, size]."""
    numbers = np.arange(2**size)[:, None] >> np.arange(size)
    return (numbers & 1).astype(np.float32) * 2 - 1
