"""Features of images for metrics, by the field's protocols, computed over a mesh."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt8

from bitgen.errors import UserError, choose
from bitgen.evaluation.inception import POOL, SIZE, Inception
from bitgen.evaluation.resize import resize_bilinear
from bitgen.evaluation.weights import find_weights, load_inception
from bitgen.hub import model_directory
from bitgen.runtime.distributed import gather_rows, pad_rows, place
from bitgen.runtime.mesh import BATCH, batch_sharding, replicated, round_up_batch

Features = dict[str, np.ndarray]  # pool [n, d], spatial [n, s], logits [n, c], float32


def prepare_adm(images: UInt8[Array, "b H W 3"]) -> Array:
    """Returns images as ADM's graph prepares them: TensorFlow 1's resize, then (x - 128) / 128.

    github.com/openai/guided-diffusion, `evaluations/evaluator.py`.
    """
    return (resize_bilinear(images.astype(jnp.float32), SIZE, legacy=True) - 128) / 128


def prepare_pytorch_fid(images: UInt8[Array, "b H W 3"]) -> Array:
    """Returns images as pytorch-fid prepares them: PyTorch's resize in [0, 1], then 2x - 1.

    github.com/mseitzer/pytorch-fid, `inception.py`.
    """
    return 2 * resize_bilinear(images.astype(jnp.float32) / 255, SIZE, legacy=False) - 1


def prepare_random(images: UInt8[Array, "b H W 3"]) -> Array:
    """Returns images in [-1, 1], 32 pixels a side."""
    return resize_bilinear(images.astype(jnp.float32) / 127.5 - 1, 32, legacy=False)


class RandomNetwork(nn.Module):
    """Three random convolutions, for trying things out without a file; its metrics mean nothing."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        """Returns pool [b, 64], spatial [b, 112] and logits [b, 10] of images [b, 32, 32, 3]."""
        for i, channels in enumerate((16, 32, 64)):
            x = nn.relu(nn.Conv(channels, (3, 3), 2, name=f"conv_{i}")(x))
        pool = jnp.mean(x, axis=(1, 2))
        logits = nn.Dense(10, use_bias=False, name="fc")(pool)
        return {"pool": pool, "spatial": x[..., :7].reshape(len(x), -1), "logits": logits}


@dataclass(frozen=True)
class Protocol:
    """How images become features."""

    prepare: Callable[[Array], Array]
    network: nn.Module
    size: int  # of the pool features
    compare_with: str  # whose numbers


PROTOCOLS = {
    "adm": Protocol(prepare_adm, Inception(), POOL, "ADM's suite, torch-fidelity"),
    "pytorch_fid": Protocol(prepare_pytorch_fid, Inception(), POOL, "pytorch-fid"),
    "random": Protocol(prepare_random, RandomNetwork(), 64, "itself only"),
}


class Extractor:
    """Computes features with one program of a fixed batch shape, split over the mesh.

    Every process gets the features of all images, and must make the same calls.
    """

    def __init__(self, protocol: str, params: Any, mesh: Mesh, batch_size: int):
        """Takes a name of PROTOCOLS and the parameters of its network."""
        how = choose("protocol of evaluation", protocol, PROTOCOLS)
        self.protocol, self.digest = protocol, model_directory.digest(params)
        self.size = how.size  # of the pool features
        self.rows = round_up_batch(batch_size, mesh) // jax.process_count()
        self._sharding = batch_sharding(mesh)
        self._params = place(params, replicated(mesh))
        self._program = _program(protocol, mesh)

    def __call__(self, images: UInt8[np.ndarray, "n H W 3"]) -> Features:
        """Returns the features of the images of all processes, at most `rows` of each."""
        return gather_rows(*self._start(images))

    def stream(
        self, batches: Iterable[UInt8[np.ndarray, "b H W 3"]], *, shares: bool = False
    ) -> Iterator[Features]:
        """Yields the features of all images in order.

        `batches` may have any size and are the same on every process, or with `shares` each
        process gives its own rows of every batch, at most `rows`.
        """
        processes = jax.process_count()
        if processes == 1 or not shares:
            first = self.rows * jax.process_index()
            batches = (
                images[first : first + self.rows]
                for images in regroup(batches, self.rows * processes)
            )
        pending = None
        for images in batches:
            started = self._start(images)
            if pending is not None:  # the device works while the host takes the last result
                yield gather_rows(*pending)
            pending = started
        if pending is not None:
            yield gather_rows(*pending)

    def _start(self, images: np.ndarray) -> tuple[Any, int]:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(
                f"metrics take uint8 images [n, H, W, 3], got {images.dtype} {list(images.shape)}"
            )
        if len(images) > self.rows:
            raise UserError(f"{len(images)} images are more than the batch of {self.rows}")
        padded = pad_rows(images, self.rows)
        padded = jax.make_array_from_process_local_data(self._sharding, padded)
        return self._program(self._params, padded), len(images)


@functools.lru_cache(maxsize=4)  # for every extractor of a protocol one program
def _program(protocol: str, mesh: Mesh) -> Callable[[Any, jax.Array], dict[str, jax.Array]]:
    how = PROTOCOLS[protocol]

    def features(params, images):
        return how.network.apply({"params": params}, how.prepare(images))

    return jax.jit(
        jax.shard_map(features, mesh=mesh, in_specs=(P(), BATCH), out_specs=BATCH, check_vma=False)
    )


def make_extractor(protocol: str, weights: str, mesh: Mesh, batch_size: int) -> Extractor:
    """Returns the extractor of a protocol.

    `weights` is the file of Inception's weights or zoo:NAME; '' is the one in the cache. Raises
    UserError if there is none. The random network needs no file.
    """
    how = choose("protocol of evaluation", protocol, PROTOCOLS)
    if isinstance(how.network, Inception):
        params = load_inception(find_weights(weights))
    else:
        params = _random_params()
    return Extractor(protocol, params, mesh, batch_size)


@functools.cache
def _random_params() -> Any:
    sample = jnp.zeros((1, 32, 32, 3))
    return jax.device_get(jax.jit(RandomNetwork().init)(jax.random.key(0), sample)["params"])


def regroup(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the same rows in batches of `size`; the last may be smaller.

    Raises UserError if the rows differ in shape.
    """
    waiting: list[np.ndarray] = []
    count, shape = 0, None
    for batch in batches:
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise UserError(
                f"images of different sizes, {list(shape)} and {list(batch.shape[1:])}: bring "
                "them to one size first"
            )
        waiting.append(batch)
        count += len(batch)
        if count >= size:
            rows = np.concatenate(waiting)
            whole = count // size * size
            yield from np.split(rows[:whole], whole // size)
            waiting, count = [rows[whole:]], count - whole
    if count:
        yield np.concatenate(waiting)
