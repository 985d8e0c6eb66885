"""What must hold on every device: the reference's outputs, attention, finite numbers."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitgen.build import param_shapes
from bitgen.errors import first_line
from bitgen.nn.attention import attend
from bitgen.profiling.roofline import random_values
from bitgen.samplers.images import image_keys, sampler_of

from .models import released
from .part import Context

TESTS = Path(__file__).resolve().parents[1]
LENGTHS = (256, 257, 319)
# A half's last digit is 2^-8; sums of products of them lose a few.
HALVES = 2e-2


# ------------------------------------------------------------------------------------ goldens
def goldens(context: Context) -> Iterator[dict[str, Any]]:
    """Every golden by the parity script in full float32, and samplers' statistics in bfloat16."""
    names = sorted(path.stem for path in (TESTS / "goldens").glob("*.json"))
    drawn = [name for name in names if name.startswith(("bigr_", "bitdance_"))]
    if context.rehearse:
        names, drawn = ["bae_tiny", "dcae_tiny"], ["bitdance_tiny_4x"]
    # What draws samples takes longest, and begins first.
    tasks = [(name, "bfloat16") for name in drawn] + [(name, "float32") for name in drawn]
    tasks += [(name, "float32") for name in names if name not in drawn]
    with ThreadPoolExecutor(min(6, context.jobs)) as pool:
        for done in as_completed([pool.submit(_golden, *task) for task in tasks]):
            yield done.result()


def _golden(name: str, dtype: str) -> dict[str, Any]:
    command = [sys.executable, str(TESTS / "parity.py"), str(TESTS / "goldens" / f"{name}.json")]
    env = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest", "NVIDIA_TF32_OVERRIDE": "0"}
    if dtype != "float32":
        command.append(f"--dtype={dtype}")
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    print(done.stdout, done.stderr)  # for the log
    # "ok     hidden: largest error 1e-06, 0.005 of tolerance 0.0002"
    found = re.findall(r"^(?:ok|FAILED) +(\S+): largest error \S+, (\S+) (.*)$", done.stdout, re.M)
    worst = max(found, key=lambda row: float(row[1].replace("nan", "inf")), default=("", "inf", ""))
    return {
        "what": f"{name}, {dtype}",
        "holds": done.returncode == 0 and bool(found),
        "arrays": len(found),
        "worst": f"{worst[0]}: {worst[1]} {worst[2]}",
    }


# ---------------------------------------------------------------------------------- attention
def attention(context: Context) -> Iterator[dict[str, Any]]:
    """Values and gradients in bfloat16, of each kernel, against XLA's in full float32."""
    b, heads, c = (1, 2, 16) if context.rehearse else (4, 16, 64)
    for n in LENGTHS:
        for name, mask in (
            ("all", None),
            ("causal", np.tri(n, dtype=bool)),
            ("groups", _groups(n)),
        ):
            keys = jax.random.split(jax.random.key(n), 4)
            q, k, v, g = (jax.random.normal(key, (b, n, heads, c), jnp.bfloat16) for key in keys)
            with jax.default_matmul_precision("highest"):
                exact = _with_gradients("xla", mask, *(x.astype(jnp.float32) for x in (q, k, v, g)))
            row: dict[str, Any] = {"what": f"length {n}, mask {name}"}
            for kernel in ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",):
                try:
                    ours = _with_gradients(kernel, mask, q, k, v, g)
                except Exception as e:  # whatever it is, the other kernels and lengths go on
                    row |= {kernel: first_line(e)[:120], "holds": False}
                    continue
                errors = [_error(x, y) for x, y in zip(ours, exact, strict=True)]
                row |= {f"{kernel}_value": errors[0], f"{kernel}_gradient": max(errors[1:])}
                row["holds"] = row.get("holds", True) and max(errors) <= HALVES
            yield row


def _groups(n: int) -> np.ndarray:
    """Each reads its group and those before, as where 16 tokens are drawn together."""
    group = np.arange(n) // 16
    return group[:, None] >= group[None]


def _with_gradients(kernel: str, mask: Any, q: Any, k: Any, v: Any, g: Any) -> tuple[Any, ...]:
    def both(q, k, v, g):
        y, back = jax.vjp(lambda *qkv: attend(*qkv, mask, kernel), q, k, v)
        return y, *back(g)

    return jax.jit(both)(q, k, v, g)


def _error(x: jax.Array, exact: jax.Array) -> float:
    """|x - exact| / |exact|; infinite if not finite."""
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    error = float(np.linalg.norm(x - exact) / np.linalg.norm(exact))
    return error if np.isfinite(error) else float("inf")


# ----------------------------------------------------------------------------------- samplers
def sampler(name: str, context: Context) -> Iterator[dict[str, Any]]:
    """A released size in bfloat16, few steps: bits of both values, finite images."""
    generator, tokenizer, plan = released(name, context, short=True)

    def draw(params, tokenizer_params, labels, keys):
        bits = sampler_of(generator).sample_bits(generator, params, labels, keys, plan)
        return bits, tokenizer.apply({"params": tokenizer_params}, bits, method="decode")

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = [random_values(param_shapes(module), here) for module in (generator, tokenizer)]
    bits, images = jax.jit(draw)(*params, jnp.arange(2), image_keys(0, np.arange(2)))
    share, finite = float(jnp.mean(bits)), bool(jnp.all(jnp.isfinite(images)))
    yield {
        "what": f"{name}, bfloat16, few steps",
        "holds": finite and 0.01 < share < 0.99,
        "ones": share,
        "finite": finite,
    }
