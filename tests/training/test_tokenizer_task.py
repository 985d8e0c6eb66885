"""One training task for every family: a small module that can be each kind of tokenizer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bitgen import build, config
from bitgen.errors import UserError
from bitgen.runtime.mesh import make_mesh, replicated, to_device
from bitgen.training.checkpoint import Checkpoints
from bitgen.training.state import with_leaves
from bitgen.training.tokenizer_task import LECAM_DECAY, TokenizerTask


class Norm(nn.Module):
    """Batch norm whose statistics are parameters; new values go to the collection "moved"."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.param("mean", nn.initializers.zeros, (x.shape[-1],))
        if train:
            batch = x.mean((0, 1, 2))
            self.sow("moved", "mean", jax.lax.stop_gradient(0.9 * mean + 0.1 * batch))
            mean = batch
        return x - mean.reshape(1, 1, 1, -1)


class Tiny(nn.Module):
    """Two convolutions around signs: bits of one scale or two, or none at all."""

    channels: int = 3
    image_size: int = 16
    code: str = "one"  # one | scales | continuous
    norm: bool = False
    loss: str = "commitment"
    image_scale: float = 1.0
    dtype: Any = jnp.float32

    grid = (8, 8)
    bits = 4
    last_layer = ("decoder", "last")

    def setup(self):
        self.encoder = nn.Conv(4, (2, 2), strides=2)
        self.norm_in = Norm() if self.norm else None
        self.decoder = Decoder()

    def latents(self, images, train=False):
        x = self.encoder(images)
        return x if self.norm_in is None else self.norm_in(x, train)

    def encode(self, images):
        x = self.latents(images)
        return x if self.code == "continuous" else x > 0

    def decode(self, bits):
        return self.decoder(bits if self.code == "continuous" else jnp.where(bits, 1.0, -1.0))[0]

    def __call__(self, images, *, train):
        x = self.latents(images, train)
        bits = x > 0
        aux: dict[str, Any] = {"losses": {}}
        if self.code != "continuous":
            signs = jnp.where(bits, 1.0, -1.0)
            aux["losses"] = {self.loss: jnp.mean(jnp.square(x - signs))}
            aux["bits"] = (bits[:, :1, :1], bits) if self.code == "scales" else bits
            x = x + jax.lax.stop_gradient(signs - x)
        recon, aux["last_input"] = self.decoder(x)
        return recon, aux


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.repeat(jnp.repeat(nn.tanh(nn.Dense(8, name="dense")(x)), 2, 1), 2, 2)
        return nn.Conv(3, (5, 5), name="last")(x), x


@pytest.fixture
def make(monkeypatch):
    """Returns a function: fields of the module and settings -> task and its first state."""
    monkeypatch.setitem(build.TOKENIZERS, "tiny", Tiny)

    def make(settings=None, **fields):
        c = config.tokenizer("tiny", **fields)
        c.loss.perceptual_weight = c.loss.gan_weight = 0.0
        c.loss.gan_start = 0
        c.loss.discriminator_width, c.loss.discriminator_layers = 8, 1
        c.optim.lr, c.optim.weight_decay, c.optim.ema = 1e-2, 0.1, 0.9
        c.update_from_flattened_dict(settings or {})
        task = TokenizerTask(c)
        return task, jax.jit(task.init)(jax.random.key(0))

    return make


def batch_of(size: int = 16) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (size, 16, 16, 3))
    return {"image": pixels.astype(np.uint8)}


def step(task, state, batch=None, stage=False):
    run = jax.jit(task.step, static_argnums=4)
    return run(state, {}, batch or batch_of(), jax.random.key(1), stage)


def test_parts_take_the_step_of_the_whole_on_eight_devices(make):
    mesh = make_mesh()
    results = []
    for parts in (1, 4):
        task, state = make({"train.accumulate": parts})
        state = jax.device_put(state, replicated(mesh))
        results.append(step(task, state, to_device(batch_of(32), mesh)))
    (one, one_metrics), (four, four_metrics) = results
    assert one_metrics.keys() == four_metrics.keys()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        (one_metrics, one.opt),  # with the moments, and so the gradients
        (four_metrics, four.opt),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        (one.params, one.ema),
        (four.params, four.ema),
    )


def test_parts_with_a_discriminator(make):
    settings = {"loss.gan_weight": 1.0, "loss.lecam_weight": 0.1, "train.accumulate": 4}
    task, state = make(settings, norm=True)
    after, metrics = step(task, state, stage=True)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))
    for name in ("model", "discriminator"):
        assert not jax.tree.all(
            jax.tree.map(np.array_equal, after.params[name], state.params[name])
        )
        counts = [x for x in jax.tree.leaves(after.opt[name]) if x.dtype == jnp.int32]
        assert counts
        assert all(count == 1 for count in counts)
    moved = jax.tree.map(np.array_equal, after.stats, state.stats)
    assert not any(jax.tree.leaves(moved))


@pytest.mark.parametrize("stage", [False, True])
def test_frozen_parts_keep_every_bit(make, stage):
    settings = {"train.freeze": ("^encoder/", "^norm_in/"), "loss.gan_weight": 1.0}
    task, start = make(settings, norm=True)
    images = batch_of()["image"] / np.float32(127.5) - 1
    state = start
    for _ in range(3):
        state, _ = step(task, state, stage=stage)
    for tree in (state.params["model"], state.ema):
        for name in ("encoder", "norm_in"):
            jax.tree.map(np.testing.assert_array_equal, tree[name], start.params["model"][name])
        changed = jax.tree.map(lambda a, b: (a != b).any(), tree, start.params["model"])
        assert all(jax.tree.leaves(changed["decoder"]))
        bits = [
            task.module.apply({"params": p}, images, method="encode")
            for p in (tree, start.params["model"])
        ]
        np.testing.assert_array_equal(*bits)


def test_a_state_with_frozen_parts_and_lecam_is_saved_and_restored(make, tmp_path):
    settings = {"train.freeze": ("^encoder/",), "loss.gan_weight": 1.0, "loss.lecam_weight": 0.1}
    task, state = make(settings)
    state = jax.tree.map(lambda x: x + 1, state)
    for _ in range(2):  # saved, then found there
        checkpoints = Checkpoints(tmp_path, task.config.to_dict(), 1)
        if checkpoints.latest is None:
            checkpoints.save(1, state, {"next_example": 8})
        else:
            restored, position = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
            jax.tree.map(np.testing.assert_array_equal, restored, state)
            assert position == {"next_example": 8}
        checkpoints.close()


def test_a_pattern_that_freezes_nothing_is_an_error(make):
    with pytest.raises(UserError, match=r"'\^quantizer/' matches no parameter"):
        make({"train.freeze": ("^quantizer/",)})


def test_lecams_averages_move_towards_the_mean_logits(make):
    settings = {"loss.gan_weight": 1.0, "loss.lecam_weight": 10.0}
    task, state = make(settings)
    running = {"real": jnp.float32(3.0), "fake": jnp.float32(-2.0)}
    state = state.replace(stats={**state.stats, "lecam": running})
    after, metrics = step(task, state, stage=True)
    for name, old in running.items():
        expected = LECAM_DECAY * old + (1 - LECAM_DECAY) * metrics[f"logits_{name}"]
        np.testing.assert_allclose(after.stats["lecam"][name], expected, rtol=1e-6)
    assert metrics["lecam"] > 1  # fake logits are below 3
    plain, _ = make({"loss.gan_weight": 1.0})
    without = state.replace(stats={"discriminator": state.stats["discriminator"]})
    other, other_metrics = step(plain, without, stage=True)
    assert "lecam" not in other_metrics
    np.testing.assert_allclose(metrics["discriminator"], other_metrics["discriminator"], rtol=1e-5)
    same = jax.tree.map(
        np.array_equal, after.params["discriminator"], other.params["discriminator"]
    )
    assert not all(jax.tree.leaves(same))


def test_bits_of_one_scale_two_or_none(make):
    images = batch_of()["image"] / np.float32(127.5) - 1
    for code in ("one", "scales", "continuous"):
        task, state = make(code=code)
        apply = {"params": state.params["model"]}
        picture = task.preview(state, batch_of())
        assert "bits" not in picture  # nothing is measured yet
        bits = np.asarray(task.module.apply(apply, images, method="encode"))
        after, metrics = step(task, state)
        means = np.asarray(metrics.get("bits_mean", 0))
        scalars = task.summarise({name: np.asarray(x) for name, x in metrics.items()})
        if code == "continuous":
            assert not [name for name in scalars if name.startswith("bits")]
            assert list(task.preview(after, batch_of())) == ["reconstructions"]
            continue
        # Of all tokens of all scales: the first token of each image is there twice.
        tokens = bits.reshape(-1, 4)
        if code == "scales":
            tokens = np.concatenate([tokens, bits[:, 0, 0]])
        np.testing.assert_allclose(means, tokens.mean(0), rtol=1e-6)
        assert scalars["bits_used"] + scalars["bits_dead"] / 4 == 1
        height, width, _ = task.preview(after, batch_of())["bits"].shape
        assert width >= 4 * 16
        assert height > 100


def test_dead_bits_are_counted(make):
    task, _ = make()
    means = np.array([0.0, 0.5, 1.0, 0.25], np.float32)
    scalars = task.summarise({"loss": np.float32(1), "bits_mean": means})
    assert (scalars["bits_used"], scalars["bits_dead"]) == (0.5, 2.0)
    entropy = 1 + 2 * 0.25 - 0.75 * np.log2(0.75)
    assert scalars["bits_entropy"] == pytest.approx(entropy / 4)


@pytest.mark.parametrize("parts", [1, 4])
def test_moved_statistics_become_parameters(make, parts):
    task, state = make({"train.accumulate": parts}, norm=True)
    model = state.params["model"]
    model = {**model, "norm_in": {"mean": jnp.arange(4.0)}}
    state = state.replace(params={"model": model}, ema=model)
    after, _ = step(task, state)
    images = batch_of()["image"] / np.float32(127.5) - 1
    hidden = nn.Conv(4, (2, 2), strides=2).apply({"params": model["encoder"]}, images)
    expected = 0.9 * np.arange(4.0) + 0.1 * np.asarray(hidden).mean((0, 1, 2))
    # Neither weight decay nor the optimiser has a part in it, and parts move them once.
    np.testing.assert_allclose(after.params["model"]["norm_in"]["mean"], expected, atol=1e-5)
    average = 0.9 * np.arange(4.0) + 0.1 * expected
    np.testing.assert_allclose(after.ema["norm_in"]["mean"], average, atol=1e-5)


def test_with_leaves_keeps_the_others_and_the_dtype():
    tree = {"a": {"x": jnp.zeros(2), "y": jnp.ones(2)}, "b": jnp.ones(1)}
    got = with_leaves(tree, {"a": {"x": jnp.array([3, 4])}})
    np.testing.assert_array_equal(got["a"]["x"], [3, 4])
    assert got["a"]["x"].dtype == jnp.float32
    assert got["a"]["y"] is tree["a"]["y"]
    assert got["b"] is tree["b"]


def test_losses_on_the_code_have_weights(make):
    values = []
    for weight in (0.0, 1.0):
        task, state = make({"loss.commitment_weight": weight})
        _, metrics = step(task, state)
        values.append(metrics)
    difference = values[1]["loss"] - values[0]["loss"]
    np.testing.assert_allclose(difference, values[0]["commitment"], rtol=1e-4)
    task, state = make(loss="surprise")
    message = "tiny has a loss 'surprise' without a weight: set config.loss.surprise_weight"
    with pytest.raises(UserError, match=message):
        step(task, state)


def test_the_adaptive_weight_knows_the_last_layer(make):
    """Against the gradients of both losses at a 5x5 kernel."""
    task, state = make({"loss.gan_weight": 0.7, "loss.gan_max_weight": 1e3})
    _, metrics = step(task, state, stage=True)
    images = jnp.asarray(batch_of()["image"] / np.float32(127.5) - 1)
    model, discriminator = state.params["model"], state.params["discriminator"]

    def losses(kernel, fool):
        last = {**model["decoder"]["last"], "kernel": kernel}
        params = {**model, "decoder": {**model["decoder"], "last": last}}
        recon, _ = task.module.apply({"params": params}, images, train=False)
        if not fool:
            return jnp.abs(recon - images).mean()
        variables = {"params": discriminator, "batch_stats": state.stats["discriminator"]}
        return -task.discriminator.apply(variables, recon, train=True).mean()

    kernel = model["decoder"]["last"]["kernel"]
    assert kernel.shape[:2] == (5, 5)
    norms = [jnp.linalg.norm(jax.grad(losses)(kernel, fool).ravel()) for fool in (False, True)]
    assert metrics["gan_weight"] == pytest.approx(
        float(0.7 * norms[0] / (norms[1] + 1e-4)), rel=1e-3
    )
