"""The zoo: entries that agree with the released files, and `zoo:NAME` from any of its sources."""

import hashlib
import io
import json
import os
import re
import sys
import threading
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from helpers.checkpoint_files import (
    BIGR,
    MANIFESTS,
    bigr_tensors,
    manifest,
    save_bigr,
    save_binary_ae,
)
from huggingface_hub.errors import LocalEntryNotFoundError

from bitgen import build
from bitgen.convert.__main__ import main
from bitgen.convert.directory import FAMILIES, import_file
from bitgen.errors import UserError
from bitgen.hub import model_directory, zoo

TINY = zoo.Entry(
    "tiny", "bigr", "tiny", "gpt/tiny.pt", "someone/tiny", gigabytes=0.01, hparams=BIGR
)
BY_HAND = zoo.Entry("by_hand", "bigr", "tiny", "x.pt", url="a.com/x", hparams=BIGR)


@pytest.fixture
def small_zoo(tmp_path, monkeypatch):
    """A zoo of two small entries, conversions in this process, no downloads."""
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "ZOO", {"tiny": TINY, "by_hand": BY_HAND})
    conversions = []

    def run(command, env, check):
        assert command[:3] == [sys.executable, "-m", "bitgen.convert"]
        assert command[-1].startswith("--model=")
        assert env["JAX_PLATFORMS"] == "cpu"
        source, directory = command[3:5]
        conversions.append(source)
        import_file(source, directory, command[-1].removeprefix("--model="))
        return type("Done", (), {"returncode": 0})

    def download(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection,\nreally none")

    monkeypatch.setattr(zoo.subprocess, "run", run)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return conversions


# Released files of one network, trained in two ways: only --model tells them apart.
TWINS = {"bitvae_d32reg": "bitvae_d32"} | {
    f"dc_ae_{size}_mix": f"dc_ae_{size}_in" for size in ("f32c32", "f64c128", "f128c512")
}


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in TWINS])
def test_entries_have_the_settings_of_the_released_files(name):
    family, hparams, _ = manifest(name)
    entry = zoo.get(name)
    settings = zoo.settings(entry)
    assert entry.family == family
    assert {key: settings[key] for key in hparams} == hparams
    assert zoo.find(entry.family, hparams) == entry
    assert zoo.find(entry.family, json.loads(json.dumps(hparams))) == entry
    assert zoo.find(entry.family, {**hparams, "bits": 7}) is None
    assert zoo.describe(entry.family, hparams) == entry.size
    assert FAMILIES[entry.family].kind == entry.kind
    module = build.make_module(entry.kind, entry.family, settings)
    if entry.kind == "generator":
        tokenizer = zoo.get(entry.tokenizer)
        read = build.make_module("tokenizer", tokenizer.family, zoo.settings(tokenizer))
        assert (module.bits, tuple(module.grid)) == (read.bits, tuple(read.grid))


def test_every_released_file_is_there():
    names = {path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("*.json.gz")}
    names.remove("bld_bae_c32")  # of the training recipe; it was not released
    names -= {f"dcae_0{i}" for i in range(3, 8)}  # of configs/dcae.py; nor were these
    assert names == set(zoo.ZOO) - set(TWINS)
    assert len(zoo.ZOO) == 10 + 6 + 6 + 7  # BitVAE, BitDance with its autoencoder, DC-AE
    for name, entry in zoo.ZOO.items():
        assert entry.name == name
        assert bool(entry.repository) != bool(entry.url)
        assert bool(entry.tokenizer) == (entry.kind == "generator")
        assert entry.tokenizer in (*zoo.ZOO, "")
    sources = [entry.source for entry in zoo.ZOO.values()]
    assert len(set(sources)) == len(sources)
    assert "huggingface.co/haoosz/BiGR gpt/bigr_L_d32_512.pt" in sources
    assert "huggingface.co/haoosz/BiGR bae/bae_d32_512/binaryae_ema_720000.th" in sources
    assert "huggingface.co/FoundationVision/Infinity infinity_vae_d32reg.pth" in sources
    assert "huggingface.co/shallowdream204/BitDance-ImageNet BitDance_B_16x.pt" in sources


@pytest.mark.slow
def test_parameters_are_as_many_as_published():
    rows = [line.split() for line in zoo.parameter_table().splitlines()[1:]]
    assert [row[0] for row in rows] == [*zoo.ZOO, *zoo.TILES]
    assert set(zoo.PARAMETERS) <= {row[0] for row in rows}
    for name, _, count, *published in rows:
        if published:  # rounded, or cut off
            scale = {"M": 1, "B": 1000}[published[0][-1]]
            assert float(published[0][:-1]) * scale == pytest.approx(float(count[:-1]), rel=0.01)
            assert published == [zoo.PARAMETERS[name]]


def test_tiles_have_the_settings_of_their_manifests():
    for name, fields in zoo.TILES.items():
        _, there, _ = manifest(name)
        ours = {**build.fields_of("tokenizer", "dcae"), **fields}
        assert {key: ours[key] for key in there} == there
        assert there["encoder_widths"] == fields["encoder_widths"]


def test_the_table_says_what_can_be_used():
    lines = {line.split()[0]: line for line in zoo.table().splitlines()}
    assert list(lines) == ["NAME", *zoo.ZOO, *zoo.WEIGHTS]
    for name, entry in zoo.ZOO.items():
        assert lines[name].endswith(entry.source)
        assert entry.expected in lines[name]
    for name, weights in zoo.WEIGHTS.items():
        assert weights.name == name
        assert lines[name].endswith(weights.url)
    assert "FID 2.36" in lines["bigr_XXL_d24"]
    assert lines["bigr_L_d32_512"].split()[2:6] == ["d32,", "L", "512", "1.49"]
    assert "rFID 0.33, PSNR 24.9" in lines["bitvae_d64"]
    assert "rFID 0.217, PSNR 26.15" in lines["dc_ae_f64c128_in"]


def test_other_paths_are_left_alone():
    assert zoo.resolve("some/where") == Path("some/where")
    assert zoo.resolve(Path("/zoo")) == Path("/zoo")


def test_names_that_are_not_there_are_named():
    with pytest.raises(UserError, match=r"unknown model of the zoo 'bigr_S', have \['bigr_L_d24'"):
        zoo.resolve("zoo:bigr_S")
    with pytest.raises(UserError, match="unknown model of the zoo 'bigr_S'"):
        model_directory.load("zoo:bigr_S", "generator")


def test_a_file_put_by_hand_is_converted_once(tmp_path, small_zoo):
    by_hand = tmp_path / "cache" / "files" / "tiny" / "tiny.pt"
    with pytest.raises(UserError, match=r"tiny cannot be downloaded: no connection,; get tiny\.pt"):
        zoo.resolve("zoo:tiny")
    with pytest.raises(UserError, match=re.escape(f"and put it at {by_hand}")):
        zoo.resolve("zoo:tiny")
    by_hand.parent.mkdir(parents=True)
    save_bigr(by_hand)
    model = model_directory.load("zoo:tiny", "generator")
    assert model.info["origin"]["zoo"] == "tiny"
    assert model.path == "zoo:tiny"
    by_hand.unlink()
    assert zoo.resolve("zoo:tiny") == tmp_path / "cache" / "models" / "tiny"
    assert model_directory.read_info("zoo:tiny") == model.info
    assert model_directory.identity("zoo:tiny")["digest"] == model.info["digest"]
    assert model_directory.load_carried("zoo:tiny") == {}
    assert "layers" in model_directory.open_params("zoo:tiny")
    assert small_zoo == [str(by_hand)]


def test_a_file_is_downloaded_and_converted_once(tmp_path, small_zoo, monkeypatch):
    save_bigr(tmp_path / "blob")
    asked = []

    def download(repository, path):
        asked.append((repository, path))
        return str(tmp_path / "blob")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    threads = [threading.Thread(target=zoo.resolve, args=("zoo:tiny",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [("someone/tiny", "gpt/tiny.pt")]
    assert small_zoo == [str(tmp_path / "blob")]
    params = model_directory.load("zoo:tiny", "generator").params
    tensors = bigr_tensors()
    np.testing.assert_array_equal(params["norm"]["scale"], tensors["norm.weight"])


def test_without_the_hub_the_file_and_its_place_are_named(tmp_path, small_zoo, monkeypatch):
    place = re.escape(str(tmp_path / "cache" / "files"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=rf"needs huggingface_hub: pip .* put it at {place}/tiny/tiny"
    ):
        zoo.resolve("zoo:tiny")
    with pytest.raises(
        UserError, match=rf"by_hand is on no hub: get x\.pt from a\.com/x .*{place}"
    ):
        zoo.resolve("zoo:by_hand")
    assert small_zoo == []


def test_a_file_that_is_another_model_says_so(tmp_path, monkeypatch, capfd):
    """The real entry and the real command, in its own process."""
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path))
    by_hand = tmp_path / "files" / "bigr_L_d24" / "bigr_L_d24.pt"
    by_hand.parent.mkdir(parents=True)
    save_binary_ae(by_hand)
    with pytest.raises(UserError, match=r"bigr_L_d24\.pt cannot be converted to bigr_L_d24: see"):
        zoo.resolve("zoo:bigr_L_d24")
    said = capfd.readouterr().err
    assert "error: " in said
    assert "this looks like a binary_ae checkpoint: d6, 32 px, width 32; bigr_L_d24 is a" in said
    assert "Traceback" not in said
    assert sorted(os.listdir(tmp_path / "models")) == ["bigr_L_d24.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, small_zoo, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write .*file/models .*set BITGEN_CACHE"):
        zoo.resolve("zoo:tiny")
    monkeypatch.delenv("BITGEN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zoo.cache() == tmp_path / ".cache" / "bitgen"


def test_to_torch_takes_a_name(tmp_path, small_zoo):
    by_hand = zoo.placed(BY_HAND)
    by_hand.parent.mkdir(parents=True)
    save_bigr(by_hand)
    assert main(["--to-torch", "zoo:by_hand", str(tmp_path / "x.pt")]) == 0
    assert (tmp_path / "x.pt").stat().st_size > 10_000


CONTENT = bytes(range(256)) * 8


class Server:
    """In place of `urlopen`: serves CONTENT, the part that is asked for, or breaks off."""

    def __init__(self, ranges=True, breaks_at=None, content=CONTENT):
        self.ranges, self.breaks_at, self.content, self.asked = ranges, breaks_at, content, []

    def __call__(self, request, timeout):
        assert timeout > 0
        wanted = request.get_header("Range", "bytes=0-")
        self.asked.append((request.full_url, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if self.ranges else 0
        if start == len(self.content):
            raise urllib.error.HTTPError(request.full_url, 416, "past the end", Message(), None)
        response: Any = io.BytesIO(self.content[start : self.breaks_at])
        response.status = 206 if start else 200
        response.headers = {"Content-Length": str(len(self.content) - start)}
        return response


@pytest.fixture
def file_of_a_metric(tmp_path, monkeypatch):
    """zoo:net, and where it comes to lie."""
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path))
    digest = hashlib.sha256(CONTENT).hexdigest()[:8]
    entry = zoo.WeightsFile("net", "nets", "https://a.com/b/net.pth", 0.1, digest)
    monkeypatch.setattr(zoo, "WEIGHTS", {"net": entry})
    return tmp_path / "files" / "nets" / "net.pth"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(file_of_a_metric, monkeypatch, ranges):
    server = Server(ranges, breaks_at=700)
    monkeypatch.setattr(urllib.request, "urlopen", server)
    with pytest.raises(UserError, match=r"net cannot be downloaded: it broke off after 700 of"):
        zoo.fetch_weights("zoo:net")
    assert not file_of_a_metric.exists()
    server.breaks_at = None
    assert zoo.fetch_weights("zoo:net") == file_of_a_metric
    assert file_of_a_metric.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == ["bytes=0-", "bytes=700-"]
    assert zoo.fetch_weights("zoo:net") == file_of_a_metric
    assert len(server.asked) == 2
    # Killed between the last byte and the new name.
    file_of_a_metric.rename(file_of_a_metric.with_name(".net.pth.part"))
    if ranges:
        assert zoo.fetch_weights("zoo:net").read_bytes() == CONTENT
        assert server.asked[-1][1] == "bytes=2048-"


def test_a_download_that_fails_or_is_another_file_says_so(file_of_a_metric, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", Server(content=b"<html>no</html>"))
    with pytest.raises(UserError, match=r"what came is another file, of sha256 \w{8} and not"):
        zoo.fetch_weights("zoo:net")
    assert [path.name for path in file_of_a_metric.parent.iterdir()] == ["net.pth.lock"]

    def offline(request, timeout):
        raise urllib.error.URLError(OSError("no network"))

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(UserError) as raised:
        zoo.fetch_weights("zoo:net")
    said = str(raised.value)
    assert "net cannot be downloaded" in said
    assert "no network" in said
    assert f"get net.pth from https://a.com/b/net.pth and put it at {file_of_a_metric}" in said
    assert "\n" not in said


def test_the_files_of_metrics_are_the_published_ones():
    urls = {name: weights.url for name, weights in zoo.WEIGHTS.items()}
    hashed = "inception-2015-12-05-6726825d.pth"
    releases = "https://github.com/{}/releases/download/"
    assert urls == {
        "inception_pytorch_fid": releases.format("mseitzer/pytorch-fid")
        + f"fid_weights/pt_{hashed}",
        "inception_torch_fidelity": releases.format("toshas/torch-fidelity")
        + f"v0.2.0/weights-{hashed}",
        "inception_adm": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
        "ref_batches/classify_image_graph_def.pb",
    }
    assert [w.sha256 for w in zoo.WEIGHTS.values()] == ["6726825d", "6726825d", ""]
    assert {w.family for w in zoo.WEIGHTS.values()} == {"inception"}
