"""Settings of the page, and how they are read from the command line."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from bitgen.errors import UserError, choose
from bitgen.hub import model_directory
from bitgen.samplers.images import default_plan

_BOOLS = {"true": True, "1": True, "false": False, "0": False}
QUICKSTART = "runs/digits/bigr/model"  # where launch/quickstart.sh leaves its generator


def defaults(family: str = "bigr") -> Any:
    """Returns every setting with its default, for a generator of a family."""
    config: Any = ConfigDict()
    config.generator = QUICKSTART  # model directory or zoo:NAME; '': tokenizers alone
    config.tokenizer = ""  # the generator's; '': found near it by its digest
    config.tokenizers = ""  # more of them to compare: DIR,zoo:NAME
    config.host = "127.0.0.1"  # 0.0.0.0: everyone in the network can use it
    config.port = 7860
    config.queue = 16  # requests that wait; more are turned away
    config.images = 16  # drawn at a time at most
    config.megabytes = 20.0  # of an upload
    config.megapixels = 40.0  # of an upload
    config.dtype = "float32"  # of the computation; bfloat16 is faster on TPU and GPU
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.preview_every = 1  # steps of the sampler
    config.sampler = ConfigDict(dataclasses.asdict(default_plan(family)))
    if family == "bigr":
        # One program to compile instead of four; 4 computes less for each image.
        config.sampler.segments = 1
        config.sampler.denoiser_steps = 0  # 0: 100, or as many as it was trained with
    return config


def parse(argv: Sequence[str]) -> Any:
    """Returns the settings, changed by --config.KEY=VALUE; raises UserError for anything else."""
    generator = defaults().generator
    for argument in argv[1:]:
        name, _, value = argument.partition("=")
        if name == "--config.generator":
            generator = value
    config = defaults(_family(generator))
    for argument in argv[1:]:
        name, equals, value = argument.partition("=")
        if not name.startswith("--config.") or not equals:
            raise UserError(f"unexpected argument {argument!r}; settings look like --config.port=1")
        _set(config, name.removeprefix("--config.").split("."), value)
    for name in ("images", "megabytes", "megapixels", "queue", "preview_every"):
        if config[name] <= 0:
            raise UserError(f"config.{name} must be above 0, got {config[name]}")
    if not 0 <= config.port < 65536:
        raise UserError(f"config.port must be from 0 to 65535, got {config.port}")
    return config


def _set(config: Any, keys: list[str], text: str) -> None:
    """Changes one setting to the value of a text, in the setting's own type."""
    seen = "config"
    for key in keys[:-1]:
        choose(f"key in {seen}:", key, config)
        config, seen = config[key], f"{seen}.{key}"
        if not isinstance(config, ConfigDict):
            raise UserError(f"{seen} is a value, it has no {keys[-1]!r}")
    choose(f"key in {seen}:", keys[-1], config)
    value: Any = config[keys[-1]]
    if isinstance(value, ConfigDict):
        raise UserError(f"{seen}.{keys[-1]} is a group, set one of {sorted(value)}")
    kind: Any = type(value)
    try:
        config[keys[-1]] = _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise UserError(f"{seen}.{keys[-1]} takes {kind.__name__}, got {text!r}") from None


def _family(generator: str) -> str:
    """Returns the family of a generator, which determines the sampler's settings."""
    if not generator:
        return "bigr"
    try:
        info = model_directory.read_info(generator)
    except UserError as e:
        if generator == QUICKSTART:
            raise UserError(
                f"{e}; launch/quickstart.sh trains one, or name yours: --config.generator=DIR"
            ) from None
        raise
    if info["kind"] != "generator":
        raise UserError(
            f"{generator} holds a {info['kind']}: give it by --config.tokenizer, and "
            "--config.generator= (nothing) to look at tokenizers alone"
        )
    return info["family"]
