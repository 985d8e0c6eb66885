"""The models and settings that the parts share: shipped configs, shrunken in a rehearsal."""

import runpy
from pathlib import Path
from typing import Any

from helpers import small

from bitgen.modes import benchmark
from bitgen.samplers.images import make_plan

from .part import Context

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config(name: str) -> Any:
    """Returns the settings of FILE or FILE:SIZE of configs/."""
    file, _, size = name.partition(":")
    return runpy.run_path(str(CONFIGS / f"{file}.py"))["get_config"](*([size] if size else []))


def sampling(name: str, context: Context, short: bool = False) -> Any:
    """Returns the settings that a released model is drawn with, in bfloat16; weights are random.

    If short, with fewer steps: kernels and sizes are the same.
    """
    family, row = name.split("_", 1)
    c = config(f"{family}_released:{row}")
    c.sample.dtype = "bfloat16"
    if context.rehearse:
        folder = context.scratch / f"{family}-models"
        if not folder.exists():
            small.write_models(folder, family)
        c.generator, c.tokenizer = (str(folder / k / "model") for k in ("generator", "tokenizer"))
    if short or context.rehearse:
        changes = {"iterations": 4, "denoiser_steps": 8, "head_steps": 5}
        c.sampler.update({key: changes[key] for key in changes if key in c.sampler})
    return c


def released(name: str, context: Context, short: bool = False) -> tuple[Any, Any, Any]:
    """Returns generator, tokenizer and plan of `sampling`."""
    c = sampling(name, context, short)
    generator, tokenizer = (benchmark.module_of(c, kind) for kind in ("generator", "tokenizer"))
    return generator, tokenizer, make_plan(generator, c.sampler)
