"""Schedules of guidance and noise over a sampler's steps."""

import numpy as np
from jaxtyping import Float

from bitgen.errors import UserError


def guidance_schedule(
    scale: float, schedule: str, ratios: Float[np.ndarray, " i"]
) -> Float[np.ndarray, " i"]:
    """Returns the guidance at each ratio in (0, 1] of the steps done: constant, or linear from 1.

    Raises UserError for another schedule.
    """
    if schedule == "constant":
        return np.full(len(ratios), scale, np.float32)
    if schedule == "linear":
        return (1 + (scale - 1) * ratios).astype(np.float32)
    raise UserError(f"unknown guidance schedule {schedule!r}, have ['constant', 'linear']")


def temperature_schedule(
    temperature: float, schedule: str, ratios: Float[np.ndarray, " i"]
) -> Float[np.ndarray, " i"]:
    """Returns the temperature at each ratio: constant, up from 0, or down to 0.

    Raises UserError for another schedule.
    """
    if schedule == "constant":
        return np.full(len(ratios), temperature, np.float32)
    if schedule == "up":
        return (temperature * ratios).astype(np.float32)
    if schedule == "down":
        return (temperature * (1 - ratios)).astype(np.float32)
    raise UserError(f"unknown Gumbel schedule {schedule!r}, have ['constant', 'down', 'up']")
