"""Schedules of guidance and noise over a sampler's steps."""

import numpy as np
from jaxtyping import Float

from bitgen.errors import choose


def guidance_schedule(
    scale: float, schedule: str, ratios: Float[np.ndarray, " i"]
) -> Float[np.ndarray, " i"]:
    """Returns the guidance scale at each share in [0, 1] of the steps, constant or linear from 1.

    Raises UserError for another schedule.
    """
    values = {"constant": np.full(len(ratios), scale), "linear": 1 + (scale - 1) * ratios}
    return choose("guidance schedule", schedule, values).astype(np.float32)


def temperature_schedule(
    temperature: float, schedule: str, ratios: Float[np.ndarray, " i"]
) -> Float[np.ndarray, " i"]:
    """Returns the temperature at each share of the steps: constant, up from 0, or down to 0.

    Raises UserError for another schedule.
    """
    shares = {"constant": np.ones(len(ratios)), "up": ratios, "down": 1 - ratios}
    return (temperature * choose("Gumbel schedule", schedule, shares)).astype(np.float32)
