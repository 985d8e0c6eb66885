"""LPIPS against PyTorch, its weights under every published name, and every message to the user."""

import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.synthetic import load_golden, synthetic_state_dict

from bitgen.errors import UserError
from bitgen.losses.lpips import load_lpips, lpips_distance, lpips_shapes


def nhwc(array) -> jax.Array:
    return jnp.transpose(jnp.asarray(array), (0, 2, 3, 1))


@pytest.fixture(scope="module")
def lpips_state():
    spec, _ = load_golden("lpips_vgg16")
    state = synthetic_state_dict(spec)
    return {name: np.abs(x) if name.startswith("lin") else x for name, x in state.items()}


@pytest.fixture(scope="module")
def lpips_params(lpips_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "weights.pth"
    torch.save({name: torch.from_numpy(x) for name, x in lpips_state.items()}, path)
    return load_lpips(path)


def test_lpips_golden(lpips_params):
    _, arrays = load_golden("lpips_vgg16")
    x, y = nhwc(arrays["image0"]), nhwc(arrays["image1"])
    distance = jax.jit(lpips_distance)(lpips_params, x, y)
    np.testing.assert_allclose(distance, arrays["distance"], rtol=2e-4, atol=0)
    low = lpips_distance(lpips_params, x[:1], y[:1], dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, arrays["distance"][:1], rtol=0.03)


def test_lpips_gradient_is_finite(lpips_params):
    images = jnp.sin(jnp.arange(2.0 * 16 * 16 * 3)).reshape(2, 16, 16, 3)
    slope = jax.jit(jax.grad(lambda x, y, params: jnp.sum(lpips_distance(params, x, y))))
    gradient = slope(images, -images, lpips_params)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)
    assert np.all(np.abs(slope(images, images, lpips_params)) < 1e-8)
    # Features whose squares underflow have no length: sqrt must not make NaN of them.
    tiny = {"kernel": np.zeros((3, 3, 64, 64), np.float32), "bias": np.full(64, 1e-30, np.float32)}
    dead = {**lpips_params, "features_2": tiny}
    assert np.all(np.isfinite(slope(images, -images, dead)))


def small_file_state() -> dict[str, torch.Tensor]:
    """Torchvision's names with one number a tensor: `expand` keeps files on disk small."""
    spec, _ = load_golden("lpips_vgg16")
    return {
        name: torch.full((1,), float(i)).expand(shape)
        for i, (name, (shape, _)) in enumerate(spec["tensors"].items(), start=1)
    }


def taming(name: str) -> str:
    if not name.startswith("features."):
        return name
    index = int(name.split(".")[1])
    return name.replace("features", f"net.slice{1 + sum(index > n for n in (3, 8, 15, 22))}")


SCALING = {
    "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1),
    "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1),
}


def layout(kind: str) -> dict:
    state = small_file_state()
    ours = {taming(name): value for name, value in state.items()} | SCALING
    lins = {name.replace("lin", "lins."): ours[name] for name in ours if name.startswith("lin")}
    head = {"classifier.0.weight": torch.zeros(3, 4), "head.fc.bias": torch.zeros(3)}
    return {
        "taming": ours,
        "lpips": ours | lins,
        "no dropout": {name.replace("model.1", "model.0"): value for name, value in ours.items()},
        "torchvision": state | head,
        "b-ae": {f"perceptual.{name}": value for name, value in (ours | lins).items()}
        | {"ae.encoder.blocks.0.weight": torch.zeros(2), "disc.main.0.bias": torch.zeros(2)},
        "vqgan": {
            "state_dict": {f"loss.perceptual_loss.{name}": value for name, value in ours.items()}
            | {"encoder.conv_in.bias": torch.zeros(2)}
        },
    }[kind]


def check_small(params):
    shapes = lpips_shapes()
    assert jax.tree.map(np.shape, params) == shapes
    for number, name in enumerate(small_file_state(), start=1):
        kind, index, *rest = name.replace("lin", "lin.").split(".")
        leaf = "bias" if rest[0] == "bias" else "kernel"
        array = params[f"{kind}_{index}"][leaf]
        assert array.dtype == np.float32
        assert np.all(array == number), name


@pytest.mark.parametrize("kind", ["taming", "lpips", "no dropout", "torchvision", "b-ae", "vqgan"])
def test_load_lpips_layouts(kind, tmp_path):
    torch.save(layout(kind), tmp_path / "weights.th")
    check_small(load_lpips(str(tmp_path / "weights.th")))


def test_load_lpips_two_files_and_old_format(tmp_path):
    state = small_file_state() | {"classifier.6.bias": torch.zeros(3)}
    lins = {name: value for name, value in state.items() if name.startswith("lin")}
    rest = {name: value for name, value in state.items() if name not in lins}
    # The published files are older than PyTorch's zip format.
    old = {"_use_new_zipfile_serialization": False}
    torch.save(rest, tmp_path / "vgg16-397923af.pth", **old)
    with pytest.raises(
        UserError, match=r"no file .*vgg\.pth: put torchvision's vgg16-397923af.pth"
    ):
        load_lpips(tmp_path)
    torch.save(lins, tmp_path / "vgg.pth", **old)
    check_small(load_lpips(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_lpips_safetensors(dtype, tmp_path):
    from safetensors.torch import save_file

    state = {name: x.to(dtype).contiguous() for name, x in small_file_state().items()}
    save_file(state, tmp_path / "model.safetensors")
    check_small(load_lpips(tmp_path / "model.safetensors"))


def test_load_lpips_lists_every_fault(tmp_path):
    state = layout("lpips")
    del state["net.slice2.5.weight"]
    state["net.slice1.0.bias"] = torch.zeros(65)
    state["lins.3.model.1.weight"] = torch.zeros(1, 512, 1, 1)
    state["net.slice1.1.weight"] = state["surplus"] = torch.zeros(2)
    state["scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError) as error:
        load_lpips(tmp_path / "weights.pt")
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "weights.pt: ",
        "features.5.weight: missing",
        "net.slice1.0.bias: shape (65,) does not give (64,)",
        "lins.3.model.1.weight: differs from lin3.model.1.weight",
        "net.slice1.1.weight: unknown",
        "surplus: unknown",
        "scaling_layer.shift: not the constants",
        "config.loss.perceptual_weight=0",
    ):
        assert part in message
    assert "net.slice1.0.weight" not in message


def test_load_lpips_unreadable(tmp_path):
    cases = {
        "absent.pth": (None, "no file .*absent.pth"),
        "broken.pth": (b"not a checkpoint", "cannot read .*broken.pth"),
        "broken.safetensors": (b"not a checkpoint", "cannot read .*broken.safetensors"),
        "weights.npz": (b"", "is not a .pth"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message + ".*perceptual_weight=0"):
            load_lpips(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a state dict of tensors"):
        load_lpips(tmp_path / "list.pth")
    torch.save({"ae.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth holds no VGG16 or LPIPS tensor"):
        load_lpips(tmp_path / "other.pth")


def test_load_lpips_from_the_hub(tmp_path, monkeypatch):
    torch.save(layout("b-ae"), tmp_path / "file.th")
    asked = []

    def found(repository, file):
        asked.append((repository, file))
        return str(tmp_path / "file.th")

    def lost(repository, file):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found)
    check_small(load_lpips("hub"))
    assert asked == [("haoosz/BiGR", "bae/bae_d24/binaryae_ema_1000000.th")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lost)
    with pytest.raises(UserError, match=r"cannot get .* \(no network\): put .*vgg16-397923af.pth"):
        load_lpips("hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install"):
        load_lpips("hub")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install"):
        load_lpips(tmp_path / "file.th")


def test_lpips_messages():
    images = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(UserError, match="two equal shapes"):
        lpips_distance({}, images, images[:, :16])
    with pytest.raises(UserError, match=r"16 pixels a side.*perceptual_weight=0"):
        lpips_distance({}, images[:, :15], images[:, :15])
