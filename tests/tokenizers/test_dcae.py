"""DC-AE and the convolutional baseline: latents, bits, batch norms, attention, other layouts."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from helpers import tokenizers
from helpers.synthetic import load_golden, synthetic_state_dict, synthetic_tensor
from helpers.tokenizers import CONV_AE, apply, random_params
from helpers.tokenizers import DCAE as SMALL
from helpers.tokenizers import DCAE_OTHER as OTHER

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

LAYOUTS = ("efficientvit", "diffusers")


@pytest.fixture(scope="module")
def small():
    return tokenizers.case("dcae", SMALL)


def test_last_layer_gradients_through_a_shuffle(small):
    module, params, images = small
    weights = jax.random.normal(jax.random.key(5), images.shape)
    recon, aux = apply(module, params, images, train=False)
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
    module, params, images = small if family == "dcae" else tokenizers.case(family, CONV_AE)
    latents = apply(module, params, images, method="encode")
    module = module.clone(quantizer=quantizer)
    bits = apply(module, params, images, method="encode")
    np.testing.assert_array_equal(bits, latents > 0)
    _, aux = apply(module, params, images, train=False)
    decoded = apply(module, params, bits, method="decode")
    codes = {"bernoulli": bits, "sign": 2.0 * bits - 1, "spherical": 2.0 * bits - 1}[quantizer]
    codes = codes / (module.bits**0.5 if quantizer == "spherical" else 1)
    same = apply(module.clone(quantizer="none"), params, codes, method="decode")
    np.testing.assert_allclose(decoded, same, atol=1e-5)
    names = {"code"} if quantizer == "bernoulli" else {"entropy", "commitment"}
    assert aux["losses"].keys() == names
    assert all(np.isfinite(x) for x in aux["losses"].values())


def test_only_bernoulli_bits_have_probabilities(small):
    module, params, images = small
    with pytest.raises(UserError, match="quantizer 'sign' has no bit probabilities"):
        apply(module.clone(quantizer="sign"), params, images, method="probs")


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
    _, moved = apply(module, params, images, train=True, mutable=("moved",))
    moved, leaves = flatten_dict(moved["moved"]), flatten_dict(params)
    assert moved.keys() == {path for path in leaves if path[-1] in ("mean", "var")}
    assert len(moved) == 2  # the scanned stage of the decoder
    for path, value in moved.items():
        assert value.shape == leaves[path].shape
        assert (np.abs(value - leaves[path]).max(-1) > 1e-4).all()


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


def test_bfloat16_attention_sums_in_float32():
    text = str(
        jax.make_jaxpr(dcae_blocks.relu_attention)(*[jnp.zeros((1, 64, 1, 32), jnp.bfloat16)] * 3)
    )
    assert "f32[1,1,32,32]" in text
    assert "bf16[1,1,32,32]" not in text


# Settings


def test_conv_ae_has_the_sizes_of_the_baseline():
    module = ConvAutoencoder()
    sizes = jax.tree.map(lambda x: x.size, build.param_shapes(module))
    linear = 20 * 20 * 48 * 128
    assert sizes["linear_in"] == {"kernel": linear, "bias": 128}
    assert sizes["linear_out"] == {"kernel": linear, "bias": 20 * 20 * 48}
    assert sum(jax.tree.leaves(sizes)) == 5_053_491


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
    ours = apply(module, params, z, method="decode")
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
