"""The training loop: the same run whatever interrupts it and whatever it runs on."""

import json
import logging
import signal

import jax
import numpy as np
import pytest
from helpers import small
from PIL import Image

from bitgen import data
from bitgen.convert import patchgan
from bitgen.convert.rules import export_tensors
from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.modes import reconstruct, sample, tokenize, train
from bitgen.runtime.mesh import make_mesh
from bitgen.runtime.stop import StopSignal


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer run of six steps, the data's bits, and a generator run on images."""
    root = tmp_path_factory.mktemp("trained")
    train.run(small.tokenizer(), root / "tokenizer")
    c = small.tokenizer()
    c.tokenizer = str(root / "tokenizer" / "model")
    c.tokenize.shard = 500
    tokenize.run(c, root)
    train.run(small.generator(c.tokenizer), root / "generator")
    return root


def stop_after(monkeypatch, step):
    """Ends training as a crash would, right after a step's metrics are written."""
    from bitgen.training.metrics import RunLog

    write = RunLog.scalars

    def scalars(self, at, values):
        write(self, at, values)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "scalars", scalars)


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_resumed_equals_uninterrupted(kind, trained, tmp_path, monkeypatch):
    make = {
        "tokenizer": small.tokenizer,
        "generator": lambda: small.generator(trained / "tokenizer" / "model"),
    }[kind]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # one step past the checkpoint of step 4
        with pytest.raises(KeyboardInterrupt):
            train.run(make(), tmp_path)
    train.run(make(), tmp_path)
    rows, whole = small.rows(tmp_path), small.rows(trained / kind)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 5, 6]
    assert rows[:5] + rows[6:] == whole  # bit for bit
    assert rows[4] == rows[5]
    ours, theirs = (
        model_directory.read_info(d / "model")["digest"] for d in (tmp_path, trained / kind)
    )
    assert ours == theirs


def test_sigterm_saves_and_the_run_goes_on(trained, tmp_path, monkeypatch, capsys):
    from bitgen.training.metrics import RunLog

    write = RunLog.scalars

    def scalars(self, at, values):
        write(self, at, values)
        if at == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "scalars", scalars)
        train.run(small.tokenizer(), tmp_path)
    assert "saved step 4" in capsys.readouterr().err
    train.run(small.tokenizer(), tmp_path)
    assert "resuming" in capsys.readouterr().err
    assert small.rows(tmp_path) == small.rows(trained / "tokenizer")
    train.run(small.tokenizer(), tmp_path)
    assert "nothing to do" in capsys.readouterr().err


def test_at_a_stop_no_more_than_one_step_is_under_way():
    waited = []

    class Loss:
        def __init__(self, step):
            self.step = step

        def block_until_ready(self):
            waited.append(self.step)
            return self

    stop = StopSignal()
    for step in range(3):
        assert not stop.after({"loss": Loss(step)})
        assert waited == list(range(step))
    signal.raise_signal(signal.SIGTERM)
    assert stop.after({"loss": Loss(3)})
    assert waited == [0, 1, 2]


def test_one_and_eight_devices_take_the_same_steps(trained, tmp_path, monkeypatch):
    """To float32 rounding: sums over the batch are in another order."""
    for kind, make in (
        ("tokenizer", small.tokenizer),
        ("generator", lambda: small.generator(trained / "tokenizer" / "model")),
    ):
        one = make_mesh(devices=jax.devices()[:1])
        with monkeypatch.context() as patch:
            patch.setattr(train, "make_mesh", lambda one=one, **_: one)
            train.run(make(), tmp_path / kind)
        for ours, theirs in zip(
            small.rows(tmp_path / kind), small.rows(trained / kind), strict=True
        ):
            assert ours.keys() == theirs.keys()
            for name in ours:
                np.testing.assert_allclose(
                    ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name
                )


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(tmp_path):
    c = small.tokenizer()
    c.train.checkpoint_every = 1
    c.train.log_every = 3
    c.optim.name, c.optim.lr, c.optim.clip = "adam", 1e-3, 0.0
    c.train.steps = 2
    train.run(c, tmp_path)
    before = model_directory.read_info(tmp_path / "model")["digest"]
    c.train.steps = 6
    with pytest.MonkeyPatch.context() as patch:
        from bitgen.training.tokenizer_task import TokenizerTask

        step = TokenizerTask.step

        def poisoned(self, state, frozen, batch, key, stage):
            state, m = step(self, state, frozen, batch, key, stage)
            bad = state.step >= 4
            return state, {**m, "loss": jax.numpy.where(bad, jax.numpy.nan, m["loss"])}

        patch.setattr(TokenizerTask, "step", poisoned)
        with pytest.raises(
            UserError, match=r"loss is nan at step 4; .* keeps the checkpoint of step 3"
        ):
            train.run(c, tmp_path)
    c.train.steps = 3
    train.run(c, tmp_path)
    assert model_directory.read_info(tmp_path / "model")["steps"] == 3
    assert model_directory.read_info(tmp_path / "model")["digest"] != before


def test_another_config_in_the_workdir_is_refused(trained):
    c = small.tokenizer()
    c.optim.lr = 1e-2
    with pytest.raises(UserError, match=r"different config: optim.lr is 0.001 there and 0.01 here"):
        train.run(c, trained / "tokenizer")


def test_adversarial_stage_starts_at_its_step(tmp_path):
    """In parts, with LeCam and a frozen encoder."""
    c = small.tokenizer()
    c.model.image_size = c.data.image_size = 16
    c.loss.gan_weight, c.loss.gan_start = 1.0, 2
    c.loss.gan_augment = True
    c.loss.lecam_weight = 0.1
    c.loss.discriminator_width, c.loss.discriminator_layers = 8, 1
    c.train.batch_size, c.train.accumulate = 16, 2
    c.train.freeze = ("^encoder/",)
    c.train.preview_every = 100
    c.train.steps = 4
    train.run(c, tmp_path)
    rows = small.rows(tmp_path)
    assert ["discriminator" in row for row in rows] == [False, False, True, True]
    assert ["lecam" in row for row in rows] == [False, False, True, True]
    assert all(0 < row["gan_weight"] <= 1 for row in rows[2:])
    assert all(row["bits_used"] + row["bits_dead"] / 4 == 1 for row in rows)
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {"bits_0000004.png", "reconstructions_0000004.png"}


def test_tokenized_bits_are_the_tokenizers(trained):
    c = small.tokenizer()
    tokenizer = model_directory.load(trained / "tokenizer" / "model", "tokenizer")
    source = data.PackedSource(trained / "bits")
    assert len(source) == 1797
    assert source.meta["tokenizer"] == model_directory.identity(tokenizer.path)
    c.data.split = "all"
    images = data.make_batches(c.data, batch_size=8, seed=0, training=False)
    batch = next(images)
    for view, pixels in enumerate((batch["image"], batch["image"][:, :, ::-1])):
        bits = tokenizer.module.apply(
            {"params": tokenizer.params}, pixels.astype(np.float32) / 127.5 - 1, method="encode"
        )
        packed = np.stack([source[i]["bits"][view] for i in range(8)])
        np.testing.assert_array_equal(data.unpack_bits(packed, 4), bits)


def test_training_on_stored_bits_needs_no_tokenizer(trained, tmp_path):
    c = small.generator("")
    c.data.source, c.data.path = "bits", str(trained / "bits")
    train.run(c, tmp_path)
    assert small.rows(tmp_path)[-1]["step"] == 6
    info = model_directory.read_info(tmp_path / "model")
    assert info["origin"]["tokenizer"] == model_directory.identity(trained / "tokenizer" / "model")


def test_training_starts_from_a_model_of_the_same_sizes(trained, tmp_path):
    c = small.tokenizer()
    c.init_from = str(trained / "tokenizer" / "model")
    c.optim.lr, c.train.steps = 1e-12, 1
    train.run(c, tmp_path / "same")
    ours, theirs = (
        model_directory.load(d / "model", "tokenizer").params
        for d in (tmp_path / "same", trained / "tokenizer")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
    c.model.bits = 5
    with pytest.raises(
        UserError, match=r"model does not have the sizes of config.model: .*quantizer"
    ):
        train.run(c, tmp_path / "other")


def test_fine_tuning_goes_on_with_the_imported_discriminator(trained, tmp_path):
    from bitgen.training.tokenizer_task import TokenizerTask

    c = small.tokenizer()
    c.model.image_size = c.data.image_size = 16
    c.loss.gan_weight = 1.0
    c.loss.discriminator_width, c.loss.discriminator_layers = 8, 1
    task = TokenizerTask(c)
    state = task.init(jax.random.key(0))
    target = {
        "params": state.params["discriminator"],
        "batch_stats": state.stats["discriminator"],
    }
    table = patchgan.table({"width": 8, "layers": 1})
    other = jax.tree.map(lambda x: np.asarray(x) + 0.5, target)
    tensors = dict(export_tensors(table, other, {}, {}))
    params = jax.tree.map(np.asarray, state.params["model"])
    model_directory.write(tmp_path / "model", task.info, params, tensors.items())
    started = task.start_from(state, model_directory.load(tmp_path / "model", "tokenizer"))
    jax.tree.map(np.testing.assert_array_equal, started.params["discriminator"], other["params"])
    jax.tree.map(
        np.testing.assert_array_equal, started.stats["discriminator"], other["batch_stats"]
    )


def test_sample_does_not_depend_on_its_batch(trained, tmp_path):
    pictures = []
    for size in (8, 16):
        c = small.generator(trained / "tokenizer" / "model")
        c.generator = str(trained / "generator" / "model")
        c.sample.labels, c.sample.per_label, c.sample.batch_size = "0-4", 4, size
        sample.run(c, tmp_path / str(size))
        pictures.append(np.asarray(Image.open(tmp_path / str(size) / "samples.png")))
    assert pictures[0].shape == (5 * 8, 4 * 8, 3)
    assert_same_pixels(*pictures)


def assert_same_pixels(a, b):
    """Equal up to a pixel between two levels, which rounds to either in programs of other sizes."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_bitdance_trains_in_parts_and_samples_in_chunks(trained, tmp_path):
    c = small.bitdance(trained / "tokenizer" / "model")
    c.train.batch_size, c.train.accumulate = 16, 2
    train.run(c, tmp_path)
    assert [row["step"] for row in small.rows(tmp_path)] == [1, 2]
    grids = []
    for chunk in (0, 2):
        c.sample.labels, c.sample.per_label, c.sample.batch_size = "0-3", 6, 24
        c.sample.decode_batch, c.sample.output = chunk, f"{chunk}.png"
        sample.run(c, tmp_path)
        grids.append(np.asarray(Image.open(tmp_path / f"{chunk}.png")))
    assert grids[0].shape == (4 * 8, 6 * 8, 3)
    assert_same_pixels(*grids)


def test_a_sampler_of_another_family_is_refused(trained, tmp_path):
    c = small.bitdance(trained / "tokenizer" / "model")
    c.generator = str(trained / "generator" / "model")
    with pytest.raises(
        UserError, match=r"the sampler of bigr takes .*: start from a config of bigr"
    ):
        sample.run(c, tmp_path)


def test_reconstruct_measures_every_image(trained, tmp_path):
    c = small.tokenizer()
    c.tokenizer = str(trained / "tokenizer" / "model")
    reconstruct.run(c, tmp_path)
    result = json.loads((tmp_path / "reconstructions.json").read_text())
    assert result["images"] == 180
    assert result["psnr"] > 5
    c.reconstruct.batch_size = 16
    reconstruct.run(c, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "reconstructions.json").read_text())
    assert again["psnr"] == pytest.approx(result["psnr"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.bits": 6}, r"config.model.bits is 6, .* has 4; set --config.model.bits=4"),
        ({"model.grid": (2, 2)}, r"config.model.grid is \(2, 2\), .* has \(4, 4\)"),
        ({"model.num_classes": 3}, "10 classes, the generator 3"),
        ({"tokenizer": "nowhere"}, "nowhere is not a model directory"),
        ({"train.batch_size": 6}, "choose a multiple of 8"),
        (
            {"train.batch_size": 24, "train.accumulate": 2},
            r"does not split over 8 devices in 2 parts each .*; choose a multiple of 16",
        ),
        ({"train.accumulate": 0}, "1 or more, got 0"),
        ({"train.freeze": ("^blocks/",)}, "freeze is for tokenizers alone"),
        ({"mesh.data": 3}, "does not fit 8 devices"),
        ({"optim.schedule": "zigzag"}, r"unknown schedule 'zigzag', have \['constant'"),
        ({"train.task": "dance"}, r"unknown task 'dance', have \['generator', 'tokenizer'\]"),
        ({"data.source": "bits"}, "not a folder of bits"),
        ({"data.source": "folder", "data.path": "nowhere"}, "nowhere"),
    ],
)
def test_bad_settings_are_one_clear_error(change, message, trained, tmp_path):
    c = small.generator(trained / "tokenizer" / "model")
    for key, value in change.items():
        with c.ignore_type():
            c.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        train.run(c, tmp_path)


def test_models_that_do_not_fit_are_named(trained, tmp_path):
    c = small.generator(trained / "tokenizer" / "model")
    c.generator = str(trained / "generator" / "model")
    info = json.loads((trained / "tokenizer" / "model" / "model.json").read_text())
    other = tmp_path / "other"
    tokenizer = model_directory.load(trained / "tokenizer" / "model", "tokenizer")
    model_directory.write(other, {**info, "hparams": {**info["hparams"]}}, tokenizer.params)
    loaded = model_directory.load(trained / "generator" / "model", "generator")
    mismatch = model_directory.Model(loaded.module.clone(bits=8), loaded.params, {}, "G")
    with pytest.raises(
        UserError, match=r"generator G and tokenizer .* do not fit: bits a token 8 against 4"
    ):
        model_directory.check_fit(mismatch, tokenizer)
    for labels, message in (
        ("12", "label 12 is out of range"),
        ("a-b", "cannot read the label 'a-b'"),
    ):
        c.sample.labels = labels
        with pytest.raises(UserError, match=message):
            sample.run(c, tmp_path)
    c.generator = c.tokenizer
    with pytest.raises(UserError, match=r"holds a tokenizer \(binary_ae\), not a generator"):
        sample.run(c, tmp_path)


def test_a_damaged_model_directory_is_named(trained, tmp_path):
    tokenizer = model_directory.load(trained / "tokenizer" / "model", "tokenizer")
    info = {k: tokenizer.info[k] for k in ("kind", "family", "hparams")}
    wrong = {**info, "hparams": {**info["hparams"], "bits": 5}}
    model_directory.write(tmp_path / "wrong", wrong, tokenizer.params)
    with pytest.raises(UserError, match=r"do not match its model.json"):
        model_directory.load(tmp_path / "wrong", "tokenizer")
    (tmp_path / "wrong" / "model.json").write_text("{")
    with pytest.raises(UserError, match=r"model.json is damaged"):
        model_directory.load(tmp_path / "wrong", "tokenizer")


def test_broken_images_are_named_and_too_many_stop_the_run(tmp_path, caplog):
    from PIL import Image

    folder = tmp_path / "pictures" / "a"
    folder.mkdir(parents=True)
    for i in range(20):
        Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "05.png").write_bytes(b"no image")
    c = small.tokenizer()
    c.data.source, c.data.path, c.data.split = "folder", str(tmp_path / "pictures"), "all"
    c.data.max_broken_share = 0.2
    with caplog.at_level(logging.WARNING):
        train.run(c, tmp_path / "run")
    assert "05.png" in caplog.text
    assert small.rows(tmp_path / "run")[-1]["broken_images"] >= 1
    c.data.max_broken_share = 0.01
    with pytest.raises(UserError, match=r"cannot be read .*first: .*05.png"):
        train.run(c, tmp_path / "stopped")
