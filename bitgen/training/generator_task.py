"""Training of generators on bits, from a frozen tokenizer or from disk."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bitgen import build
from bitgen.data.packed import PackedSource, unpack_bits
from bitgen.errors import UserError
from bitgen.evaluation.image_sets import pixels
from bitgen.hub import model_directory
from bitgen.images.grids import grid
from bitgen.images.pixels import from_uint8, to_uint8
from bitgen.runtime.distributed import local_rows, pad_rows, place
from bitgen.runtime.mesh import make_mesh, replicated, to_device
from bitgen.samplers.images import make_plan, sample_images
from bitgen.training import optim
from bitgen.training.fid import data_pass
from bitgen.training.state import TrainState, ema_update, with_params

PyTree = Any


class GeneratorTask:
    """Masked modelling (BiGR) or next-token prediction (BitDance): the module's own `loss`."""

    fid_name = "fid"

    def __init__(self, config: Any, files: bool = True):
        """Builds the module and checks that it fits the bits; computes nothing.

        Without `files` it has shapes and a step but no tokenizer weights: stored bits need not
        exist, and a released tokenizer is not downloaded. Raises UserError if bits per token, grid
        or classes differ from those of the data.
        """
        self.config = config
        self.module, self.info = build.module_from_config("generator", config.model)
        self.optimiser = optim.make_optimiser(config.optim, config.train.steps)
        self.packed = config.data.source == "bits"
        if self.packed and not files:
            return
        if self.packed:
            meta = PackedSource(config.data.path).meta
            source, made = config.data.path, (meta["bits"], tuple(meta["grid"]))
            self.info["origin"] = {"tokenizer": meta["tokenizer"]}
        else:
            self.tokenizer_module = model_directory.describe(config.tokenizer, "tokenizer")
            tokenizer = self.tokenizer_module
            model_directory.check_bits(tokenizer, config.tokenizer)
            source, made = config.tokenizer, (tokenizer.bits, tuple(tokenizer.grid))
            if files:
                self.info["origin"] = {"tokenizer": model_directory.identity(config.tokenizer)}
        for name, want, have in zip(
            ("bits", "grid"), (self.module.bits, tuple(self.module.grid)), made, strict=True
        ):
            if want != have:
                raise UserError(
                    f"generator and tokenizer do not fit: config.model.{name} is {want}, "
                    f"{source} has {have}; set --config.model.{name}={have}"
                )

    @functools.cached_property
    def tokenizer(self) -> model_directory.Model:
        """The tokenizer of the config; UserError if there is none."""
        return model_directory.load(self.config.tokenizer, "tokenizer")

    def frozen(self) -> PyTree:
        """Returns what the step reads but does not train: the tokenizer, unless bits are stored."""
        if self.packed:
            return {}
        return {"tokenizer": self.tokenizer.params}

    def frozen_shapes(self) -> PyTree:
        """Returns the shapes of `frozen` without reading weights."""
        return {} if self.packed else {"tokenizer": build.param_shapes(self.tokenizer_module)}

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a global batch."""
        b, size = self.config.train.batch_size, self.config.data.image_size
        packed = (b, *self.module.grid, -(-self.module.bits // 8))
        name, shape = ("bits", packed) if self.packed else ("image", (b, size, size, 3))
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.uint8),
            "label": jax.ShapeDtypeStruct((b,), jnp.int32),
        }

    def init(self, key: jax.Array) -> TrainState:
        """Returns the state before the first step; jit-able."""
        params = build.init_params(self.module, key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params={"model": params},
            opt={"model": self.optimiser.init(params)},
            ema=jax.tree.map(jnp.copy, params),
            stats={},
        )

    def start_from(self, state: TrainState, model: model_directory.Model) -> TrainState:
        """Returns the state with the parameters of a model directory; UserError if sizes differ."""
        return with_params(state, model.params, model.path)

    def stage(self, step: int) -> bool:
        """Returns False: there is one compiled step."""
        del step
        return False

    def step(
        self, state: TrainState, frozen: PyTree, batch: dict, key: jax.Array, stage: bool
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the state after one step on images or packed bits with labels, and metrics."""
        del stage

        def loss(params, part, key):
            bits_key, loss_key, dropout_key = jax.random.split(key, 3)
            bits = self._bits(frozen, part, bits_key)
            rngs = {"loss": loss_key, "dropout": dropout_key}
            return self.module.apply(
                {"params": params}, bits, part["label"], rngs=rngs, method="loss"
            )

        (value, metrics), gradient = optim.accumulate_gradients(
            loss, state.params["model"], batch, key, self.config.train.accumulate
        )
        updates, opt = self.optimiser.update(gradient, state.opt["model"], state.params["model"])
        params = optax.apply_updates(state.params["model"], updates)
        o = self.config.optim
        ema = ema_update(state.ema, params, state.step, o.ema, o.ema_every)
        metrics = {**metrics, "loss": value, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, {"model": params}, {"model": opt}, ema, {}), metrics

    def summarise(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns the scalars of a log interval."""
        return {name: float(value) for name, value in metrics.items()}

    def preview(self, state: TrainState, batch: dict) -> dict[str, np.ndarray]:
        """Returns samples of the averaged model, one column per class; none without a tokenizer."""
        del batch
        if not self.config.tokenizer:
            return {}
        count, classes = self.config.train.preview_images, self.module.num_classes
        columns = min(classes, 16, count)
        labels = np.arange(count) % columns * max(classes // columns, 1)
        mesh = make_mesh(**self.config.mesh)
        (images,) = self._sample(state.ema, labels, mesh, batch_size=count)
        return {"samples": grid(images, columns)}

    def _sample(self, params, labels, mesh, batch_size) -> Iterator[np.ndarray]:
        tokenizer = dataclasses.replace(
            self.tokenizer, params=place(self.tokenizer.params, replicated(mesh))
        )
        return sample_images(
            model_directory.Model(self.module, params, self.info, "of config.model"),
            tokenizer,
            labels,
            make_plan(self.module, self.config.sampler),
            mesh,
            seed=self.config.seed,
            batch_size=batch_size,
            decode_batch=self.config.sample.decode_batch,
        )

    def errors(
        self, params: PyTree, frozen: PyTree, batch: dict, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the loss of each held-out example, [b]; masks and noise depend on the key."""
        bits_key, loss_key = jax.random.split(key)
        bits = self._bits(frozen, batch, bits_key)

        def one(bits, label, key):
            variables, rngs = {"params": params}, {"loss": key}
            arguments = (bits[None], label[None])
            value, _ = self.module.apply(
                variables, *arguments, train=False, rngs=rngs, method="loss"
            )
            return value

        return {"loss": jax.vmap(one)(bits, batch["label"], jax.random.split(loss_key, len(bits)))}

    def image_maker(
        self, mesh: Mesh, rows: int, count: int
    ) -> Callable[[PyTree], Iterator[np.ndarray]]:
        """Returns f(parameters) -> batches of `count` samples, all classes equally often.

        Batches have `rows` rows for each process, and every process gets all of them. An image
        depends only on `config.seed` and its index. Raises UserError at once if no tokenizer fits,
        or the sampler's settings belong to another family.
        """
        ours = model_directory.Model(self.module, {}, self.info, "of config.model")
        model_directory.check_fit(ours, self.tokenizer)
        make_plan(self.module, self.config.sampler)
        labels = np.arange(count) * self.module.num_classes // count
        batch_size = rows * jax.process_count()
        return lambda params: self._sample(params, labels, mesh, batch_size)

    def real_images(self, mesh: Mesh, rows: int, count: int) -> Iterator[np.ndarray]:
        """Yields images of the data, `rows` per batch of this process; `count` 0: all.

        Packed bits are decoded by the tokenizer, which bounds the quality of the generator.
        """
        c = self.config.data
        batches = data_pass(c, rows, split=c.split, images=count)
        if not self.packed:
            yield from pixels(batches)
            return
        params = place(self.tokenizer.params, replicated(mesh))

        @jax.jit
        def decode(params, packed):
            bits = unpack_bits(packed, self.module.bits)
            module = self.tokenizer.module
            return to_uint8(module.apply({"params": params}, bits, method="decode"))

        for batch in batches:
            placed = to_device({"bits": pad_rows(batch["bits"], rows)}, mesh)
            yield local_rows(decode(params, placed["bits"]))[: len(batch["bits"])]

    def _bits(self, frozen, batch, key):
        """Returns bool [b, h, w, k]."""
        if self.packed:
            return unpack_bits(batch["bits"], self.module.bits)
        images = from_uint8(batch["image"])
        variables, module = {"params": frozen["tokenizer"]}, self.tokenizer_module
        if self.config.train.stochastic_bits and getattr(module, "stochastic", False):
            probs = module.apply(variables, images, method="probs")
            return jax.random.bernoulli(key, probs)
        return module.apply(variables, images, method="encode")
