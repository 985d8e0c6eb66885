"""The Inception network and its weights, against the original's code."""

import jax
import numpy as np
import pytest
from helpers.synthetic import synthetic_tensor

from bitgen.errors import UserError
from bitgen.evaluation.inception import ConvNorm, Inception, unit_names
from bitgen.evaluation.weights import _values, find_weights, load_inception

# TensorFlow's name of a convolution of each kind of place.
NAMES = {
    "Conv2d_1a_3x3": "conv",
    "Conv2d_4a_3x3": "conv_4",
    "Mixed_5b.branch1x1": "mixed/conv",
    "Mixed_5b.branch5x5_2": "mixed/tower/conv_1",
    "Mixed_5c.branch3x3dbl_3": "mixed_1/tower_1/conv_2",
    "Mixed_5d.branch_pool": "mixed_2/tower_2/conv",
    "Mixed_6a.branch3x3": "mixed_3/conv",
    "Mixed_6a.branch3x3dbl_1": "mixed_3/tower/conv",
    "Mixed_6d.branch1x1": "mixed_6/conv",
    "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
    "Mixed_7a.branch3x3_1": "mixed_8/tower/conv",
    "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
    "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
    "Mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv",
    "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
}


class TorchInception:
    """The network in PyTorch's functions; it makes its weights as it goes, and keeps both."""

    def __init__(self):
        self.state, self.outputs = {}, {}

    def __call__(self, x):
        """Returns pool [b, 2048] of x [b, 3, 299, 299]."""
        import torch
        from torch.nn import functional as F

        def average(x):
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

        conv = self.conv
        x = conv(x, "Conv2d_1a_3x3", 32, 3, stride=2, same=False)
        x = conv(x, "Conv2d_2a_3x3", 32, 3, same=False)
        x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", 64, 3), 3, 2)
        x = conv(x, "Conv2d_3b_1x1", 80, 1)
        x = F.max_pool2d(conv(x, "Conv2d_4a_3x3", 192, 3, same=False), 3, 2)
        for name, pool in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            a = conv(x, f"{name}.branch1x1", 64, 1)
            b = conv(conv(x, f"{name}.branch5x5_1", 48, 1), f"{name}.branch5x5_2", 64, 5)
            c = conv(conv(x, f"{name}.branch3x3dbl_1", 64, 1), f"{name}.branch3x3dbl_2", 96, 3)
            c = conv(c, f"{name}.branch3x3dbl_3", 96, 3)
            x = torch.cat([a, b, c, conv(average(x), f"{name}.branch_pool", pool, 1)], 1)
        a = conv(x, "Mixed_6a.branch3x3", 384, 3, stride=2, same=False)
        b = conv(conv(x, "Mixed_6a.branch3x3dbl_1", 64, 1), "Mixed_6a.branch3x3dbl_2", 96, 3)
        b = conv(b, "Mixed_6a.branch3x3dbl_3", 96, 3, stride=2, same=False)
        x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)
        for name, width in zip("bcde", (128, 160, 160, 192), strict=True):
            name = f"Mixed_6{name}.branch"
            a = conv(x, f"{name}1x1", 192, 1)
            b = conv(conv(x, f"{name}7x7_1", width, 1), f"{name}7x7_2", width, (1, 7))
            b = conv(b, f"{name}7x7_3", 192, (7, 1))
            c = conv(conv(x, f"{name}7x7dbl_1", width, 1), f"{name}7x7dbl_2", width, (7, 1))
            c = conv(conv(c, f"{name}7x7dbl_3", width, (1, 7)), f"{name}7x7dbl_4", width, (7, 1))
            c = conv(c, f"{name}7x7dbl_5", 192, (1, 7))
            x = torch.cat([a, b, c, conv(average(x), f"{name}_pool", 192, 1)], 1)
        a = conv(x, "Mixed_7a.branch3x3_1", 192, 1)
        a = conv(a, "Mixed_7a.branch3x3_2", 320, 3, stride=2, same=False)
        b = conv(conv(x, "Mixed_7a.branch7x7x3_1", 192, 1), "Mixed_7a.branch7x7x3_2", 192, (1, 7))
        b = conv(b, "Mixed_7a.branch7x7x3_3", 192, (7, 1))
        b = conv(b, "Mixed_7a.branch7x7x3_4", 192, 3, stride=2, same=False)
        x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)
        for name in ("Mixed_7b.branch", "Mixed_7c.branch"):
            a = conv(x, f"{name}1x1", 320, 1)
            b = conv(x, f"{name}3x3_1", 384, 1)
            b = [
                conv(b, f"{name}3x3_2a", 384, (1, 3)),
                conv(b, f"{name}3x3_2b", 384, (3, 1)),
            ]
            c = conv(conv(x, f"{name}3x3dbl_1", 448, 1), f"{name}3x3dbl_2", 384, 3)
            c = [
                conv(c, f"{name}3x3dbl_3a", 384, (1, 3)),
                conv(c, f"{name}3x3dbl_3b", 384, (3, 1)),
            ]
            pooled = average(x) if "7b" in name else F.max_pool2d(x, 3, 1, 1)
            x = torch.cat([a, *b, *c, conv(pooled, f"{name}_pool", 192, 1)], 1)
        for name, shape in (("fc.weight", (1008, 2048)), ("fc.bias", (1008,))):
            self.state[name] = torch.tensor(synthetic_tensor(name, shape))
        return x.mean((2, 3))

    def conv(self, x, name, width, kernel, stride=1, same=True):
        import torch
        from torch.nn import functional as F

        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        shapes = {"conv.weight": (width, x.shape[1], *kernel)}
        shapes |= {f"bn.{n}": (width,) for n in ("weight", "bias", "running_mean", "running_var")}
        made = {n: torch.tensor(synthetic_tensor(f"{name}.{n}", s)) for n, s in shapes.items()}
        self.state |= {f"{name}.{n}": value for n, value in made.items()}
        padding = (kernel[0] // 2, kernel[1] // 2) if same else 0
        y = F.conv2d(x, 2 * made["conv.weight"], stride=stride, padding=padding)
        self.state[f"{name}.conv.weight"] = 2 * made["conv.weight"]  # or deep layers would fade
        y = F.batch_norm(
            y,
            made["bn.running_mean"],
            made["bn.running_var"],
            made["bn.weight"],
            made["bn.bias"],
            eps=1e-3,
        )
        self.outputs[name] = y = F.relu(y)
        return y


@pytest.fixture(scope="module")
def network():
    """The PyTorch network, its image [1, 299, 299, 3] and what it made of it."""
    import torch

    image = np.random.default_rng(0).uniform(-1, 1, (1, 299, 299, 3)).astype(np.float32)
    network, threads = TorchInception(), torch.get_num_threads()
    torch.set_num_threads(1)  # ten times as fast beside other work
    with torch.no_grad():
        pool = network(torch.tensor(image.transpose(0, 3, 1, 2)))
    torch.set_num_threads(threads)
    return network, image, pool.numpy()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    """The same weights in the three layouts that are published."""
    import torch

    folder, state = tmp_path_factory.mktemp("inception"), network[0].state
    torch.save(state, folder / "weights-inception.pth")
    counters = {f"{n}.bn.num_batches_tracked": torch.tensor(0) for n, _ in unit_names()}
    old = {"_use_new_zipfile_serialization": False}
    torch.save({**state, **counters}, folder / "pt_inception.pth", **old)
    (folder / "graph.pb").write_bytes(frozen_graph(state))
    return sorted(folder.iterdir())


def frozen_graph(state) -> bytes:
    """A GraphDef with the weights as constants, among other nodes, as TensorFlow writes it."""
    import tensorflow as tf

    graph = tf.compat.v1.GraphDef()
    norms = {"weight": "gamma", "bias": "beta"}
    norms |= {"running_mean": "moving_mean", "running_var": "moving_variance"}

    def add(name, value):
        node = graph.node.add(name=name, op="Const")
        node.attr["dtype"].type = 1
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))

    graph.node.add(name="ExpandDims", op="ExpandDims", input=["Cast", "dim"])
    add("ExpandDims/dim", np.int32(0))
    for torch_name, name in unit_names():
        kernel = state[f"{torch_name}.conv.weight"].numpy()
        add(f"{name}/conv2d_params", np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)))
        for there, here in norms.items():
            add(f"{name}/batchnorm/{here}", state[f"{torch_name}.bn.{there}"].numpy())
        graph.node.add(name=name, op="Relu", input=[f"{name}/batchnorm"])
    add("softmax/weights", np.ascontiguousarray(state["fc.weight"].numpy().T))
    add("softmax/biases", state["fc.bias"].numpy())
    # TensorFlow also lists values, and leaves out those that repeat.
    tensor = next(n for n in graph.node if n.name.endswith("/beta")).attr["value"].tensor
    tensor.float_val.extend(np.frombuffer(tensor.tensor_content, np.float32))
    tensor.tensor_content = b""
    return graph.SerializeToString()


def close(ours, theirs, name):
    """Relative to the largest value of a layer."""
    assert ours.shape == theirs.shape, name
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error < 1e-4, f"{name}: {error}"


def test_every_layer_is_the_original(network, files):
    reference, image, pool = network
    params = load_inception(files[-1])
    features, kept = jax.jit(
        lambda p, x: Inception().apply(
            {"params": p},
            x,
            capture_intermediates=lambda module, _: isinstance(module, ConvNorm),
            mutable=["intermediates"],
        )
    )(params, image)
    for name, theirs in reference.outputs.items():
        (ours,) = kept["intermediates"][name.replace(".", "_")]["__call__"]
        assert np.abs(theirs.numpy()).max() > 0.1
        close(np.asarray(ours), theirs.numpy().transpose(0, 2, 3, 1), name)
    assert len(reference.outputs) == 94
    spatial = reference.outputs["Mixed_6d.branch1x1"][:, :7].numpy().transpose(0, 2, 3, 1)
    assert features["spatial"].shape == (1, 2023)
    close(np.asarray(features["spatial"]), spatial.reshape(1, -1), "spatial")
    close(np.asarray(features["pool"]), pool, "pool")
    logits = pool @ reference.state["fc.weight"].numpy().T
    close(np.asarray(features["logits"]), logits, "logits")


def test_all_layouts_give_the_same_parameters(files):
    trees = [load_inception(file) for file in files]
    assert [file.suffix for file in files] == [".pb", ".pth", ".pth"]
    for other in trees[1:]:
        jax.tree.map(np.testing.assert_array_equal, trees[0], other)


@pytest.mark.parametrize(
    ("listed", "values"),
    [([1, 2, 3, -4], [[1, 2], [3, -4]]), ([0.5], [[0.5, 0.5]] * 2), ([1, 2], [[1, 2], [2, 2]])],
)
def test_constants_that_are_listed_or_repeated(listed, values):
    import tensorflow as tf

    tensor = tf.compat.v1.NodeDef().attr["value"].tensor
    tensor.dtype = 1
    for _ in range(2):
        tensor.tensor_shape.dim.add(size=2)
    tensor.float_val.extend(listed)
    np.testing.assert_array_equal(_values(tensor), values)


def test_names_of_the_graph():
    names = dict(unit_names())
    assert len(names) == len(set(names.values())) == 94
    assert {name: names[name] for name in NAMES} == NAMES


def test_errors_say_what_to_do(tmp_path, monkeypatch, files):
    import torch

    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        UserError,
        match=r"zoo:inception_adm, .*get pt_inception-.*github.com/mseitzer.*cache/files/inception",
    ):
        find_weights()
    with pytest.raises(UserError, match=r"no Inception weights elsewhere\.pth"):
        find_weights("elsewhere.pth")
    with pytest.raises(UserError, match=r"unknown file of the zoo 'adm', have \['inception_adm'"):
        find_weights("zoo:adm")
    folder = tmp_path / "cache" / "files" / "inception"
    folder.mkdir(parents=True)
    (folder / "classify_image_graph_def.pb").write_bytes(b"x")
    assert find_weights() == folder / "classify_image_graph_def.pb"
    assert find_weights("zoo:inception_adm") == find_weights()
    with pytest.raises(UserError, match="not a TensorFlow graph"):
        load_inception(find_weights())
    (tmp_path / "short.pb").write_bytes(files[0].read_bytes()[:-10])
    with pytest.raises(UserError, match="not a TensorFlow graph"):
        load_inception(tmp_path / "short.pb")
    state = torch.load(files[-1])
    del state["Mixed_6b.branch1x1.bn.weight"]
    state["head.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"(?s)Mixed_6b.branch1x1.bn.weight|head.weight"):
        load_inception(tmp_path / "other.pth")
