"""The discriminator, its losses, and the adaptive weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.arrays import close, images_like, nchw, nhwc
from helpers.synthetic import synthetic_tensor
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from bitgen.convert import patchgan
from bitgen.convert.rules import import_tensors
from bitgen.errors import UserError
from bitgen.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_layout,
    generator_loss,
    hinge_discriminator_loss,
    last_layer_gradients,
    lecam_loss,
    weighted_loss,
)
from bitgen.losses.augment import diff_augment


def torch_discriminator(width: int, layers: int) -> torch.nn.Sequential:
    modules = [torch.nn.Conv2d(3, width, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    before = width
    for i in range(1, layers + 1):
        features = width * min(2**i, 8)
        stride = 2 if i < layers else 1
        modules.append(torch.nn.Conv2d(before, features, 4, stride, 1, bias=False))
        modules += [torch.nn.BatchNorm2d(features), torch.nn.LeakyReLU(0.2)]
        before = features
    return torch.nn.Sequential(*modules, torch.nn.Conv2d(before, 1, 4, 1, 1))


def test_discriminator_tree_is_the_layout():
    shapes = jax.eval_shape(
        PatchDiscriminator().init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 64, 64, 3), "float32"),
    )
    layout = {name: kind for _, name, kind in discriminator_layout(3)}
    assert set(shapes["params"]) == set(layout)
    for name, kind in layout.items():
        has_bias = kind != "conv_no_bias"
        assert ("bias" in shapes["params"][name]) == has_bias
    assert shapes["params"]["conv_3"]["kernel"].shape == (4, 4, 256, 512)
    assert [index for index, _, _ in discriminator_layout(3)] == [0, 2, 3, 5, 6, 8, 9, 11]


def training_case(batch=8):
    """Our variables and PyTorch's network with the same weights, and images in [-1, 1]."""
    network, model = torch_discriminator(8, 2), PatchDiscriminator(8, 2)
    tensors = {
        name: torch.from_numpy(synthetic_tensor(name, x.shape, str(x.numpy().dtype)).copy())
        for name, x in network.state_dict().items()
    }
    network.load_state_dict(tensors)
    state = {f"main.{name}": x.numpy() for name, x in tensors.items()}
    images = images_like((batch, 16, 20, 3))
    target = jax.eval_shape(model.init, jax.random.key(0), images)
    variables, _ = import_tensors(patchgan.table({"width": 8, "layers": 2}, ""), state, target)
    return model, variables, network.train(), images


def test_training_mode_is_torchs():
    model, variables, network, images = training_case()

    def loss(params, images):
        logits, updates = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.square(logits)), (logits, updates["batch_stats"])

    gradient, (logits, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        variables["params"], images
    )
    pixels = nchw(images).requires_grad_()
    expected = network((pixels + 1) / 2)
    expected.square().mean().backward()

    close(logits, nhwc(expected.detach()), rtol=1e-4, atol=1e-5)
    close(gradient[1], nhwc(pixels.grad), rtol=1e-3, atol=1e-5)
    kernel = dict(network.named_parameters())["2.weight"].grad
    assert kernel is not None
    close(gradient[0]["conv_1"]["kernel"], kernel.permute(2, 3, 1, 0), rtol=1e-3, atol=1e-5)
    running = dict(network.named_buffers())
    for index, name, kind in discriminator_layout(2):
        if kind == "batch_norm":
            close(stats[name]["mean"], running[f"{index}.running_mean"], rtol=1e-4, atol=1e-5)
            close(stats[name]["var"], running[f"{index}.running_var"], rtol=1e-4, atol=1e-5)
            before = variables["batch_stats"][name]["var"]
            assert np.max(np.abs(stats[name]["var"] - before)) > 1e-3


def test_batch_norm_sees_the_global_batch():
    model, variables, _, images = training_case(batch=16)

    @jax.jit
    def run(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    # Images differ from device to device, so statistics of one shard would show.
    images = images * np.linspace(0.1, 1, 16, dtype=np.float32).reshape(-1, 1, 1, 1)
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    logits, stats = run(replicated, sharded)
    expected, expected_stats = run(variables, images)
    close(logits, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-6), stats, expected_stats)


def test_train_without_mutable_statistics_and_bfloat16():
    model, variables, _, images = training_case()
    expected = model.apply(variables, images, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_array_equal(model.apply(variables, images, train=True), expected)
    low = PatchDiscriminator(8, 2, dtype=jnp.bfloat16).apply(variables, images, train=True)
    assert low.dtype == jnp.float32
    close(low, expected, atol=0.1)


def test_losses_and_weights():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-2.0, 0.0, 0.5])
    assert hinge_discriminator_loss(real, fake) == pytest.approx(0.5 * (2.5 / 3 + 2.5 / 3))
    assert generator_loss(fake) == pytest.approx(0.5)
    recon, gan = jnp.array([3.0, 4.0]), jnp.array([6.0, 8.0])
    assert adaptive_weight(recon, gan, 1.0) == pytest.approx(5 / (10 + 1e-4))
    assert adaptive_weight(recon, gan, 0.25) == 0.25
    assert adaptive_weight(recon, 0 * gan, 1e6) == pytest.approx(5e4, rel=1e-5)
    assert adaptive_weight([recon, recon], {"a": gan}, 1.0) == pytest.approx(0.5**0.5, rel=1e-4)
    slope = jax.grad(lambda g: adaptive_weight(g, gan, 1.0))(recon)
    np.testing.assert_array_equal(slope, 0)


def test_lecam_is_the_papers_formula():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(0.5, 1, (2, 5, 5, 1)), rng.normal(-0.5, 1, (2, 5, 5, 1))
    expected = (np.maximum(real + 0.3, 0) ** 2).mean() + (np.maximum(0.8 - fake, 0) ** 2).mean()
    running = {"real": jnp.float32(0.8), "fake": jnp.float32(-0.3)}
    real, fake = jnp.asarray(real, jnp.float32), jnp.asarray(fake, jnp.float32)
    assert lecam_loss(real, fake, running) == pytest.approx(float(expected), rel=1e-5)
    assert lecam_loss(fake - 9, real + 9, running) == 0  # one-sided


@pytest.mark.parametrize("image_scale", [1.0, 2.0])
def test_last_layer_gradients(image_scale):
    target = images_like((2, 6, 5, 3), 1)
    params = {
        "below": images_like((4, 7), 2),
        "kernel": images_like((3, 3, 7, 3), 3),
        "bias": images_like((3,), 4),
    }
    inputs = images_like((2, 6, 5, 4), 5)

    def decode(params):
        hidden = jnp.tanh(inputs @ params["below"])
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            hidden, params["kernel"], (1, 1), "SAME", dimension_numbers=layout
        )
        return image_scale * (y + params["bias"].reshape(1, 1, 1, 3)) - 0.3, hidden

    def recon(images):
        return jnp.mean(jnp.square(images - target)), {"name": jnp.max(images)}

    def gan(images):
        return -jnp.mean(jnp.sin(3 * images)), {}

    def full(params, weight):
        images, _ = decode(params)
        return recon(images)[0] + weight * gan(images)[0]

    @jax.jit
    def step(params):
        images, hidden = decode(params)
        gradients = last_layer_gradients((recon, gan), images, hidden, image_scale=image_scale)
        weight = 0.7 * adaptive_weight(*gradients.kernels, maximum=1e3)
        return weighted_loss(images, gradients, (1.0, weight)), (gradients, weight)

    gradient, (parts, weight) = jax.grad(step, has_aux=True)(params)
    for loss, part, value in zip((recon, gan), parts.kernels, parts.values, strict=True):
        expected = jax.grad(lambda p, loss=loss: loss(decode(p)[0])[0])(params)["kernel"]
        close(part, expected, rtol=1e-4, atol=1e-6)
        assert value == pytest.approx(float(loss(decode(params)[0])[0]), rel=1e-5)
    assert parts.metrics[0]["name"] == jnp.max(decode(params)[0])
    assert 0 < weight < 1e3
    assert step(params)[0] == pytest.approx(float(full(params, weight)), rel=1e-5)
    expected = jax.grad(full)(params, weight)
    jax.tree.map(lambda a, b: close(a, b, rtol=1e-4, atol=1e-6), gradient, expected)


IMAGES = jnp.zeros((1, 32, 32, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PatchDiscriminator(layers=0).apply({}, IMAGES), "layers must be 1 or more, got 0"),
        (lambda: discriminator_layout(0), "layers must be 1 or more"),
        (lambda: PatchDiscriminator().apply({}, IMAGES[:, :23]), "at least 24 pixels a side"),
        (lambda: PatchDiscriminator().apply({}, IMAGES[..., :1]), r"\[b, H, W, 3\]"),
        (lambda: PatchDiscriminator(pixel_range=(1, 1)).apply({}, IMAGES), "is empty"),
        (lambda: diff_augment(IMAGES, jax.random.key(0), ["cutout"]), "unknown .*cutout.*color"),
        (lambda: diff_augment(IMAGES, jax.random.key(0), "color"), "unknown .*give a list"),
        (lambda: last_layer_gradients((), IMAGES, IMAGES[:, :16]), "hidden .* beside images"),
        (lambda: last_layer_gradients((), IMAGES, IMAGES, kernel_size=(2, 3)), "odd kernel_size"),
    ],
)
def test_messages(call, message):
    with pytest.raises(UserError, match=message):
        call()
