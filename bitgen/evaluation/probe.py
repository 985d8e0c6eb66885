"""Linear probes: how well the features of each layer of a generator separate the classes.

BiGR's paper evaluates representations in this way (arXiv 2410.14672, section 4.3): nothing masked,
the null class, average pooling over tokens, one linear layer on frozen features.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from bitgen.data.packed import unpack_bits
from bitgen.errors import UserError
from bitgen.images.pixels import from_uint8
from bitgen.runtime.distributed import gather_rows, pad_rows
from bitgen.runtime.mesh import BATCH, to_device


def layer_features(
    generator: Any, tokenizer: Any, mesh: Mesh, layers: Sequence[int], *, packed: bool
) -> Callable[[Any, Any, np.ndarray], jax.Array]:
    """Returns f(generator params, tokenizer params, own images or packed bits) -> [b, l, d].

    Inputs are uint8 [b, H, W, 3] or, `packed`, [b, h, w, ceil(k/8)]; b is a multiple of the
    devices. `layers` chooses layers, counted from 0. The generator must have `features(bits, labels
    [b])` -> [l, b, n, d]; UserError if not.
    """
    if not hasattr(generator, "features"):
        raise UserError(f"{type(generator).__name__} has no features to probe")

    def pooled(generator_params, tokenizer_params, inputs):
        if packed:
            bits = unpack_bits(inputs, generator.bits)
        else:
            variables = {"params": tokenizer_params}
            bits = tokenizer.apply(variables, from_uint8(inputs), method="encode")
        # The null class: a label would reveal the answer.
        labels = jnp.full(len(inputs), generator.num_classes, jnp.int32)
        variables = {"params": generator_params}
        features = generator.apply(variables, bits, labels, method="features")
        features = features[np.asarray(layers)].astype(jnp.float32)
        return jnp.mean(features, axis=2).swapaxes(0, 1)

    program = jax.jit(
        jax.shard_map(
            pooled, mesh=mesh, in_specs=(P(), P(), BATCH), out_specs=BATCH, check_vma=False
        )
    )
    return lambda g, t, inputs: program(g, t, to_device({"inputs": inputs}, mesh)["inputs"])


def collect(
    program: Callable[..., jax.Array], params: tuple[Any, Any], batches: Any, rows: int
) -> tuple[Float[np.ndarray, "n l d"], Int[np.ndarray, " n"]]:
    """Returns the features and labels of all batches of data, which have at most `rows` rows.

    Each process gives its own rows of every batch, and gets those of all.
    """
    features, labels = [], []
    for batch in batches:
        inputs = batch["bits"] if "bits" in batch else batch["image"]
        pooled = program(*params, pad_rows(inputs, rows))
        found, label = gather_rows((pooled, pad_rows(batch["label"], rows)), len(inputs))
        features.append(found)
        labels.append(label)
    return np.concatenate(features), np.concatenate(labels)


def fit_probe(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    num_classes: int,
    *,
    l2: float = 1e-4,
    steps: int = 100,
) -> Callable[[Float[np.ndarray, "m d"]], Int[np.ndarray, " m"]]:
    """Returns the predictor of a multinomial logistic regression, fitted by L-BFGS.

    Features are standardised by the mean and deviation of `features`; the mean cross-entropy gets
    l2 / 2 times the squared weights. Raises UserError for a label that is no class.
    """
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(f"labels {labels.min()} to {labels.max()} are not {num_classes} classes")
    mean = features.mean(0, dtype=np.float64).astype(np.float32)
    deviation = features.std(0, dtype=np.float64).astype(np.float32) + np.float32(1e-6)

    def standardised(rows: np.ndarray) -> jax.Array:
        return jnp.asarray((rows - mean[None]) / deviation[None])

    x, y = standardised(features), jnp.asarray(labels)
    params = {
        "kernel": jnp.zeros((x.shape[1], num_classes)),
        "bias": jnp.zeros((1, num_classes)),
    }
    params = _minimise(params, x, y, l2=l2, steps=steps)

    def predict(rows: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.argmax(_logits(params, standardised(rows)), axis=1))

    return predict


def accuracy_by_layer(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    num_classes: int,
    *,
    l2: float = 1e-4,
    steps: int = 100,
) -> list[float]:
    """Returns the held-out accuracy of a probe of each layer; both sets are [n, l, d], [n]."""
    accuracies = []
    for layer in range(train[0].shape[1]):
        predict = fit_probe(train[0][:, layer], train[1], num_classes, l2=l2, steps=steps)
        accuracies.append(float(np.mean(predict(test[0][:, layer]) == test[1])))
    return accuracies


def _logits(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    product = jnp.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + params["bias"]


@functools.partial(jax.jit, static_argnames=("l2", "steps"))
def _minimise(params: Any, x: jax.Array, y: jax.Array, *, l2: float, steps: int) -> Any:
    def loss(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(_logits(params, x), y)
        return jnp.mean(losses) + l2 / 2 * jnp.sum(jnp.square(params["kernel"]))

    optimiser = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss)

    def step(carry, _):
        params, state = carry
        value, gradient = value_and_gradient(params, state=state)
        updates, state = optimiser.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimiser.init(params)), length=steps)[0][0]
