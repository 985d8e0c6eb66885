"""Training of tokenizers: reconstruction, perceptual and adversarial losses through the bits."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from bitgen import build
from bitgen.convert import patchgan
from bitgen.convert.rules import import_tensors
from bitgen.errors import UserError
from bitgen.evaluation.image_metrics import psnr
from bitgen.evaluation.image_sets import pixels
from bitgen.evaluation.reconstruction import bit_entropy, bit_usage, through
from bitgen.hub import model_directory
from bitgen.images.grids import paired_grid
from bitgen.images.pixels import from_uint8, to_uint8
from bitgen.images.plots import plot_bits
from bitgen.losses import adversarial
from bitgen.losses.augment import diff_augment
from bitgen.losses.lpips import load_lpips, lpips_distance, lpips_shapes
from bitgen.nn.shuffle import pixel_shuffle, pixel_unshuffle
from bitgen.runtime.distributed import fetch_global, gather_rows, pad_rows, place
from bitgen.runtime.mesh import to_device
from bitgen.training import optim
from bitgen.training.fid import data_pass
from bitgen.training.state import TrainState, ema_update, with_leaves, with_params

PyTree = Any

LECAM_DECAY = 0.999  # of the running mean logits, arXiv 2104.03310


class TokenizerTask:
    """Binary Latent Diffusion's recipe (arXiv 2304.04820) for every family, set by the config.

    The statistics of batch norms are parameters with a gradient of zero. In training, the module
    puts their new values into the collection "moved", at the same paths.
    """

    fid_name = "rfid"

    def __init__(self, config: Any):
        """Builds modules and optimisers; computes nothing."""
        self.config = config
        self.module, self.info = build.module_from_config("tokenizer", config.model)
        o, steps = config.optim, config.train.steps
        self.optimisers = {"model": optim.make_optimiser(o, steps, config.train.freeze)}
        self.discriminator: Any = None
        self.bits_mean: np.ndarray | None = None  # of the last log interval, [k]
        if config.loss.gan_weight > 0:
            self.optimisers["discriminator"] = optim.make_optimiser(o, steps)
            self.discriminator = adversarial.PatchDiscriminator(
                config.loss.discriminator_width,
                config.loss.discriminator_layers,
                tuple(config.loss.pixel_range),
            )

    def frozen(self) -> PyTree:
        """Returns what the step reads but does not train: LPIPS, unless its weight is 0."""
        if self.config.loss.perceptual_weight == 0:
            return {}
        return {"lpips": load_lpips(self.config.loss.perceptual_weights)}

    def frozen_shapes(self) -> PyTree:
        """Returns the shapes of `frozen` without reading weights."""
        if self.config.loss.perceptual_weight == 0:
            return {}
        return {
            "lpips": {
                layer: {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in leaves.items()}
                for layer, leaves in lpips_shapes().items()
            }
        }

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a global batch, without labels, which are not read."""
        size = self.config.data.image_size
        shape = (self.config.train.batch_size, size, size, 3)
        return {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def init(self, key: jax.Array) -> TrainState:
        """Returns the state before the first step; jit-able."""
        model_key, discriminator_key = jax.random.split(key)
        params, stats = {"model": build.init_params(self.module, model_key)}, {}
        if self.discriminator is not None:
            size = self.module.image_size
            images = jnp.zeros((1, size, size, self.module.channels))
            variables = self.discriminator.init(discriminator_key, images)
            params["discriminator"] = variables["params"]
            stats["discriminator"] = variables["batch_stats"]
            if self.config.loss.lecam_weight > 0:
                stats["lecam"] = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt={name: self.optimisers[name].init(p) for name, p in params.items()},
            ema=jax.tree.map(jnp.copy, params["model"]),
            stats=stats,
        )

    def start_from(self, state: TrainState, model: model_directory.Model) -> TrainState:
        """Returns the state with the parameters of a model directory; UserError if sizes differ.

        An imported model's discriminator is taken over as well.
        """
        state = with_params(state, model.params, model.path)
        carried = model_directory.load_carried(model.path)
        tensors = {name: x for name, x in carried.items() if name.startswith("disc.")}
        if self.discriminator is None or not tensors:
            return state
        hparams = {"width": self.discriminator.width, "layers": self.discriminator.layers}
        target = {
            "params": state.params["discriminator"],
            "batch_stats": state.stats["discriminator"],
        }
        variables, _ = import_tensors(patchgan.table(hparams), tensors, target)
        variables = jax.tree.map(lambda old, new: place(new, old.sharding), target, variables)
        return state.replace(
            params={**state.params, "discriminator": variables["params"]},
            stats={**state.stats, "discriminator": variables["batch_stats"]},
        )

    def stage(self, step: int) -> bool:
        """Returns whether the discriminator takes part in a step; each stage compiles once."""
        return self.discriminator is not None and step >= self.config.loss.gan_start

    def step(
        self,
        state: TrainState,
        frozen: PyTree,
        batch: dict,
        key: jax.Array,
        adversarial_stage: bool,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Returns the state after one step on uint8 images [b, H, W, 3], and metrics.

        With `config.train.accumulate` parts, gradients, metrics and moved statistics are means over
        the parts, and all networks are updated once. Raises UserError for a loss on the code
        without a weight.
        """
        metrics, gradients, moved, stats = optim.mean_of_parts(
            lambda images, key: self._gradients(state, frozen, images, key, adversarial_stage),
            batch["image"],
            key,
            self.config.train.accumulate,
        )
        params, opt = dict(state.params), dict(state.opt)
        for name, gradient in gradients.items():
            updates, opt[name] = self.optimisers[name].update(gradient, opt[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        params["model"] = self._unless_frozen(
            with_leaves(params["model"], moved), state.params["model"]
        )
        o = self.config.optim
        ema = ema_update(state.ema, params["model"], state.step, o.ema, o.ema_every)
        # An average of equal values is not exactly that value.
        ema = self._unless_frozen(ema, state.ema)
        stats = {**state.stats, **stats}
        if "lecam" in stats and adversarial_stage:
            stats["lecam"] = {
                name: LECAM_DECAY * old + (1 - LECAM_DECAY) * metrics[f"logits_{name}"]
                for name, old in stats["lecam"].items()
            }
        return TrainState(state.step + 1, params, opt, ema, stats), metrics

    def summarise(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns the scalars of a log interval, with the use of the code."""
        p = self.bits_mean = metrics.pop("bits_mean", None)
        scalars = {name: float(value) for name, value in metrics.items()}
        return scalars if p is None else {**scalars, **bit_usage(p)}  # None: continuous latents

    def preview(self, state: TrainState, batch: dict) -> dict[str, np.ndarray]:
        """Returns pictures: images above the averaged model's reconstructions, and each bit's use.

        The second has bars of how often each bit is set and of its entropy in bits, over the last
        log interval, if there was one.
        """
        images = np.asarray(batch["image"])
        recon = fetch_global(self._reconstruct(state.ema, images))
        pictures = {"reconstructions": paired_grid(images, recon, 16)}
        if (p := self.bits_mean) is not None:
            pictures["bits"] = plot_bits(p[None], bit_entropy(p)[None])
        return pictures

    @functools.cached_property
    def _reconstruct(self):
        return jax.jit(lambda params, images: to_uint8(self._through(params, images)))

    def _through(self, params, images):
        """Returns the reconstructions of uint8 images, not clipped."""
        return through(self.module, params, images)[1]

    def errors(
        self, params: PyTree, frozen: PyTree, batch: dict, key: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns l1, as in the loss, and psnr of 8-bit pixels of each held-out image, [b]."""
        del frozen, key
        images, recon = from_uint8(batch["image"]), self._through(params, batch["image"])
        low, high = self.config.loss.pixel_range
        distance = jnp.abs(jnp.clip(recon, -1, 1) - images) * ((high - low) / 2)
        return {
            "l1": jnp.mean(distance, axis=(1, 2, 3)),
            "psnr": psnr(batch["image"], to_uint8(recon)),
        }

    def image_maker(
        self, mesh: Mesh, rows: int, count: int
    ) -> Callable[[PyTree], Iterator[np.ndarray]]:
        """Returns f(parameters) -> batches of reconstructions of the `real_images`.

        Every process gets all of them.
        """

        def make(params: PyTree) -> Iterator[np.ndarray]:
            for images in self.real_images(mesh, rows, count):
                placed = to_device({"image": pad_rows(images, rows)}, mesh)
                yield gather_rows(self._reconstruct(params, placed["image"]), len(images))

        return make

    def real_images(self, mesh: Mesh, rows: int, count: int) -> Iterator[np.ndarray]:
        """Yields `count` images of the data, `rows` per batch of this process, evenly spread."""
        del mesh
        c = self.config.data
        return pixels(data_pass(c, rows, split=c.split, images=count))

    def _unless_frozen(self, new: PyTree, old: PyTree) -> PyTree:
        freeze = self.config.train.freeze
        return optim.where_trained(optim.trained(new, freeze), new, old) if freeze else new

    def _gradients(self, state, frozen, images, key, adversarial_stage):
        """Returns metrics, gradients by network, and the moved statistics of the model and the
        others.
        """
        bits_key, fake_key, pair_key = jax.random.split(key, 3)
        images = from_uint8(images)

        def total(params):
            params = self._unless_frozen(params, jax.lax.stop_gradient(params))
            (recon, aux), moved = self.module.apply(
                {"params": params}, images, train=True, rngs={"bits": bits_key}, mutable=["moved"]
            )
            recon_loss = functools.partial(self._reconstruction_loss, frozen, images)
            if adversarial_stage:
                fool_loss = functools.partial(self._fool_loss, state, key=fake_key)
                value, metrics, stats = self._balanced_loss(
                    (recon_loss, fool_loss), recon, aux["last_input"], params
                )
            else:
                (value, metrics), stats = recon_loss(recon), {}
            code_value, code_metrics = self._code_loss(aux)
            value += code_value
            metrics = {**metrics, **code_metrics, "loss": value}
            return value, (recon, metrics, _last_sown(moved.get("moved", {})), stats)

        gradient, (recon, metrics, moved, stats) = jax.grad(total, has_aux=True)(
            state.params["model"]
        )
        gradients = {"model": gradient}
        if adversarial_stage:
            gradients["discriminator"], (pair_metrics, stats) = self._discriminator_gradient(
                state, stats, images, recon, pair_key
            )
            metrics |= pair_metrics
        return metrics, gradients, moved, stats

    def _balanced_loss(self, losses, recon, last_input, params):
        """Returns value, metrics and moved statistics of the reconstruction and GAN losses."""
        config = self.config.loss
        kernel = params
        for name in (*self.module.last_layer, "kernel"):
            kernel = kernel[name]
        # The channels of a last layer may be the pixels of a square, to be shuffled into place.
        side = getattr(self.module, "last_shuffle", 1)
        unshuffled = pixel_unshuffle(recon, side)
        gradients = adversarial.last_layer_gradients(
            [lambda y, loss=loss: loss(pixel_shuffle(y, side)) for loss in losses],
            unshuffled,
            last_input,
            kernel_size=kernel.shape[:2],
            image_scale=self.module.image_scale,
        )
        weight = config.gan_weight * adversarial.adaptive_weight(
            gradients.kernels[0], gradients.kernels[1], config.gan_max_weight
        )
        value = adversarial.weighted_loss(unshuffled, gradients, (1.0, weight))
        metrics, stats = gradients.metrics
        return value, {**metrics, "gan": gradients.values[1], "gan_weight": weight}, stats

    def _code_loss(self, aux):
        """Returns the weighted losses on the code, and their values with the ones of each bit."""
        total, metrics = jnp.zeros(()), dict(aux["losses"])
        for name, value in aux["losses"].items():
            weight = self.config.loss.get(f"{name}_weight")
            if weight is None:
                raise UserError(
                    f"{self.config.model.family} has a loss {name!r} without a weight: "
                    f"set config.loss.{name}_weight"
                )
            if weight:
                total += weight * value
        if "bits" in aux:
            # Of each bit; the log interval's mean shows the bits that never change.
            scales = jax.tree.leaves(aux["bits"])
            ones = sum(jnp.sum(x, tuple(range(x.ndim - 1)), jnp.float32) for x in scales)
            metrics["bits_mean"] = ones / sum(x.size // x.shape[-1] for x in scales)
        return total, metrics

    def _reconstruction_loss(self, frozen, images, recon):
        """Returns the loss and its parts, in the model's own pixel range."""
        loss = self.config.loss
        low, high = loss.pixel_range
        images, recon = ((x + 1) * ((high - low) / 2) + low for x in (images, recon))
        parts = {}
        parts["l1"] = jnp.mean(jnp.abs(images - recon))
        total = loss.l1 * parts["l1"]
        if loss.l2:
            parts["l2"] = jnp.mean(jnp.square(images - recon))
            total += loss.l2 * parts["l2"]
        if loss.perceptual_weight:
            parts["perceptual"] = jnp.mean(lpips_distance(frozen["lpips"], images, recon))
            total += loss.perceptual_weight * parts["perceptual"]
        return total, parts

    def _judge(self, params, stats, images, key):
        """Returns the logits of the discriminator and its moved batch statistics."""
        if self.config.loss.gan_augment:
            images = diff_augment((images + 1) / 2, key) * 2 - 1
        logits, moved = self.discriminator.apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
        )
        return logits, moved["batch_stats"]

    def _fool_loss(self, state, recon, key):
        logits, moved = self._judge(
            state.params["discriminator"], state.stats["discriminator"], recon, key
        )
        return adversarial.generator_loss(logits), {"discriminator": moved}

    def _discriminator_gradient(self, state, stats, images, recon, key):
        """Returns the gradient of the discriminator's losses, with metrics and moved statistics."""
        real_key, fake_key = jax.random.split(key)
        recon = jax.lax.stop_gradient(recon)

        def pair_loss(params):
            real, moved = self._judge(params, stats["discriminator"], images, real_key)
            fake, moved = self._judge(params, moved, recon, fake_key)
            value = adversarial.hinge_discriminator_loss(real, fake)
            metrics = {
                "discriminator": value,
                "logits_real": real.mean(),
                "logits_fake": fake.mean(),
            }
            if weight := self.config.loss.lecam_weight:
                metrics["lecam"] = adversarial.lecam_loss(real, fake, state.stats["lecam"])
                value += weight * metrics["lecam"]
            return value, (metrics, {"discriminator": moved})

        return jax.grad(pair_loss, has_aux=True)(state.params["discriminator"])


def _last_sown(moved: PyTree) -> PyTree:
    """Returns the last of the values that `sow` keeps for every call."""
    return jax.tree.map(
        lambda leaf: leaf[-1] if isinstance(leaf, tuple) else leaf,
        moved,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
