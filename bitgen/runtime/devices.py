"""Memory, peak FLOP/s and bandwidth of known accelerators, from the makers' pages."""

import dataclasses
from typing import Any

from bitgen.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as jax counts them: a chip of a TPU, a GPU."""

    memory: int  # bytes
    flops: float  # dense bfloat16 operations a second
    bandwidth: float  # bytes a second, of the memory
    kinds: tuple[str, ...]  # how jax's `device_kind` of one begins


DEVICES = {
    "TPU v4": Device(32 * GIB, 275e12, 1228e9, ("TPU v4",)),
    "TPU v5e": Device(16 * GIB, 197e12, 819e9, ("TPU v5 lite", "TPU v5e")),
    "TPU v5p": Device(95 * GIB, 459e12, 2765e9, ("TPU v5",)),
    "TPU v6e": Device(32 * GIB, 918e12, 1640e9, ("TPU v6 lite", "TPU v6e")),
    "A100 40GB": Device(40 * GIB, 312e12, 1555e9, ("NVIDIA A100",)),
    "A100 80GB": Device(80 * GIB, 312e12, 2039e9, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB")),
    "L4": Device(24 * GIB, 121e12, 300e9, ("NVIDIA L4",)),
    "L40S": Device(48 * GIB, 362e12, 864e9, ("NVIDIA L40S",)),
    "RTX 4090": Device(24 * GIB, 165e12, 1008e9, ("NVIDIA GeForce RTX 4090",)),
    "H100": Device(80 * GIB, 989e12, 3350e9, ("NVIDIA H100",)),
    "H100 PCIe": Device(80 * GIB, 756e12, 2000e9, ("NVIDIA H100 PCIe",)),
    "H200": Device(141 * 10**9, 989e12, 4800e9, ("NVIDIA H200",)),
    "B200": Device(180 * 10**9, 2250e12, 8000e9, ("NVIDIA B200",)),
}


def by_name(name: str) -> Device:
    """Returns a device by name in any case; raises UserError with the names if there is none."""
    for known, device in DEVICES.items():
        if known.lower() == name.lower():
            return device
    raise UserError(f"unknown device {name!r}, have {sorted(DEVICES)}")


def by_kind(kind: str) -> Device | None:
    """Returns the known device whose name begins a jax device's `device_kind`, the longest one."""
    found = [
        (len(begin), device)
        for device in DEVICES.values()
        for begin in device.kinds
        if kind.startswith(begin)
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def memory_of(device: Any) -> int | None:
    """Returns the bytes of memory of a jax device, or None if they are not known."""
    stats = device.memory_stats() or {}
    known = by_kind(device.device_kind)
    return stats.get("bytes_limit") or (known.memory if known else None)
