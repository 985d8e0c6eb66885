"""Training a tokenizer: reconstruction, perceptual and adversarial losses through the bits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bitgen import build, model_directory, optim
from bitgen.convert import patchgan
from bitgen.convert.rules import import_tensors
from bitgen.data.images import paired_grid
from bitgen.losses import adversarial
from bitgen.losses.augment import diff_augment
from bitgen.losses.lpips import load_lpips, lpips_distance
from bitgen.pixels import from_uint8, to_uint8
from bitgen.state import TrainState, ema_update, with_params

PyTree = Any


class TokenizerTask:
    """Binary Latent Diffusion's recipe (arXiv 2304.04820), every part by config."""

    def __init__(self, config: Any):
        """Builds modules and optimisers; computes nothing."""
        self.config = config
        self.module, self.info = build.module_from_config("tokenizer", config.model)
        self.optimiser = optim.make_optimiser(config.optim, config.train.steps)
        self.discriminator: Any = None
        if config.loss.gan_weight > 0:
            self.discriminator = adversarial.PatchDiscriminator(
                config.loss.discriminator_width,
                config.loss.discriminator_layers,
                tuple(config.loss.pixel_range),
            )

    def frozen(self) -> PyTree:
        """Returns what the step reads but does not train: LPIPS, if its weight is not 0."""
        if self.config.loss.perceptual_weight == 0:
            return {}
        return {"lpips": load_lpips(self.config.loss.perceptual_weights)}

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
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt={name: self.optimiser.init(p) for name, p in params.items()},
            ema=jax.tree.map(jnp.copy, params["model"]),
            stats=stats,
        )

    def start_from(self, state: TrainState, model: model_directory.Model) -> TrainState:
        """Returns the state with the parameters of a model directory; UserError if sizes differ.

        The discriminator that an imported model was trained against goes on too.
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
        variables = jax.tree.map(
            lambda old, new: jax.device_put(new, old.sharding), target, variables
        )
        return state.replace(
            params={**state.params, "discriminator": variables["params"]},
            stats={"discriminator": variables["batch_stats"]},
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
        """Returns the state after one step on uint8 images [b, H, W, 3], and metrics."""
        keys = dict(zip(("bits", "fake", "pair"), jax.random.split(key, 3), strict=True))
        images = from_uint8(batch["image"])
        loss = self.config.loss
        stats = dict(state.stats)

        def total(params):
            recon, aux = self.module.apply(
                {"params": params}, images, train=True, rngs={"bits": keys["bits"]}
            )
            parts: list[Any] = [lambda y: self._reconstruction_loss(frozen, images, y)]
            if adversarial_stage:
                parts.append(lambda y: self._fool_loss(state.params, stats, y, keys["fake"]))
            gradients = adversarial.last_layer_gradients(
                parts, recon, aux["last_input"], image_scale=2.0
            )
            metrics, weights = dict(gradients.metrics[0]), [1.0]
            if adversarial_stage:
                stats["discriminator"] = gradients.metrics[1]
                weight = adversarial.adaptive_weight(
                    gradients.kernels[0], gradients.kernels[1], loss.gan_max_weight
                )
                weights.append(loss.gan_weight * weight)
                metrics |= {"gan": gradients.values[1], "gan_weight": weights[1]}
            value = adversarial.weighted_loss(recon, gradients, weights)
            for name, part in aux["losses"].items():
                value += loss[f"{name}_weight"] * part
                metrics[name] = part
            # Of each bit; the log interval's mean shows the bits that never change.
            metrics["bits_mean"] = aux["bits"].mean((0, 1, 2))
            return value, (recon, metrics, stats)

        (value, (recon, metrics, stats)), gradient = jax.value_and_grad(total, has_aux=True)(
            state.params["model"]
        )
        params, opt = dict(state.params), dict(state.opt)
        self._update(params, opt, "model", gradient)
        if adversarial_stage:
            recon = jax.lax.stop_gradient(recon)
            pair_loss, stats, gradient = self._discriminator_gradient(
                state.params, stats, images, recon, keys["pair"]
            )
            metrics["discriminator"] = pair_loss
            self._update(params, opt, "discriminator", gradient)
        o = self.config.optim
        ema = ema_update(state.ema, params["model"], state.step, o.ema, o.ema_every)
        metrics["loss"] = value
        return TrainState(state.step + 1, params, opt, ema, stats), metrics

    def summarise(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        """Returns the scalars of a log interval, with how much of the code is in use."""
        p = metrics.pop("bits_mean")
        scalars = {name: float(value) for name, value in metrics.items()}
        used = (p > 0) & (p < 1)
        q = np.clip(p, 1e-12, 1 - 1e-12)
        entropy = -(q * np.log2(q) + (1 - q) * np.log2(1 - q)) * used
        return {**scalars, "bits_used": float(used.mean()), "bits_entropy": float(entropy.mean())}

    def preview(self, state: TrainState, batch: dict) -> dict[str, np.ndarray]:
        """Returns pictures of the averaged model: pairs of rows, images above reconstructions."""
        images = np.asarray(batch["image"])
        recon = np.asarray(self._reconstruct(state.ema, images))
        return {"reconstructions": paired_grid(images, recon, 16)}

    @functools.cached_property
    def _reconstruct(self):
        def reconstruct(params, images):
            bits = self.module.apply({"params": params}, from_uint8(images), method="encode")
            return to_uint8(self.module.apply({"params": params}, bits, method="decode"))

        return jax.jit(reconstruct)

    def _update(self, params: dict, opt: dict, name: str, gradient: PyTree) -> None:
        updates, opt[name] = self.optimiser.update(gradient, opt[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)

    def _reconstruction_loss(self, frozen, images, recon):
        """-> the scalar and its parts, in the model's own pixel range."""
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
        """-> logits of the discriminator and its moved batch statistics."""
        if self.config.loss.gan_augment:
            images = diff_augment((images + 1) / 2, key) * 2 - 1
        variables = {"params": params["discriminator"], "batch_stats": stats["discriminator"]}
        logits, moved = self.discriminator.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return logits, moved["batch_stats"]

    def _fool_loss(self, params, stats, recon, key):
        logits, moved = self._judge(params, stats, recon, key)
        return adversarial.generator_loss(logits), moved

    def _discriminator_gradient(self, params, stats, images, recon, key):
        real_key, fake_key = jax.random.split(key)

        def pair_loss(discriminator):
            moving = dict(stats)
            own = {"discriminator": discriminator}
            real, moving["discriminator"] = self._judge(own, moving, images, real_key)
            fake, moving["discriminator"] = self._judge(own, moving, recon, fake_key)
            return adversarial.hinge_discriminator_loss(real, fake), moving

        (value, moved), gradient = jax.value_and_grad(pair_loss, has_aux=True)(
            params["discriminator"]
        )
        return value, moved, gradient
