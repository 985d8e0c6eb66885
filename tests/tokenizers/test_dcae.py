"""DC-AE and the convolutional baseline: latents, bits, batch norms, attention, other layouts."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from helpers.synthetic import load_golden, synthetic_state_dict, synthetic_tensor

from bitgen import build
from bitgen.convert import dcae
from bitgen.convert.directory import export_file, import_file
from bitgen.convert.files import open_tensors
from bitgen.convert.rules import export_tensors, import_tensors
from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.losses.adversarial import last_layer_gradients
from bitgen.nn.norms import BatchNorm
from bitgen.nn.shuffle import average_channels, pixel_shuffle, pixel_unshuffle, repeat_channels
from bitgen.tokenizers import dcae_blocks
from bitgen.tokenizers.conv_ae import ConvAutoencoder
from bitgen.tokenizers.dcae import DCAE

SMALL = {
    "image_size": 8,
    "latent_channels": 8,
    "encoder_widths": (32, 32, 32),
    "encoder_depths": (0, 2, 1),
    "encoder_blocks": ("res", "res", "attention"),
    "encoder_norms": ("rms",) * 3,
    "encoder_activations": ("silu",) * 3,
    "decoder_widths": (32, 32, 32),
    "decoder_depths": (0, 2, 1),
    "decoder_blocks": ("res", "res", "attention"),
    "decoder_norms": ("batch", "batch", "rms"),
    "decoder_activations": ("relu", "relu", "silu"),
}
OTHER = {  # every word that SMALL has not
    **SMALL,
    "encoder_depths": (1, 1, 1),
    "encoder_blocks": ("res", "attention", "attention_5"),
    "encoder_activations": ("hard_swish", "gelu", "relu6"),
    "decoder_depths": (1, 1, 2),
    "decoder_norms": ("rms", "rms", "batch"),
    "decoder_blocks": ("res", "attention_5", "attention"),
    "downsample": "conv",
    "upsample": "interpolate",
}
LAYOUTS = ("efficientvit", "diffusers")


def random_params(module, seed=0):
    """Parameters with norms, biases and running statistics that are not 0 and 1."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name in ("kernel", "qkv"):
            start = -4 if leaf.ndim > 3 else -2
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[start:-1])))
        noise *= np.float32(0.1)
        return 1 + np.abs(noise) if name == "var" else noise + (name == "scale")

    return jax.tree_util.tree_map_with_path(one, build.param_shapes(module))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("method", "train", "moved"))
def _apply(module, params, x, key=None, *, method=None, train=None, moved=False):
    options = {} if train is None else {"train": train}
    options |= {"rngs": {"bits": key}} if key is not None else {}
    options |= {"mutable": ["moved"]} if moved else {}
    return module.apply({"params": params}, x, method=method, **options)


def pictures(module, seed=1, n=2):
    shape = (n, module.image_size, module.image_size, module.channels)
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1, maxval=1)


@pytest.fixture(scope="module")
def small():
    module = DCAE(**SMALL)
    return module, random_params(module), pictures(module)


def last_conv(module, params, aux):
    """What the last convolution makes of what entered it."""
    layer = params
    for name in module.last_layer:
        layer = layer[name]
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        aux["last_input"], layer["kernel"], (1, 1), "SAME", dimension_numbers=layout
    )
    return y + layer["bias"].reshape(1, 1, 1, -1)


@pytest.mark.parametrize(
    "module",
    [
        DCAE(**SMALL),
        DCAE(**OTHER),
        DCAE(**{**OTHER, "encoder_depths": (0, 1, 1), "decoder_depths": (0, 1, 1)}),
    ],
    ids=["small", "other", "without a first stage"],
)
def test_continuous_latents(module):
    params, images = random_params(module), pictures(module)
    latents = _apply(module, params, images, method="encode")
    assert latents.shape == (2, *module.grid, 8) == (2, 2, 2, 8)
    assert latents.dtype == jnp.float32
    decoded = _apply(module, params, latents, method="decode")
    assert decoded.shape == images.shape
    recon, aux = _apply(module, params, images, train=False)
    np.testing.assert_allclose(recon, decoded, atol=1e-5)
    assert aux.keys() == {"losses", "last_input"}
    assert aux["losses"] == {}
    assert module.bits == 0
    pixels = pixel_shuffle(last_conv(module, params, aux), module.last_shuffle)
    np.testing.assert_allclose(recon, module.image_scale * pixels, atol=1e-4)


def test_last_layer_gradients_through_a_shuffle(small):
    module, params, images = small
    weights = jax.random.normal(jax.random.key(5), images.shape)
    recon, aux = _apply(module, params, images, train=False)
    kernel = params["decoder"]["conv_out"]["kernel"]
    gradients = last_layer_gradients(
        [lambda y: (jnp.sum(weights * pixel_shuffle(y, module.last_shuffle) ** 2), {})],
        pixel_unshuffle(recon, module.last_shuffle),
        aux["last_input"],
        kernel_size=kernel.shape[:2],
        image_scale=module.image_scale,
    )

    @jax.jit
    @jax.grad
    def to_kernel(kernel):
        layer = {**params["decoder"]["conv_out"], "kernel": kernel}
        changed = {**params, "decoder": {**params["decoder"], "conv_out": layer}}
        recon, _ = module.apply({"params": changed}, images, train=False)
        return jnp.sum(weights * recon**2)

    np.testing.assert_allclose(gradients.kernels[0], to_kernel(kernel), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantizer", ["bernoulli", "sign", "spherical"])
@pytest.mark.parametrize("family", ["dcae", "conv_ae"])
def test_bits(small, family, quantizer):
    if family == "dcae":
        module, params, images = small
    else:
        module = ConvAutoencoder(image_size=8, widths=(4, 6), kernel=3, code=16)
        params, images = random_params(module), pictures(module)
    latents = _apply(module, params, images, method="encode")
    module = module.clone(quantizer=quantizer)
    bits = _apply(module, params, images, method="encode")
    assert bits.dtype == bool
    assert bits.shape == latents.shape == (2, *module.grid, module.bits)
    np.testing.assert_array_equal(bits, latents > 0)
    recon, aux = _apply(module, params, images, train=False)
    np.testing.assert_array_equal(aux["bits"], bits)
    decoded = _apply(module, params, bits, method="decode")
    np.testing.assert_allclose(recon, decoded, atol=1e-5)
    codes = {"bernoulli": bits, "sign": 2.0 * bits - 1, "spherical": 2.0 * bits - 1}[quantizer]
    codes = codes / (module.bits**0.5 if quantizer == "spherical" else 1)
    same = _apply(module.clone(quantizer="none"), params, codes, method="decode")
    np.testing.assert_allclose(decoded, same, atol=1e-5)
    names = {"code"} if quantizer == "bernoulli" else {"entropy", "commitment"}
    assert aux["losses"].keys() == names
    assert all(np.isfinite(x) for x in aux["losses"].values())


@pytest.mark.parametrize("quantizer", ["bernoulli", "sign"])
def test_gradient_is_straight_through(quantizer):
    module = ConvAutoencoder(image_size=8, widths=(4, 6), kernel=3, code=16)
    params, images = random_params(module), pictures(module)
    continuous, module = module, module.clone(quantizer=quantizer, deterministic=True)
    weights = jax.random.normal(jax.random.key(3), images.shape)

    def loss(p):
        return jnp.sum(module.apply({"params": p}, images, train=False)[0] * weights)

    def latents(p):
        z = continuous.apply({"params": p}, images, method="encode")
        return jax.nn.sigmoid(z) if quantizer == "bernoulli" else z

    bits = _apply(module, params, images, method="encode")
    codes = bits * (1.0 if quantizer == "bernoulli" else 2.0) - (quantizer == "sign")

    def decode(p, codes):
        return jnp.sum(continuous.apply({"params": p}, codes, method="decode") * weights)

    # By hand: the gradient that reaches the codes goes on to the encoder as it is.
    to_decoder, to_codes = jax.jit(jax.grad(decode, (0, 1)))(params, codes)
    to_encoder = jax.jit(lambda p, c: jax.vjp(latents, p)[1](c)[0])(params, to_codes)
    expected = flatten_dict(jax.tree.map(jnp.add, to_decoder, to_encoder))
    for path, leaf in flatten_dict(jax.jit(jax.grad(loss))(params)).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-3, atol=2e-3, err_msg=str(path))


def test_bernoulli_bits_are_drawn_with_their_probabilities(small):
    module, params, images = small
    module = module.clone(quantizer="bernoulli")
    probs = _apply(module, params, images, method="probs")

    @jax.jit
    @jax.vmap
    def draw(key):
        return _apply(module, params, images, key, train=True)[1]["bits"]

    # The encoder has no batch norms, so that training sees the same probabilities.
    drawn = draw(jax.random.split(jax.random.key(2), 400)).mean(0)
    assert np.abs(drawn - probs).max() < 5 * 0.5 / np.sqrt(400)
    with pytest.raises(UserError, match="quantizer 'sign' has no bit probabilities"):
        _apply(module.clone(quantizer="sign"), params, images, method="probs")


# Blocks


def test_batch_norm_moves_as_in_pytorch():
    rng = np.random.default_rng(0)
    theirs = torch.nn.BatchNorm2d(6).requires_grad_(False)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(theirs, name).copy_(torch.from_numpy(np.abs(rng.standard_normal(6))))
    words = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    params = {name: getattr(theirs, word).numpy().copy() for name, word in words.items()}
    norm, x = BatchNorm(), rng.standard_normal((3, 4, 2, 6)).astype(np.float32) * 2 + 1
    x_theirs = torch.from_numpy(x.transpose(0, 3, 1, 2))
    still = norm.apply({"params": params}, x, train=False)
    expected = theirs.eval()(x_theirs).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(still, expected, atol=1e-5)
    y, moved = norm.apply({"params": params}, x, train=True, mutable=["moved"])
    expected = theirs.train()(x_theirs).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert moved["moved"].keys() == {"mean", "var"}
    np.testing.assert_allclose(moved["moved"]["mean"], theirs.running_mean, atol=1e-6)
    np.testing.assert_allclose(moved["moved"]["var"], theirs.running_var, atol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_moved_statistics_have_the_paths_of_parameters(small, remat):
    module, params, images = small
    module = module.clone(remat=remat)
    _, moved = _apply(module, params, images, train=True, moved=True)
    moved, leaves = flatten_dict(moved["moved"]), flatten_dict(params)
    assert moved.keys() == {path for path in leaves if path[-1] in ("mean", "var")}
    assert len(moved) == 2  # the scanned stage of the decoder
    for path, value in moved.items():
        assert value.shape == leaves[path].shape
        assert (np.abs(value - leaves[path]).max(-1) > 1e-4).all()


def test_remat_changes_no_gradient(small):
    module, params, images = small

    def gradient(module):
        def loss(p):
            return jnp.mean(module.apply({"params": p}, images, train=True)[0] ** 2)

        return jax.jit(jax.grad(loss))(params)

    again = flatten_dict(gradient(module.clone(remat=True)))
    for path, leaf in flatten_dict(gradient(module)).items():
        np.testing.assert_allclose(leaf, again[path], rtol=1e-4, atol=1e-5, err_msg=str(path))
        assert np.abs(leaf).max() > 0 or path[-1] in ("mean", "var"), path


def test_quadratic_and_linear_attention_agree(monkeypatch):
    q, k, v = (
        jax.random.normal(key, (2, 7, 3, 5)) for key in jax.random.split(jax.random.key(0), 3)
    )
    q, k = jax.nn.relu(q), jax.nn.relu(k).at[0].set(0.0)  # where nothing matches, nothing is read
    a, b = dcae_blocks.quadratic(q, k, v), dcae_blocks.linear(q, k, v)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a[0], 0)
    # The number of tokens chooses.
    monkeypatch.setattr(dcae_blocks, "quadratic", lambda q, k, v: "pairs")
    monkeypatch.setattr(dcae_blocks, "linear", lambda q, k, v: "sums")
    chosen = [dcae_blocks.relu_attention(*[jnp.zeros((1, n, 1, 32))] * 3) for n in (32, 33)]
    assert chosen == ["pairs", "sums"]


def test_shuffles_have_the_channels_of_pytorch():
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float32)
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2))
    down = torch.nn.functional.pixel_unshuffle(theirs, 2).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(pixel_unshuffle(x, 2), down)
    np.testing.assert_array_equal(pixel_shuffle(pixel_unshuffle(x, 2), 2), x)
    means = down.reshape(2, 2, 3, 4, 8).mean(-1)
    np.testing.assert_allclose(average_channels(x, 4, 2), means, atol=1e-6)
    up = torch.nn.functional.pixel_shuffle(theirs.repeat_interleave(3, dim=1), 2)
    np.testing.assert_array_equal(repeat_channels(x, 6, 2), up.permute(0, 2, 3, 1))


def test_bfloat16_stays_close_and_keeps_float32_outside():
    module = DCAE(**{**SMALL, "image_size": 32})  # 64 tokens: sums
    params, images = random_params(module), pictures(module)
    whole, _ = _apply(module, params, images, train=False)
    half, aux = _apply(module.clone(dtype=jnp.bfloat16), params, images, train=False)
    assert half.dtype == jnp.float32
    assert aux["last_input"].dtype == jnp.bfloat16
    assert 0 < np.abs(whole - half).max() < 0.1 * np.abs(whole).max()
    text = str(
        jax.make_jaxpr(dcae_blocks.relu_attention)(*[jnp.zeros((1, 64, 1, 32), jnp.bfloat16)] * 3)
    )
    assert "f32[1,1,32,32]" in text
    assert "bf16[1,1,32,32]" not in text


# Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_depths": (0, 4)}, r"encoder_depths \(0, 4\) does not have one entry for each"),
        ({"decoder_norms": ("rms",)}, r"decoder_norms \('rms',\) does not have one entry"),
        ({"decoder_blocks": "res"}, "decoder_blocks 'res' does not have one entry"),
        ({"encoder_depths": (1, 0, 1)}, "blocks in each but the first"),
        ({"encoder_widths": (32, 32, 48)}, "48 of a stage of 'attention' blocks is no multiple"),
        ({"encoder_widths": (32, 96, 256)}, "between 96 and 256 channels needs a divisor of 384"),
        ({"latent_channels": 7}, "latent_channels 7 must divide the last of encoder_widths, 32"),
        ({"image_size": 10}, "image_size 10 is no multiple of 4"),
        ({"encoder_blocks": ("res", "conv", "res")}, "unknown block of encoder_blocks 'conv'"),
        ({"decoder_norms": ("rms", "rms", "bn2d")}, "unknown norm of decoder_norms 'bn2d'"),
        ({"downsample": "stride"}, "unknown downsample 'stride'"),
        ({"quantizer": "vq"}, r"unknown quantizer 'vq', have \['bernoulli', 'none'"),
        ({"quantizer": "sign", "group_size": 3}, "8 bits do not split into groups of group_size 3"),
        (
            {n: SMALL[n][1:] for n in SMALL if n.startswith("decoder")},
            "encoder_widths has 3 stages and decoder_widths 2",
        ),
    ],
)
def test_settings_that_make_no_model_are_named(fields, message):
    module = build.make_module("tokenizer", "dcae", {**SMALL, **fields})
    with pytest.raises(UserError, match=message) as error:
        build.param_shapes(module)
    assert "\n" not in str(error.value)


def test_images_that_do_not_divide_are_named(small):
    module, params, images = small
    with pytest.raises(UserError, match="7x8 pixels do not divide into cells of 4x4"):
        _apply(module, params, images[:, :7], method="encode")
    module = ConvAutoencoder(image_size=8, widths=(4,), kernel=4)
    with pytest.raises(UserError, match="conv_ae needs an odd kernel"):
        build.param_shapes(module)
    module = ConvAutoencoder(image_size=8, widths=(4,), kernel=3, code=16)
    with pytest.raises(UserError, match="image_size 8 got images of 7x8"):
        module.apply({"params": random_params(module)}, images[:, :7], method="encode")


def test_conv_ae_has_the_sizes_of_the_baseline():
    module = ConvAutoencoder()
    sizes = jax.tree.map(lambda x: x.size, build.param_shapes(module))
    linear = 20 * 20 * 48 * 128
    assert sizes["linear_in"] == {"kernel": linear, "bias": 128}
    assert sizes["linear_out"] == {"kernel": linear, "bias": 20 * 20 * 48}
    assert sum(jax.tree.leaves(sizes)) == 5_053_491
    small = ConvAutoencoder(image_size=8, widths=(4, 6), kernel=3, code=16)
    params, images = random_params(small), pictures(small)
    recon, aux = _apply(small, params, images, train=True)
    assert recon.shape == images.shape
    assert small.grid == (1, 1)
    np.testing.assert_allclose(recon, last_conv(small, params, aux), atol=1e-5)


def test_a_mirrored_layer_is_a_transposed_convolution():
    module = ConvAutoencoder(image_size=6, widths=(4,), kernel=3, code=8)
    params = random_params(module)
    z = np.random.default_rng(3).standard_normal((1, 1, 1, 8)).astype(np.float32)
    hidden = z.reshape(1, 8) @ params["linear_out"]["kernel"] + params["linear_out"]["bias"]
    hidden = torch.from_numpy(hidden.reshape(1, 4, 4, 4).transpose(0, 3, 1, 2).copy())
    # A transposed convolution reads its kernel flipped, [in, out, h, w].
    kernel = params["conv_out"]["kernel"][::-1, ::-1].transpose(2, 3, 0, 1).copy()
    theirs = torch.nn.functional.conv_transpose2d(
        hidden, torch.from_numpy(kernel), torch.from_numpy(params["conv_out"]["bias"].copy())
    )
    ours = _apply(module, params, z, method="decode")
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-5)


# Files


_ASSUMED = {  # which no file tells
    "encoder_activations": ("silu",) * 3,
    "decoder_activations": ("silu", "silu", "relu"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fields", [SMALL, {**OTHER, **_ASSUMED}], ids=["small", "other"])
def test_round_trip(fields, layout):
    module = build.make_module("tokenizer", "dcae", fields)
    target, params = build.param_shapes(module), random_params(module)
    tensors = dict(export_tensors(dcae.table(fields, layout), params, {}, fields, target))
    shapes = {name: x.shape for name, x in tensors.items()}
    assert dcae.wrapping(shapes) == {"layout": layout}
    found = dcae.recognise(shapes)
    assert found is not None
    ours = {name: value for name, value in fields.items() if name != "image_size"}
    # A first stage without blocks has no width.
    narrow = {n: (16, 32, 32) for n in ("encoder_widths", "decoder_widths") if fields is SMALL}
    assert {name: found[name] for name in ours} == {**ours, **narrow}
    imported, carried = import_tensors(dcae.table(fields, layout), tensors, target)
    flat = flatten_dict(imported)
    assert all(np.array_equal(flat[path], x) for path, x in flatten_dict(params).items())
    again = dict(export_tensors(dcae.table(fields, layout), imported, carried, fields, target))
    assert {n: x.tobytes() for n, x in again.items()} == {
        n: x.tobytes() for n, x in tensors.items()
    }


def test_a_stage_of_another_depth_is_named():
    params = random_params(DCAE(**{**SMALL, "encoder_depths": (0, 3, 1)}))
    with pytest.raises(UserError, match=r"our encoder/stage_1/conv1/bias \[3, 32\] for 2 slices"):
        export_tensors(dcae.table(SMALL), params, {}, SMALL)


def test_shortcuts_are_seen_in_names():
    names = ["downsample_shortcut", "upsample_shortcut", "encoder_out_shortcut"]
    for name in [*names, "decoder_in_shortcut"]:
        for fields in (SMALL, OTHER):
            fields = {**fields, name: False}
            target = build.param_shapes(build.make_module("tokenizer", "dcae", fields))
            params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), target)
            tensors = export_tensors(dcae.table(fields), params, {}, fields, target)
            found = dcae.recognise({n: x.shape for n, x in tensors})
            assert found is not None
            assert [n for n, x in found.items() if x is False] == [name]


def test_both_layouts_give_the_same_parameters(tmp_path):
    spec, _ = load_golden("dcae_tiny")
    hparams = dcae.hparams_from_reference(spec["hparams"])
    state = synthetic_state_dict(spec)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in state.items()}
    torch.save({"state_dict": tensors}, tmp_path / "a.pt")
    first = import_file(tmp_path / "a.pt", tmp_path / "a")
    assert first.info["family"] == "dcae"
    assert first.info["wrapping"] == {"layout": "efficientvit"}
    a = model_directory.load(tmp_path / "a", "tokenizer")
    target = build.param_shapes(build.make_module("tokenizer", "dcae", hparams))
    other = dict(export_tensors(dcae.table(hparams, "diffusers"), a.params, {}, hparams, target))
    assert other["encoder.down_blocks.2.0.attn.to_k.weight"].shape == (64, 64)
    qkv = state["encoder.stages.2.op_list.0.context_module.main.qkv.conv.weight"]
    keys = other["encoder.down_blocks.2.0.attn.to_k.weight"]
    np.testing.assert_array_equal(keys, qkv[64:128, :, 0, 0])

    from safetensors.numpy import save_file

    save_file(other, tmp_path / "b.safetensors")
    second = import_file(tmp_path / "b.safetensors", tmp_path / "b")
    assert second.info["wrapping"] == {"layout": "diffusers"}
    assert second.info["hparams"] == first.info["hparams"]
    b = model_directory.load(tmp_path / "b", "tokenizer")
    pairs = zip(*map(jax.tree.leaves, (a.params, b.params)), strict=True)
    assert all(np.array_equal(x, y) for x, y in pairs)
    export_file(tmp_path / "a", tmp_path / "c.pt")
    written = open_tensors(tmp_path / "c.pt")
    assert written.wrapped == "state_dict"
    assert written.keys() == state.keys()
    assert all(np.array_equal(written[n], x) for n, x in state.items())


def test_what_no_released_model_uses_is_refused():
    for words, message in (
        ({"encoder": {"double_latent": True}}, "double_latent True cannot be imported"),
        ({"encoder": {"out_norm": "trms2d"}}, "out_norm 'trms2d' cannot be imported"),
        ({"encoder": {"block_type": ["ResBlock", ["ResBlock"]]}}, "a stage of mixed blocks"),
        ({"decoder": {"norm": "ln2d"}}, "unknown word of a DC-AE configuration 'ln2d'"),
    ):
        with pytest.raises(UserError, match=message):
            dcae.hparams_from_reference(words)
    defaults = dcae.hparams_from_reference({})
    assert defaults["encoder_depths"] == (2,) * 6
    assert defaults["decoder_norms"] == ("rms",) * 6


@pytest.mark.parametrize("scales", [(), (5,)])
def test_diffusers_computes_the_same(tmp_path, scales):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        side = {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (32, 32, 64),
            "qkv_multiscales": ((), (), scales),
        }
        theirs = diffusers.AutoencoderDC(
            latent_channels=8,
            **{f"{name}_{word}": x for name in ("encoder", "decoder") for word, x in side.items()},
            encoder_layers_per_block=(len(scales), 2, 1),
            decoder_layers_per_block=(len(scales), 1, 2),
            decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
            decoder_act_fns=("relu", "relu", "silu"),
            downsample_block_type="conv" if scales else "pixel_unshuffle",
            upsample_block_type="interpolate" if scales else "pixel_shuffle",
        )
        state = {
            name: torch.from_numpy(
                np.asarray(synthetic_tensor(name, x.shape, str(x.numpy().dtype)))
            )
            for name, x in theirs.state_dict().items()
        }
        theirs.load_state_dict(state)
        theirs.eval().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    import_file(file, tmp_path / "ours")
    ours = model_directory.load(tmp_path / "ours", "tokenizer")
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 32)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.encode(torch.from_numpy(x)).latent
        images = theirs.decode(latents).sample

    def apply(method, x):
        x = jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))
        y = jax.jit(lambda p, x: ours.module.apply({"params": p}, x, method=method))(ours.params, x)
        return np.asarray(y).transpose(0, 3, 1, 2)

    np.testing.assert_allclose(apply("encode", x), latents, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(apply("decode", latents), images, rtol=2e-4, atol=2e-4)
