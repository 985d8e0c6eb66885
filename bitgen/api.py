"""The Python API: `bitgen.load(...)`, then `encode`, `decode`, `sample` and `edit`.

model = bitgen.load("runs/digits/bigr/model")
images = model.sample("3,7", seed=1, guidance=2.0, to="pil")
bits = model.encode(images)  # bool [2, h, w, k]
again = model.decode(bits)  # uint8 [2, S, S, 3]
edited = model.edit(images[0], "inpaint", box=(0, 0, 16, 16), label=8)
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, UInt8

from bitgen import config
from bitgen.build import DTYPES
from bitgen.errors import UserError, choose
from bitgen.hub import model_directory, zoo
from bitgen.hub.model_directory import Model
from bitgen.images import inputs
from bitgen.images.inputs import (
    as_picture,
    give,
    read_image,
    read_mask,
    several,
)
from bitgen.images.pixels import from_uint8
from bitgen.labels import class_names_of, parse_labels
from bitgen.runtime.mesh import batch_sharding, make_mesh, replicated, round_up_batch
from bitgen.samplers import edits
from bitgen.samplers.images import Plan, default_plan, make_plan, prepare, sample_images
from bitgen.samplers.progressive import progressive_images

# One picture or several: PIL, a file, uint8 of any size [H, W, 3], float in [-1, 1] in the model's
# size [S, S, 3], and lists of those or arrays with a leading axis.
Pictures = Any
Labels = str | int | Sequence[int] | np.ndarray
Out = Literal["uint8", "float", "pil"]
# Bool [b, h, w, k], a tuple of them of a tokenizer of several scales, or latents [b, h, w, c].
Codes = Any


def load(
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: str = "float32",
) -> "Pipeline":
    """Returns a model to use: a generator with its tokenizer, or a tokenizer alone.

    Args:
      path: model directory, or name of a released model with or without zoo: before it.
      tokenizer: of a generator, in the same form. By default that of the released model, or the one
        that the generator was trained with, if it lies nearby (as in a run's workdirs).
      mesh: devices that share the work, all with `make_mesh()`; by default the first.
      dtype: of the computation, float32 or bfloat16.

    Raises UserError if a model cannot be read, or the two do not fit.
    """
    choose("dtype", dtype, DTYPES)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    path = _name(path)
    if model_directory.read_info(path)["kind"] == "generator":
        settings = config.base()
        settings.generator = path
        settings.tokenizer = _name(tokenizer) if tokenizer else find_tokenizer(path)
        settings.sample.dtype = dtype
        generator, found = model_directory.load_pair(settings, Path(), replicated(mesh))
        return Pipeline(found, generator, mesh)
    if tokenizer:
        raise UserError(f"{path} is a tokenizer itself: leave tokenizer={str(tokenizer)!r} out")
    model = model_directory.load(path, "tokenizer", replicated(mesh))
    model = dataclasses.replace(model, module=model.module.clone(dtype=DTYPES[dtype]))
    return Pipeline(model, None, mesh)


def find_tokenizer(path: str) -> str:
    """Returns the tokenizer of a generator: by name if released, else by its digest nearby.

    Raises UserError if it is not found.
    """
    if path.startswith("zoo:"):
        return f"zoo:{zoo.get(path).tokenizer}"
    origin = model_directory.read_info(path).get("origin")
    wanted = origin.get("tokenizer") if isinstance(origin, dict) else None
    if not isinstance(wanted, dict) or not wanted.get("digest"):
        raise UserError(f"{path} does not say which tokenizer it needs: give tokenizer=DIR")
    directory = Path(path).resolve()
    for folder in (directory.parent, directory.parent.parent):
        for file in sorted([*folder.glob("*/model.json"), *folder.glob("*/model/model.json")]):
            try:
                info = model_directory.read_info(file.parent)
            except UserError:
                continue
            if info.get("kind") == "tokenizer" and info.get("digest") == wanted["digest"]:
                return str(file.parent)
    raise UserError(
        f"the tokenizer of {path} ({wanted.get('family')}, digest {wanted['digest']}) was not "
        "found nearby: give tokenizer=DIR"
    )


class Pipeline:
    """A loaded tokenizer, and the generator of its bits if there is one.

    Arrays are returned as NumPy on this process. Each batch shape and plan is compiled once. Bad
    input raises `bitgen.UserError`.
    """

    def __init__(self, tokenizer: Model, generator: Model | None, mesh: Mesh):
        self.tokenizer, self.generator, self.mesh = tokenizer, generator, mesh
        module, sharding = tokenizer.module, batch_sharding(mesh)

        def encode(params, images):
            return module.apply({"params": params}, images, method="encode")

        def decode(params, codes):
            return module.apply({"params": params}, codes, method="decode")

        self._encode, self._decode = (
            jax.jit(function, in_shardings=(replicated(mesh), sharding), out_shardings=sharding)
            for function in (encode, decode)
        )
        self._prepared: Model | None = None  # the generator, its parameters as samplers read them

    @property
    def image_size(self) -> int:
        """Pixels along the side of an image."""
        return self.tokenizer.module.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (h, w) of an image."""
        return tuple(self.tokenizer.module.grid)

    @property
    def class_names(self) -> list[str]:
        """Names of the generator's classes; numbers if they have no names."""
        info = self._generator().info
        names = class_names_of(info)
        return names or [str(label) for label in range(info["hparams"]["num_classes"])]

    def plan(self, **settings: Any) -> Plan:
        """Returns the settings of the generator's sampler, with the given ones changed.

        By default, there are at most as many denoiser steps as in training.
        """
        generator = self._generator()
        fields = dataclasses.asdict(default_plan(generator.info["family"]))
        if "denoiser_steps" in fields:
            trained = generator.module.diffusion_steps
            fields["denoiser_steps"] = min(fields["denoiser_steps"], trained)
        for name in settings:
            choose("setting of the sampler", name, fields)
        return make_plan(generator.module, {**fields, **settings})

    def encode(self, images: Pictures, *, batch_size: int = 64) -> Codes:
        """Returns the codes of pictures; uint8 ones and files are cropped to the model's size.

        Bool [b, h, w, k]; a tuple of them from a tokenizer with several scales; float32 [b, h, w,
        c] from one with continuous latents.
        """
        return self._batched(self._encode, self.read(images), batch_size)

    def decode(self, codes: Codes, *, to: Out = "uint8", batch_size: int = 64) -> Any:
        """Returns the images of codes from `encode`, [b, S, S, 3] or a list of PIL images.

        `to="float"` gives the decoder's output, about [-1, 1], not clipped.
        """
        images = self._batched(self._decode, check_codes(self.tokenizer.module, codes), batch_size)
        return give(images, to)

    def sample(
        self,
        labels: Labels,
        *,
        seed: int = 0,
        to: Out = "uint8",
        batch_size: int = 64,
        **settings: Any,
    ) -> Any:
        """Returns an image for each label, [b, S, S, 3] or a list of PIL images.

        Args:
          labels: numbers, or text such as "0-9" or "goldfish,otter".
          seed: an image depends only on the seed, its label and its position.
          to: "uint8", "float" in [-1, 1], or "pil".
          batch_size: number of images drawn together.
          **settings: of the sampler, such as guidance and iterations; see `plan`.
        """
        plan, labels = self.plan(**settings), self.labels(labels)
        if batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        if self._prepared is None:  # once for many calls
            params = prepare(self._generator().module, self._generator().params)
            self._prepared = dataclasses.replace(self._generator(), params=params)
        images = sample_images(
            self._prepared,
            self.tokenizer,
            labels,
            plan,
            self.mesh,
            seed=seed,
            batch_size=batch_size,
        )
        return give(np.concatenate(list(images)), to)

    def steps(
        self, labels: Labels, *, seed: int = 0, every: int = 1, **settings: Any
    ) -> Iterator[tuple[UInt8[np.ndarray, "b S S 3"], Bool[np.ndarray, "b h w"]]]:
        """Yields the images of `sample` while they are drawn, grey where no token is drawn yet.

        The second value tells which tokens are drawn. One of `every` steps is yielded, and the last
        one. All images are one batch.
        """
        plan, labels = self.plan(**settings), self.labels(labels)
        if every < 1:
            raise UserError(f"every must be 1 or more, got {every}")
        yield from progressive_images(
            self._generator(), self.tokenizer, labels, plan, self.mesh, seed=seed, every=every
        )

    def edit(
        self,
        image: Pictures = None,
        kind: str = "inpaint",
        *,
        mask: Any = None,
        box: Sequence[int] | None = None,
        label: str | int | None = None,
        labels: Labels | None = None,
        seed: int = 0,
        to: Out = "uint8",
        sampler: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        """Returns variants of one picture, [v, S, S, 3] or a list of PIL images; BiGR only.

        Args:
          image: the picture, of any size; none for interpolate.
          kind: inpaint, outpaint, edit, interpolate or enrich, as in mode `edit`.
          mask: where to draw (to keep, for outpaint): bool in the picture's size [H, W] or the
            grid's [h, w], PIL image or file.
          box: instead of a mask, (x0, y0, x1, y1) in pixels of the picture.
          label: class to draw.
          labels: two classes to interpolate.
          seed: of the variants.
          to: "uint8", "float" in [-1, 1], or "pil".
          sampler: settings of the sampler that `config.edit` does not have.
          **settings: of `config.edit`, such as variants, guidance, iterations, steps and rounds.
        """
        drawn = self.drawn(
            image,
            kind,
            mask=mask,
            box=box,
            label=label,
            labels=labels,
            seed=seed,
            sampler=sampler,
            **settings,
        )
        return give(drawn.images, to)

    def drawn(self, image: Pictures, kind: str, **settings: Any) -> edits.EditResult:
        """Returns the result of `edit` with the labels, masks and settings of its images."""
        generator, settings = self._generator(), dict(settings)
        mask, box, sampler = (settings.pop(name, None) for name in ("mask", "box", "sampler"))
        choose("kind of edit", kind, edits.KINDS)
        c = config.base()
        c.seed = settings.pop("seed", 0)
        c.sampler.update(dataclasses.asdict(self.plan(**(sampler or {}))))
        c.edit.kind = kind
        c.edit.image = "" if image is None else "picture"
        c.edit.mask = "" if mask is None else "mask"
        c.edit.box = "" if box is None else ",".join(map(str, box))
        for name, value in settings.items():
            choose("setting of edit", name, c.edit)
            if value is None:
                continue
            try:
                c.edit[name] = _text(value) if name in ("label", "labels") else value
            except TypeError:
                kind = type(c.edit[name]).__name__
                raise UserError(f"{name} takes a value of type {kind}, got {value!r}") from None
        try:
            edits.check_settings(c.edit, edits.KINDS[kind])
            source, tokens = _source(c.edit, image, mask, self.grid)
            return edits.edit_picture(c, source, generator, self.tokenizer, self.mesh, tokens)
        except UserError as e:
            raise UserError(str(e).replace("config.edit.", "")) from None

    def labels(self, labels: Labels) -> np.ndarray:
        """Returns labels [b] as numbers; raises UserError for one that the generator lacks."""
        generator = self._generator()
        return parse_labels(
            _text(labels), generator.module.num_classes, class_names_of(generator.info)
        )

    def read(self, images: Pictures) -> np.ndarray:
        """Returns pictures as the model's input, float32 [b, S, S, 3] in [-1, 1]."""
        size, channels = self.image_size, self.tokenizer.module.channels
        parts = [
            part if part.dtype == np.float32 else np.asarray(from_uint8(jnp.asarray(part)))
            for part in (read_image(one, size) for one in several(images))
        ]
        if not parts:
            raise UserError("there is no picture to read")
        if parts[0].shape[-1] != channels:
            raise UserError(f"the tokenizer takes {channels} channels, pictures have 3")
        return np.stack(parts)

    def _generator(self) -> Model:
        if self.generator is None:
            raise UserError(
                f"{self.tokenizer.path} is a tokenizer alone: load a generator to draw images"
            )
        return self.generator

    def _batched(self, run: Any, inputs: Any, batch_size: int) -> Any:
        """Runs a program over batches of one size; the last is padded."""
        total = len(jax.tree.leaves(inputs)[0])
        if batch_size < 1 or total < 1:
            raise UserError(f"need a batch and an input at least, got {batch_size} and {total}")
        size = round_up_batch(min(batch_size, total), self.mesh)
        results = []
        for start in range(0, total, size):
            rows = np.minimum(np.arange(start, start + size), total - 1)
            batch = jax.device_put(
                jax.tree.map(lambda x, r=rows: x[r], inputs), batch_sharding(self.mesh)
            )
            results.append(jax.device_get(run(self.tokenizer.params, batch)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:total], *results)


def _source(
    settings: Any, image: Pictures, mask: Any, grid: tuple[int, int]
) -> tuple[edits.EditInput, Any]:
    """Returns the picture and the area on it, and the tokens to draw if the mask is of the grid."""
    picture = None if image is None else as_picture(image)
    if picture is None or not (settings.mask or settings.box):
        return edits.EditInput(picture), None
    if settings.box:
        return edits.EditInput(picture, inputs.box_area(settings.box, picture)), None
    area = read_mask(mask, picture, grid)
    if area.shape == (picture.height, picture.width):
        return edits.EditInput(picture, area), None
    return edits.EditInput(picture), ~area if settings.kind == "outpaint" else area


def _text(labels: Labels) -> str:
    return labels if isinstance(labels, str) else ",".join(map(str, np.atleast_1d(labels)))


def _name(path: str | Path) -> str:
    """Returns zoo:NAME for the name of a released model, unless a directory has that name."""
    return f"zoo:{path}" if str(path) in zoo.ZOO and not Path(path).exists() else str(path)


def check_codes(module: Any, codes: Any) -> Any:
    """Returns codes as NumPy; raises UserError unless they have the tokenizer's shapes."""
    grids = getattr(module, "scales", None)
    found = codes if isinstance(codes, tuple | list) else (codes,)
    found = tuple(np.asarray(part) for part in found)
    if len(found) != len(grids or (1,)):
        raise UserError(f"this tokenizer has {len(grids or (1,))} scales, got {len(found)}")
    for part, grid in zip(found, grids or [module.grid], strict=True):
        shape = (*grid, module.bits) if module.bits else tuple(grid)
        right = part.ndim == 4 and part.shape[1 : 1 + len(shape)] == shape
        if not right or (module.bits and part.dtype != bool):
            kind, last = ("bool", module.bits) if module.bits else ("float", "c")
            wanted = ", ".join(map(str, (*grid, last)))
            raise UserError(
                f"this tokenizer decodes {kind} [b, {wanted}], got {part.dtype} {list(part.shape)}"
            )
    return found if grids else found[0]
