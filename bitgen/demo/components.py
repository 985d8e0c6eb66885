"""The building blocks of the page's tabs: gradio, components with bitgen's defaults, and events."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from bitgen.demo.actions import Tools
from bitgen.errors import UserError
from bitgen.runtime.logging import log_info
from bitgen.samplers.edits import KINDS

NO_CLASS = "no class"

CSS = "footer {display: none !important}"

# Set before gradio is imported: no telemetry.
_NO_TELEMETRY = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}


def gradio() -> Any:
    """Returns the module with telemetry off; raises UserError that says how to install it."""
    os.environ.update(_NO_TELEMETRY)
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs gradio: pip install 'bitgen[demo]'") from None
    return gradio


def classes(tools: Tools) -> list[tuple[str, int]]:
    """Returns the choices of a class dropdown: names and numbers."""
    names = tools.pipeline.class_names
    return [(name if name == str(i) else f"{i}: {name}", i) for i, name in enumerate(names)]


def class_or_none(gr: Any, tools: Tools) -> Any:
    """Returns a dropdown of the classes and 'none'."""
    names = [(NO_CLASS, NO_CLASS), *classes(tools)]
    return gr.Dropdown(names, value=NO_CLASS, label="Class")


def seed_of(gr: Any) -> Any:
    """Returns a seed field."""
    return gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")


def guidance_of(gr: Any, kind: str) -> Any:
    """Returns a slider for the guidance of a kind of edit."""
    label = "Guidance" if "labels" in KINDS[kind].needs else "Guidance (of use with a class)"
    return gr.Slider(1, 12, KINDS[kind].guidance, step=0.1, label=label)


def steps_of(gr: Any, plan: Any) -> Any:
    """Returns a slider for the sampler's steps; None if it has none."""
    if not hasattr(plan, "iterations"):
        return None
    return gr.Slider(1, 100, plan.iterations, step=1, label="Steps")


def image_of(gr: Any, label: str, name: str, titled: bool = True) -> Any:
    """Returns a component for one picture, with its title in the corner."""
    return gr.Image(
        label=label,
        show_label=titled,
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
    )


def gallery_of(gr: Any, label: str, name: str | None = None, columns: int = 4) -> Any:
    """Returns a component for several pictures."""
    return gr.Gallery(
        label=label,
        format="png",
        columns=columns,
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
    )


def on(
    gr: Any,
    event: Callable[..., Any],
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    quick: bool = False,
) -> Any:
    """Calls `function` at an event; a UserError becomes a message on the page."""
    return event(
        clear(gr, function),
        inputs,
        outputs,
        queue=not quick,
        show_progress="hidden" if quick else "minimal",
        api_visibility="private",
    )


def clear(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with a UserError shown as a message, which leaves the page as it is.

    Other errors are shown by gradio in few words, and in full in the terminal.
    """

    def tell(e: Exception) -> Any:
        if isinstance(e, UserError):
            gr.Warning(str(e), title="This does not work", duration=15)
            return gr.skip()
        log_info(f"the page failed: {type(e).__name__}: {e}")
        raise gr.Error("something failed here: the terminal of the page says what") from e

    @functools.wraps(function)
    def stream(*args):
        try:
            yield from function(*args)
        except Exception as e:
            yield tell(e)

    @functools.wraps(function)
    def run(*args):
        try:
            return function(*args)
        except Exception as e:
            return tell(e)

    return stream if inspect.isgeneratorfunction(function) else run
