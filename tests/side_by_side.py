"""Times the original PyTorch code and bitgen in turn, on the same synthetic weights of real size.

    python tests/side_by_side.py bitdance_B_16x --reference=BitDance/imagenet_gen --batch=4

`--reference` is a checkout of the original: shallowdream204/BitDance's `imagenet_gen` for
`bitdance_*`, haoosz/BiGR for `bigr_*`. Each runs in a process of its own that is warm before the
first round, and the two take turns, so that a busy moment of the machine meets both. Generators
draw bits, not images: `bitdance_ae_d16c32` and `bigr_bae_*` time encoding and decoding. It prints
medians, ranges and the ratio. On a CPU there are as many threads as cores; on a GPU, which both
then share, the original runs as its scripts have it: TF32 products, and autocast with
`--dtype=bfloat16`. It is eager unless `--compiled`.
"""

import argparse
import contextlib
import functools
import gzip
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from helpers.synthetic import synthetic_state_dict

MANIFESTS = Path(__file__).parent / "manifests"
GUIDANCE = {"bitdance": 3.2, "bigr": 2.5}


def main() -> None:
    options = parse(sys.argv[1:])
    if options.worker:
        work(options)
        return
    with ready_workers(sys.argv[1:]) as workers:
        for row in take_turns(workers, options):
            told = []
            for kind in workers:
                median, least, most = (row[kind + end] for end in ("", "_least", "_most"))
                told.append(f"{kind} {median:.3g} s ({least:.3g} to {most:.3g})")
            print(f"{row['what']}:  {'  '.join(told)}  ratio {row['ratio']:.2f}", flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options of a command line; ends the process if they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted(path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("bi*.json.gz"))
    names = [n for n in names if n.startswith(("bitdance_", "bigr_"))]
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--reference", type=Path, required=True, help="checkout of the original")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--steps", type=int, default=100, help="of the head or the denoiser")
    parser.add_argument("--iterations", type=int, default=20, help="of BiGR's sampler")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compiled", action="store_true", help="the original by torch.compile")
    parser.add_argument("--worker", choices=["original", "bitgen"], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.reference.is_dir():
        parser.error(f"--reference={options.reference} is no directory: {parser.description}")
    return options


@contextlib.contextmanager
def ready_workers(
    arguments: Sequence[str],
    kinds: Sequence[str] = ("original", "bitgen"),
    patience: float = threading.TIMEOUT_MAX,
) -> Iterator[dict[str, "Worker"]]:
    """Starts a process for each kind, and ends them; entered, all are warm.

    `original` is eager or compiled as `arguments` say, `compiled` always compiled, and left out
    where that fails or is not done `patience` seconds after `original` is warm.
    """
    workers: dict[str, Worker] = {}
    try:
        for kind in kinds:
            extra = ["--worker=bitgen"] if kind == "bitgen" else ["--worker=original"]
            extra += ["--compiled"] if kind == "compiled" else []
            workers[kind] = Worker([*arguments, *extra])
        ready = {}
        for kind, worker in workers.items():
            timer = threading.Timer(patience, worker.process.kill)
            if kind == "compiled":
                timer.start()
            try:
                worker.calls = json.loads(worker.answer())
            except SystemExit:
                if kind != "compiled":
                    raise
                continue
            finally:
                timer.cancel()
            ready[kind] = worker
        yield ready
    finally:
        for worker in workers.values():
            worker.process.terminate()
            worker.process.wait()


class Worker:
    """A process that has one side's calls, and runs each when it is asked to."""

    def __init__(self, arguments: Sequence[str]):
        # On a GPU neither may take all memory for itself.
        env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if "--compiled" not in arguments:
            env["TORCHDYNAMO_DISABLE"] = "1"
        self.calls: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def seconds(self, call: str) -> float:
        """Runs a call once."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{call}\n")
        self.process.stdin.flush()
        return float(self.answer())

    def answer(self) -> str:
        """Returns what the worker says next, after what the original prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("> "):
                return line[2:]
        raise SystemExit("a worker ended: its error is above")


def take_turns(workers: dict[str, Worker], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields medians, ranges and ratios, in seconds, of each call that all workers have."""
    for call in workers["bitgen"].calls:
        seconds: dict[str, list[float]] = {kind: [] for kind in workers}
        for _ in range(options.rounds):
            for kind, worker in workers.items():
                seconds[kind].append(worker.seconds(call))
        row: dict[str, Any] = {
            "what": f"{options.name} {call}, {options.dtype}, batch {options.batch}"
        }
        ours = statistics.median(seconds["bitgen"])
        for kind, found in seconds.items():
            row |= {kind: statistics.median(found)}
            row |= {f"{kind}_least": min(found), f"{kind}_most": max(found)}
            if kind != "bitgen":
                name = "ratio" if kind == "original" else f"ratio_{kind}"
                row[name] = statistics.median(found) / ours
        yield row


def work(options: argparse.Namespace) -> None:
    """Says its calls once they are warm, and then the seconds of each that it is asked for."""
    spec = json.loads(gzip.decompress((MANIFESTS / f"{options.name}.json.gz").read_bytes()))
    make = original_calls if options.worker == "original" else bitgen_calls
    calls = make(spec, synthetic_state_dict(spec), options)
    for call in calls.values():
        call()
    print(">", json.dumps(list(calls)), flush=True)
    for name in sys.stdin:
        begin = time.perf_counter()
        calls[name.strip()]()
        print(">", time.perf_counter() - begin, flush=True)


# ------------------------------------------------------------------------------- the original
def original_calls(spec: dict, tensors: dict, options) -> dict[str, Callable[[], object]]:
    import torch

    sys.path.insert(0, str(options.reference))
    # Imported there and not needed: a GPU's attention, and what training reads and augments.
    unused = (
        "flash_attn timm.models.layers timm.models timm torchvision.transforms torchvision visdom"
    )
    for name in unused.split():
        sys.modules.setdefault(name, mock.MagicMock(flash_attn_func=None))
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.set_default_device("cuda")
        torch.set_float32_matmul_precision("high")
    else:
        torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    tensors = {name: torch.as_tensor(value) for name, value in tensors.items()}
    make = {"bitdance": _bitdance, "gfq_ae": _gfq_ae, "bigr": _bigr, "binary_ae": _binary_ae}
    calls = make[spec["family"]](spec["hparams"], tensors, options)

    def run(call):
        autocast = torch.autocast("cuda" if gpu else "cpu", torch.bfloat16)
        with autocast if options.dtype == "bfloat16" else contextlib.nullcontext():
            call()
        if gpu:
            torch.cuda.synchronize()

    return {name: functools.partial(run, call) for name, call in calls.items()}


def _load(model: Any, tensors: dict, strict: bool = True) -> None:
    """Gives the model its weights, on the device; some buffers are made on the CPU."""
    import torch

    model.load_state_dict(tensors, strict=strict)
    model.eval().to(torch.get_default_device())


def _compile(options, owner, *names: str) -> None:
    """Compiles methods that the original leaves to its users to compile."""
    import torch

    for name in names if options.compiled else ():
        setattr(owner, name, torch.compile(getattr(owner, name)))


def _bitdance(h: dict, tensors: dict, options) -> dict:
    import torch

    several = h.get("parallel_num", 1) > 1
    if several:
        from src import model_parallel as source
    else:
        from src import model as source
    fields = {
        "resolution": 256,
        "down_size": 16,
        "patch_size": 1,
        "latent_dim": 32,
        "diff_batch_mul": 4,
        "cls_token_num": 64,
        "num_classes": 1000,
        "P_std": 0.8,
        "P_mean": -0.8,
    }
    if several:
        fields |= {"parallel_num": h["parallel_num"], "parallel_mode": "patch"}
    model = source.BitDance_models[h["size"]](**fields)
    _load(model, tensors)
    model.vae.decode = lambda x: x
    labels = torch.arange(options.batch)
    return {"sample": lambda: model.sample(labels, options.steps, GUIDANCE["bitdance"])}


def _gfq_ae(h: dict, tensors: dict, options) -> dict:
    import torch
    from src import qae

    sizes = {"in_channels": 3, "out_ch": 3, **h}
    codebooks = sizes.pop("num_codebooks")
    model = qae.VQModel(sizes, num_codebooks=codebooks)
    _load(model, tensors, strict=False)
    _compile(options, model, "encode", "decode")
    images = torch.randn(options.batch, 3, 256, 256).clamp(-1, 1)
    codes = torch.sign(torch.randn(options.batch, h["z_channels"], 16, 16))
    return {"encode": lambda: model.encode(images), "decode": lambda: model.decode(codes)}


def _bigr(h: dict, tensors: dict, options) -> dict:
    import torch
    from llama import gpt

    _compile(options, gpt.TransformerBlock, "forward")
    _compile(options, gpt.DenoiseModel, "forward")
    model = gpt.BIGR_models["-".join(("BiGR", options.name.split("_")[1]))](
        block_size=h["block_size"],
        num_classes=h["num_classes"],
        cls_token_num=h["cls_token_num"],
        binary_size=h["binary_size"],
        p_flip=h["p_flip"],
        n_sample_steps=h["n_sample_steps"],
        infer_steps=options.steps,
        use_adaLN=h["use_adaLN"],
        seq_len=h["seq_len"],
    )
    _load(model, tensors, strict=False)
    labels = torch.arange(options.batch)

    def sample():
        model.generate_with_cfg(
            cond=labels,
            max_new_tokens=h["block_size"],
            cond_padding=h["cls_token_num"],
            num_iter=options.iterations,
            out_dim=h["binary_size"],
            cfg_scale=GUIDANCE["bigr"],
            gumbel_temp=0.01,
            gumbel_schedule="down",
            sample_logits=True,
            proj_emb=None,
        )

    return {"sample": sample}


def _binary_ae(h: dict, tensors: dict, options) -> dict:
    import torch
    from bae.binaryae import BinaryAutoEncoder

    model = BinaryAutoEncoder(types.SimpleNamespace(**h))
    tensors = {n.removeprefix("ae."): t for n, t in tensors.items() if n.startswith("ae.")}
    _load(model, tensors, strict=False)
    _compile(options, model, "encode", "decode")
    size = h["img_size"]
    images = torch.rand(options.batch, 3, size, size)
    codes = (torch.randn(options.batch, h["codebook_size"], size // 16, size // 16) > 0).float()
    return {"encode": lambda: model.encode(images), "decode": lambda: model.decode(codes)}


# ------------------------------------------------------------------------------------- bitgen
def bitgen_calls(spec: dict, tensors: dict, options) -> dict[str, Callable[[], object]]:
    import jax
    import jax.numpy as jnp

    from bitgen import build
    from bitgen.convert.directory import FAMILIES
    from bitgen.convert.rules import import_tensors
    from bitgen.samplers.images import default_plan, image_keys, prepare, sampler_of

    family = spec["family"]
    kind = "generator" if family in GUIDANCE else "tokenizer"
    source = FAMILIES[family].convert
    hparams = source.hparams_from_reference(spec["hparams"])
    module = build.make_module(kind, family, hparams).clone(dtype=build.DTYPES[options.dtype])
    tensors = {
        n: t for n, t in tensors.items() if not n.startswith(("vae.", "disc.", "perceptual."))
    }
    params, _ = import_tensors(source.table(hparams), tensors, build.param_shapes(module))
    params = jax.device_put(params)
    if kind == "generator":
        fields = {"guidance": GUIDANCE[family]}
        if family == "bitdance":
            fields["head_steps"] = options.steps
        else:
            fields |= {"denoiser_steps": options.steps, "iterations": options.iterations}
        plan = type(default_plan(family))(**fields)
        params = jax.block_until_ready(prepare(module, params))
        inputs = jnp.arange(options.batch), image_keys(0, np.arange(options.batch))
        sample_bits = sampler_of(module).sample_bits
        program = jax.jit(lambda p, *xs: sample_bits(module, p, *xs, plan))
        return {"sample": lambda: jax.block_until_ready(program(params, *inputs))}
    shape = (options.batch, module.image_size, module.image_size, 3)
    images = jax.random.uniform(jax.random.key(0), shape, minval=-1.0)
    codes = jax.random.bernoulli(jax.random.key(1), 0.5, (len(images), *module.grid, module.bits))

    def call(method, x):
        program = jax.jit(lambda p, x: module.apply({"params": p}, x, method=method))
        return lambda: jax.block_until_ready(program(params, x))

    return {"encode": call("encode", images), "decode": call("decode", codes)}


if __name__ == "__main__":
    main()
