"""python -m bitgen.demo [--config.generator=DIR] [--config.KEY=VALUE ...].

A page to generate and edit with a model directory or zoo:NAME; by default the quickstart's model.
It is served to this machine only, unless --config.host=0.0.0.0. bitgen/demo/settings.py lists the
settings.
"""

import sys
from collections.abc import Sequence
from typing import Any

from bitgen.errors import UserError
from bitgen.runtime.logging import log_info, quiet


def main(argv: Sequence[str] = tuple(sys.argv)) -> int:
    """Serves the page until it is interrupted; returns 0, or 2 after one line about bad input."""
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    from bitgen.demo import components, page, settings

    try:
        config = settings.parse(argv)
        quiet()
        components.gradio()
        serve(page.build(load(config)), config)
    except UserError as e:
        log_info(f"error: {e}")
        return 2
    return 0


def load(config: Any) -> Any:
    """Returns the page's `Tools`; raises UserError if a model cannot be loaded."""
    from bitgen import api
    from bitgen.demo.actions import Tools
    from bitgen.demo.uploads import Limits
    from bitgen.runtime.mesh import make_mesh

    mesh = make_mesh(**config.mesh)
    if config.generator:
        pipeline = api.load(
            config.generator, config.tokenizer or None, mesh=mesh, dtype=config.dtype
        )
    elif config.tokenizer:
        pipeline = api.load(config.tokenizer, mesh=mesh, dtype=config.dtype)
    else:
        raise UserError("no model given: set --config.generator=DIR or --config.tokenizer=DIR")
    tokenizers = {pipeline.tokenizer.path: pipeline}
    for path in filter(None, (part.strip() for part in config.tokenizers.split(","))):
        other = api.load(path, mesh=mesh, dtype=config.dtype)
        if other.generator is not None:
            raise UserError(f"{path} is a generator: config.tokenizers takes tokenizers")
        tokenizers.setdefault(other.tokenizer.path, other)
    sampler = config.sampler.to_dict()
    if not sampler.get("denoiser_steps", 1):
        del sampler["denoiser_steps"]
    if pipeline.generator is None:
        sampler = {}
    limits = Limits(config.images, config.megabytes, config.megapixels)
    return Tools(pipeline, tokenizers, limits, sampler, config.preview_every)


def serve(page: Any, config: Any) -> None:
    """Serves the page until it is interrupted; raises UserError if its port is taken."""
    from bitgen.demo.components import CSS, gradio

    gr = gradio()
    page.queue(max_size=config.queue, default_concurrency_limit=1, api_open=False)
    try:
        _, url, _ = page.launch(
            server_name=config.host,
            server_port=config.port or None,
            share=False,
            quiet=True,
            ssr_mode=False,
            show_error=True,
            footer_links=[],
            prevent_thread_lock=True,
            # A little above the page's own limit, whose message is clearer.
            max_file_size=int(config.megabytes * 1.5e6),
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=CSS,
        )
    except OSError as e:
        raise UserError(
            f"cannot serve at {config.host} port {config.port} ({e}): set --config.port"
        ) from None
    log_info(f"open {url}  (Ctrl+C ends it)")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
