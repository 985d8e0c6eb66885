"""bitgen: binary and bitwise image generation in JAX.

import bitgen
model = bitgen.load("runs/digits/bigr/model")  # or the name of a released model
model.sample("3,7", to="pil")
"""

from typing import TYPE_CHECKING, Any

from bitgen.errors import UserError
from bitgen.version import __version__

if TYPE_CHECKING:
    from bitgen.api import Pipeline, load

__all__ = ["Pipeline", "UserError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Imports the API, and with it JAX, when it is asked for."""
    if name in ("Pipeline", "load"):
        from bitgen import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
