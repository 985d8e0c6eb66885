"""The documentation: its example runs, and its commands are ones that bitgen takes."""

import functools
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import bitgen
from bitgen import build, config, main
from bitgen.convert import __main__ as convert
from bitgen.demo import settings as demo
from bitgen.hub import model_directory
from bitgen.modes import reconstruct, sample, tokenize, train
from bitgen.runtime import sharding
from bitgen.samplers import images

ROOT = Path(__file__).parent.parent
README_LINES = 180
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
REGISTRIES = (build.TOKENIZERS, build.GENERATORS, images.SAMPLERS, sharding.RULES)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """`get_config` of docs/extending.md's file; the names that it gives are gone afterwards."""
    for registry in REGISTRIES:
        for name in ("patches", "independent"):
            monkeypatch.setitem(registry, name, None)
    page = (ROOT / "docs" / "extending.md").read_text()
    (block,) = re.findall(r"```python[^\n]*\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_models.py").write_text(block)
    get_config = runpy.run_path(str(tmp_path / "my_models.py"))["get_config"]
    for registry in REGISTRIES:  # those that the file leaves alone
        for name in [name for name, value in registry.items() if value is None]:
            del registry[name]
    return get_config


@pytest.mark.slow
def test_the_example_is_trained_tokenized_with_and_sampled(example, tmp_path):
    own = tmp_path / "own"
    c = example("tokenizer")
    c.train.steps, c.train.log_every, c.train.preview_every = 30, 30, 0
    c.reconstruct.images = 64
    for mode, folder in ((train, "tokenizer"), (reconstruct, "tokenizer"), (tokenize, "")):
        c.tokenizer = str(own / "tokenizer" / "model") if mode is tokenize else ""
        mode.run(c, own / folder)
    assert (own / "tokenizer" / "reconstructions.png").is_file()
    g = example("generator")
    g.tokenizer = c.tokenizer
    g.data.source, g.data.path = "bits", str(own / "bits")
    g.train.steps, g.train.log_every, g.train.preview_every = 30, 30, 15
    g.sample.per_label = 1
    for mode in (train, sample):
        mode.run(g, own / "generator")
    with Image.open(own / "generator" / "samples.png") as sheet:
        assert sheet.width > 100

    model = bitgen.load(own / "generator" / "model")
    assert model.sample([1, 2], guidance=2.0).shape == (2, 32, 32, 3)
    again = model.decode(model.encode(np.zeros((32, 32, 3), np.uint8)))
    assert again.shape == (1, 32, 32, 3)
    (last,) = model.steps([3])
    assert last[1].all()


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_runs_as_it_stands_after_the_quickstart(page, tmp_path, monkeypatch):
    for kind, name in (("tokenizer", "tokenizer"), ("generator", "bigr")):
        c = runpy.run_path(str(ROOT / "configs" / f"digits_{name}.py"))["get_config"]()
        module, info = build.module_from_config(kind, c.model)
        params = jax.jit(functools.partial(build.init_params, module))(jax.random.key(0))
        directory = tmp_path / "runs" / "digits" / name / "model"
        if kind == "generator":
            info["origin"] = {"tokenizer": model_directory.identity(c.tokenizer)}
        monkeypatch.chdir(tmp_path)
        model_directory.write(directory, info, params)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 7
    exec(compile(block, page, "exec"), {})
    with Image.open("edited.png") as edited:
        assert edited.size == (32, 32)


def commands():
    """Yields page and words of every command line, in code blocks and in single backticks."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text())
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        blocks = [line for line in text.splitlines() if line.startswith("    ")]
        for line in [*spans, *blocks]:
            if re.search(r"--config\b|bitgen\.convert", line):
                words = shlex.split(line.split("  #")[0].replace("...", ""))
                yield page.name, words


def bases():
    """Every setting that there is."""
    yield config.base()
    yield from (config.tokenizer(family) for family in build.TOKENIZERS)
    yield from (config.generator(family) for family in build.GENERATORS)
    yield from (demo.defaults(family) for family in build.GENERATORS)


def check(words, example):
    """Raises what the command raises, or KeyError for a setting that is nowhere."""
    path, variant = main._config_file(words)
    settings = [word for word in words if word.startswith("--config.")]
    for word in words:
        if word.startswith("--mode="):
            assert word.split("=")[1] in main.MODES
    if "--help" in words:
        return
    if "bitgen.convert" in words:
        convert._parse(words[words.index("bitgen.convert") + 1 :])
    elif "bitgen.demo" in words:
        main._check_keys(demo.defaults(), settings)
    elif path == "my_models.py":
        main._check_keys(example(*variant), settings)
    elif path.startswith("configs/"):
        main._check_keys(main._load(str(ROOT / path), variant), settings)
    else:
        for word in settings:
            if not any(_has(c, word) for c in bases()):
                raise KeyError(f"no config has {word}")


def _has(c, word):
    try:
        main._check_keys(c, [word])
    except bitgen.UserError:
        return False
    return True


def test_every_command_is_one_that_bitgen_takes(example):
    found = list(commands())
    assert len(found) > 60
    assert {name for name, _ in found} >= {"README.md", "originals.md", "extending.md"}
    faults = []
    for name, words in found:
        try:
            check(words, example)
        except Exception as e:
            faults.append(f"{name}: {' '.join(words)}: {e}")
    assert not faults, "\n".join(faults)


def test_a_command_that_bitgen_does_not_take_is_found(example):
    for line, error in (
        ("--config=configs/bigr.py:M", bitgen.UserError),
        ("--config=configs/bigr.py:L --config.train.step=1", bitgen.UserError),
        ("--config.trian.steps=1", KeyError),
        ("python -m bitgen.convert --list --all", bitgen.UserError),
    ):
        with pytest.raises(error):
            check(line.split(), example)


def test_the_pages_are_in_the_menu_and_name_what_there_is():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES[1:]:
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in menu, page
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            pkgutil.resolve_name(name)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_code_page_names_files_that_are_there():
    page = (ROOT / "docs" / "code.md").read_text()
    names = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)", page)
    assert len(names) > 30
    for name in names:
        assert (ROOT / "bitgen" / name).is_file(), name


def test_tests_that_pages_name_are_there():
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for page in PAGES:
        for name in re.findall(r"\btest_\w+\.py", page.read_text()):
            assert name in there, (page.name, name)
