"""Bars: on a terminal, of the first process alone; elsewhere nothing, or lines."""

import contextlib
import os
import pty
import sys
import threading

import jax
import numpy as np
import pytest
from helpers import small
from helpers.checkpoint_files import save_bigr

from bitgen import config
from bitgen.convert.directory import export_file, import_file
from bitgen.hub.download import download
from bitgen.modes import evaluate, reconstruct, sample, tokenize
from bitgen.runtime import progress
from bitgen.runtime.logging import log_info
from bitgen.runtime.progress import ProgressBar, with_progress


@contextlib.contextmanager
def terminal(monkeypatch):
    """Standard error is a terminal; gives what was written to it, once it is over."""
    ours, theirs = pty.openpty()
    parts = []

    def read():
        with contextlib.suppress(OSError):  # closed
            while part := os.read(ours, 4096):
                parts.append(part.decode())

    reader = threading.Thread(target=read)
    reader.start()
    shown: list[str] = []
    with monkeypatch.context() as patch, open(theirs, "w") as stderr:
        patch.setattr(sys, "stderr", stderr)
        yield shown
    reader.join(10)
    os.close(ours)
    shown.append("".join(parts))


def bar_of(count=3):
    with ProgressBar("drawn", count) as bar:
        for _ in range(count):
            bar.add(1)


def test_a_terminal_gets_a_bar_and_a_log_a_line(monkeypatch, capsys):
    with terminal(monkeypatch) as shown:
        bar_of()
    assert "drawn:   0%|" in shown[0]
    assert shown[0].rstrip().splitlines()[-1].startswith("drawn 3/3 images")
    bar_of()
    line, *rest = capsys.readouterr().err.splitlines()
    assert line.startswith("drawn 3/3 images, ")
    assert not rest


def test_the_other_processes_are_silent(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    bar_of()
    assert capsys.readouterr().err == ""
    with terminal(monkeypatch) as shown:
        bar_of()
    assert shown == [""]


def test_lines_come_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_EVERY", -1)
    assert list(with_progress([[1, 2], [3]], "read", 3, len)) == [[1, 2], [3]]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["read 2/3 images", "read 3/3 images"]


def test_no_last_line_after_an_error(capsys):
    def items():
        yield [1]
        raise KeyError

    with pytest.raises(KeyError):
        list(with_progress(items(), "drawn", 3, len))
    assert capsys.readouterr().err == ""


def test_a_line_is_said_above_the_bar(monkeypatch):
    with terminal(monkeypatch) as shown, ProgressBar("drawn", 3) as bar:
        bar.add(1)
        log_info("by the way")
    # The bar's line is emptied first, and drawn again below.
    before, _, after = shown[0].partition("by the way")
    assert before.endswith("\r")
    assert "drawn:" in after


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return small.write_models(tmp_path_factory.mktemp("runs"))


def long_work(models, folder):
    """Yields the name of each thing that takes long, and a function that does it, shrunk."""
    generator, tokenizer = (str(path) for path in models)
    c = config.base()
    c.tokenizer, c.generator = tokenizer, generator
    c.data.image_size, c.data.threads = 8, 1
    c.sampler.iterations, c.sampler.denoiser_steps = 1, 1
    c.reconstruct.images = c.evaluate.images = c.evaluate.manifold = 16
    c.evaluate.kind, c.evaluate.protocol = "reconstruction", "none"
    c.tokenize.split = "test"
    checkpoint = folder / "bigr.pt"
    save_bigr(checkpoint)
    yield "sampled", lambda: sample.run(c, folder / "sample")
    yield "tokenized", lambda: tokenize.run(c, folder / "tokenize")
    yield "reconstructed", lambda: reconstruct.run(c, folder / "reconstruct")
    yield "reconstructed", lambda: evaluate.run(c, folder / "evaluate")
    yield "converting", lambda: import_file(checkpoint, folder / "model")
    yield "writing", lambda: export_file(folder / "model", folder / "back.pt")
    yield "file.bin", lambda: download((folder / "x").as_uri(), folder / "cache" / "file.bin")


def test_all_long_work_has_a_bar(models, tmp_path, monkeypatch, capfd):
    (tmp_path / "x").write_bytes(bytes(np.arange(100, dtype=np.uint8)))
    for name in ("sample", "tokenize", "reconstruct", "evaluate"):
        (tmp_path / name).mkdir()
    for what, work in long_work(models, tmp_path):
        with terminal(monkeypatch) as shown:
            work()
        assert f"\r{what}:   0%|" in shown[0], (what, shown[0])
    for name in ("sample", "tokenize"):  # which would have nothing left to do
        (tmp_path / name).rename(tmp_path / f"{name}_before")
        (tmp_path / name).mkdir()
    capfd.readouterr()
    for what, work in long_work(models, tmp_path):
        work()
        seen = capfd.readouterr().err
        assert "\r" not in seen, what
        assert "%|" not in seen, what
