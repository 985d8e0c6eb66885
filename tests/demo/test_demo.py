"""The page without a browser: its actions, their limits, bad uploads, and its settings."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from helpers import small
from PIL import Image

import bitgen
from bitgen import UserError
from bitgen.demo import __main__ as demo
from bitgen.demo import actions, inspection, settings, uploads
from bitgen.images.decode import center_crop

SAMPLER = {"denoiser_steps": 2, "segments": 1}
COLOUR = (255, 120, 0, 255)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    small.write_models(path)
    return path


@pytest.fixture(scope="module")
def tools(folder):
    pipeline = bitgen.load(folder / "generator" / "model")
    limits = uploads.Limits(images=6, megabytes=0.1, megapixels=0.01)
    return actions.Tools(pipeline, {"ours": pipeline}, limits, SAMPLER)


@pytest.fixture
def picture():
    """Wider than high: the centre crop to 8 pixels takes x 4 to 36, a token is 8 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC)


def painted(box, size=(40, 32)):
    """A layer of the editor, in the size in which the page shows the picture."""
    layer = Image.new("RGBA", size)
    layer.paste(COLOUR, box)
    return [layer.resize((size[0] * 10, size[1] * 10), Image.Resampling.NEAREST)]


# ---- Uploads ----


def test_a_picture_is_read_and_shown_in_a_size_to_paint_on(tools, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    read = uploads.read_upload(str(tmp_path / "a.png"), tools.limits)
    assert read.size == (40, 32)
    assert uploads.shown(read).size == (400, 320)
    assert max(uploads.shown(Image.new("RGB", (3000, 20))).size) == 768


def test_bad_uploads_are_refused_in_words(tools, tmp_path):
    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    cases = [
        (None, "no picture was chosen"),
        (write("notes.png", b"hello"), r"^notes\.png cannot be read as a picture"),
        (write("empty.jpg", b""), r"^empty\.jpg cannot be read"),
        (write("large.png", bytes(100_001)), r"^large\.png is larger than 0\.1 MB"),
        (
            write("bomb.png", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")),
            "0.01 megapixels",
        ),
        (write("cut.png", (tmp_path / "whole.png").read_bytes()[:4000]), r"^cannot read cut\.png"),
    ]
    for path, words in cases:
        with pytest.raises(UserError, match=words):
            uploads.read_upload(path, tools.limits)


def test_what_the_brush_touches_is_marked(picture):
    area = uploads.area_painted(painted((13, 9, 15, 11)), picture)
    assert area.sum() == 4
    tokens = uploads.tokens_painted("inpaint", area, 8, (4, 4))
    assert np.argwhere(tokens).tolist() == [[1, 1]]
    half = uploads.area_painted(painted((12, 8, 20, 12)), picture)
    assert uploads.tokens_painted("outpaint", half, 8, (4, 4)).sum() == 1
    with pytest.raises(UserError, match="covers no token"):
        uploads.tokens_painted("outpaint", area, 8, (4, 4))
    for layers in (None, [], painted((0, 0, 0, 0))):
        with pytest.raises(UserError, match="no mask is drawn"):
            uploads.area_painted(layers, picture)
    outside = uploads.area_painted(painted((0, 0, 3, 32)), picture)
    with pytest.raises(UserError, match="inside of the centre square"):
        uploads.tokens_painted("inpaint", outside, 8, (4, 4))
    with pytest.raises(UserError, match="everything is painted"):
        uploads.tokens_painted("inpaint", np.ones((32, 40), bool), 8, (4, 4))


# ---- Drawing ----


def test_redrawing_changes_the_painted_area_only(tools, picture):
    layers = painted((12, 8, 20, 16))
    laid, whole = actions.redraw(tools, "inpaint", picture, layers, 3, 2, 0, iterations=1)
    assert [name for _, name in laid] == ["variant 1", "variant 2"]
    changed = (laid[0][0] != uploads.as_shown(np.asarray(picture))).any(-1)
    rows, columns = np.nonzero(changed)
    assert len(rows)
    assert (rows.min() >= 80) & (rows.max() < 160) & (columns.min() >= 120) & (columns.max() < 200)
    assert whole[0][0].shape == (384, 384, 3)

    area = uploads.area_painted(layers, picture)
    kept = actions.lay_in("outpaint", picture, area, np.full((8, 8, 3), 7, np.uint8))
    np.testing.assert_array_equal(kept[area], np.asarray(picture)[area])
    assert (kept[~area].reshape(-1, 3) == 7).all(-1).mean() > 0.7  # and beyond the square, nothing
    np.testing.assert_array_equal(kept[:, :4], np.asarray(picture)[:, :4])


def test_generating_shows_every_step(tools):
    found = list(actions.generate(tools, [1, 2], 2, 0, iterations=3, guidance=1.0))
    assert [words for _, words in found] == [f"{n} of 16 tokens drawn" for n in (3, 8, 16)]
    assert len({picture.tobytes() for picture, _ in found}) == 3
    assert actions.example(tools, 1, 0).size == (8, 8)


def test_the_way_between_two_classes_ends_at_them(tools):
    cells = actions.interpolate(tools, 1, 3, 3, 0, iterations=1, guidance=4.0)
    assert [text for _, text in cells] == ["0% 3, 100% 1", "50% 3, 50% 1", "100% 3, 0% 1"]
    assert len({picture.tobytes() for picture, _ in cells}) == 3


def test_enriching_shows_every_round(tools, picture):
    cells = actions.enrich(tools, picture, None, 2, 2, 0, iterations=1)
    names = ["original", "1/2 resolution", "reconstruction", "round 1", "round 2"]
    assert [name for _, name in cells] == names


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, p: list(actions.generate(t, [], 1, 0)), "choose at least one class"),
        (lambda t, p: list(actions.generate(t, [1, 2], 4, 0)), "1 to 6 images at a time, not 8"),
        (lambda t, p: actions.redraw(t, "inpaint", None, [], None, 1, 0), "choose a picture"),
        (lambda t, p: actions.redraw(t, "inpaint", p, [], None, 1, 0), "no mask is drawn"),
        (lambda t, p: actions.redraw(t, "edit", p, [], None, 1, 0), "choose the class"),
        (lambda t, p: actions.interpolate(t, None, 1, 3, 0), "choose two classes"),
        (lambda t, p: actions.interpolate(t, 0, 1, 1, 0), "at least 2 images"),
        (lambda t, p: actions.enrich(t, p, None, 2, 7, 0), "1 to 6 images"),
        (lambda t, p: inspection.compare(t, None), "choose a picture"),
        (lambda t, p: inspection.look_at_token(t, p, 4, 0, 0), "no row 4: choose from 0 to 3"),
        (lambda t, p: inspection.look_at_token(t, p, 0, 0, 4), "no bit 4"),
    ],
)  # fmt: skip
def test_bad_requests_say_what_to_do(tools, picture, call, words):
    with pytest.raises(UserError, match=words):
        call(tools, picture)


def test_tabs_say_why_they_cannot(tools, folder, tmp_path):
    assert actions.why_not(tools.pipeline, "edit") == ""
    alone = bitgen.load(folder / "tokenizer" / "model")
    assert "without a generator" in actions.why_not(alone, "draw")
    dance = bitgen.load(small.write_models(tmp_path, "bitdance")[0])
    assert actions.why_not(dance, "draw") == ""
    assert "fixed order" in actions.why_not(dance, "edit")


# ---- Tokenizers ----


def test_tokenizers_are_compared_by_price_and_error(tools, picture):
    rows, cells = inspection.compare(tools, picture)
    view = center_crop(picture, 8)
    made = tools.pipeline.decode(tools.pipeline.encode(view))[0]
    error = 10 * np.log10(255**2 / np.mean((view.astype(float) - made) ** 2))
    assert rows == [["ours", "8 x 8", "64", "1.000", f"{error:.2f}"]]
    assert len(cells) == 3
    apart = np.abs(view.astype(float) - made).mean(-1) * 4
    np.testing.assert_allclose(cells[2][0][::48, ::48, 0], np.clip(apart, 0, 255), atol=1)


def test_a_token_is_shown_with_its_bits(tools, picture):
    bits = tools.pipeline.encode(center_crop(picture, 8))[0]
    token = inspection.look_at_token(tools, picture, 2, 1, 3)
    text = "".join("01"[int(on)] for on in bits[2, 1])
    assert token.words == f"token in row 2, column 1: {text}"
    frame = (token.board == (255, 120, 0)).all(-1)
    rows, columns = np.nonzero(frame)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (192, 288, 96, 192)
    bits[2, 1, 3] ^= True
    wanted = tools.pipeline.decode(bits[None])[0]
    np.testing.assert_array_equal(token.flipped[1][0][::48, ::48], wanted)
    assert inspection.token_at((100, 383), (4, 4), (384, 384)) == (3, 1)


# ---- Settings ----


def test_settings_are_read_and_checked(folder, tmp_path):
    generator = str(folder / "generator" / "model")
    c = settings.parse(["", f"--config.generator={generator}", "--config.sampler.iterations=5"])
    assert (c.host, c.sampler.iterations, c.sampler.segments) == ("127.0.0.1", 5, 1)
    tools = demo.load(c)
    assert tools.sampler["iterations"] == 5
    assert tools.pipeline.plan(**tools.sampler).denoiser_steps == 8  # as it was trained
    dance = small.write_models(tmp_path, "bitdance")[0]
    c = settings.parse(["", f"--config.generator={dance}", "--config.sampler.head_steps=5"])
    assert "iterations" not in c.sampler
    for argument, words in [
        ("--config.generator=nowhere", "is not a model directory"),
        (f"--config.generator={folder / 'tokenizer' / 'model'}", "holds a tokenizer"),
        ("--config.speed=1", "unknown key in config: 'speed'"),
        ("--config.port.x=1", "config.port is a value"),
        ("--config.port=many", "config.port takes int, got 'many'"),
        ("--config.mesh=1", "config.mesh is a group"),
        ("--config.port=70000", "from 0 to 65535"),
        ("--config.images=0", "config.images must be above 0"),
        ("--port=1", "unexpected argument '--port=1'"),
    ]:
        with pytest.raises(UserError, match=words):
            settings.parse(["", f"--config.generator={generator}", argument])
    c = settings.parse(["", "--config.generator="])
    with pytest.raises(UserError, match="no model given"):
        demo.load(c)
    c.tokenizer = str(folder / "tokenizer" / "model")
    assert demo.load(c).pipeline.generator is None
    c.tokenizers = generator
    with pytest.raises(UserError, match="is a generator:"):
        demo.load(c)


@pytest.mark.parametrize(("text", "value"), [("True", True), ("false", False), ("0", False)])
def test_a_setting_of_yes_or_no_is_read(text, value):
    c = settings.defaults()
    c.sampler.unlikely = not value
    settings._set(c, ["sampler", "unlikely"], text)
    assert c.sampler.unlikely is value
    with pytest.raises(UserError, match=r"config\.sampler\.unlikely takes bool, got 'maybe'"):
        settings._set(c, ["sampler", "unlikely"], "maybe")


def test_the_quickstart_is_named_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo.main(["demo"]) == 2
    assert "launch/quickstart.sh trains one" in capsys.readouterr().err
    assert demo.main(["demo", "--help"]) == 0


def test_without_gradio_it_says_how_to_get_it(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["demo", f"--config.generator={folder / 'generator' / 'model'}"]) == 2
    assert "pip install 'bitgen[demo]'" in capsys.readouterr().err


BUILD = """
import json, sys
from bitgen.demo import __main__ as demo, page, settings
for path in sys.argv[1:]:
    kind = "generator" if "generator" in path else "tokenizer"
    arguments = ["", "--config.generator=", f"--config.{kind}={path}"]
    blocks = page.build(demo.load(settings.parse(arguments)))
    assert blocks.analytics_enabled is False
    text = json.dumps(blocks.get_config_file(), default=str)
    print([word for word in ("Draw", "Redraw", "Enrich", "Look") if f'"value": "{word}"' in text])
"""


@pytest.mark.slow
def test_the_page_is_built_for_every_kind_of_model(folder, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'bitgen[demo]'")
    generator, tokenizer = small.write_models(tmp_path, "bitdance")
    paths = [folder / "generator" / "model", generator, tokenizer]
    # In a process of its own: gradio leaves an event loop open.
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "['Draw', 'Redraw', 'Enrich', 'Look']",
        "['Draw', 'Look']",
        "['Look']",
    ]
