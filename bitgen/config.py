"""Every setting of a run with its default, by group; a file in `configs/` changes what it needs.

The functions return a ConfigDict, typed Any because a type checker cannot know its attributes.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from bitgen import build, data
from bitgen.hub import zoo
from bitgen.samplers.images import default_plan

TRAIN = {
    "task": "",  # tokenizer | generator
    "steps": 100_000,
    "batch_size": 64,  # over all devices
    # Parts of a batch that a step computes one after another, to save memory.
    "accumulate": 1,
    # Patterns of parameter paths to keep fixed: ("^encoder/", "^quantizer/") trains a tokenizer's
    # decoder alone and leaves all bits as they are.
    "freeze": (),
    "log_every": 100,  # steps, like every setting that ends in _every
    "preview_every": 5_000,  # pictures; 0: none
    "preview_images": 32,
    # Errors of the averaged model on the split `test` of config.data: `val_l1` and `val_psnr` of a
    # tokenizer, `val_loss` of a generator; 0: none.
    "validate_every": 0,
    # FID of the averaged model against config.data (rFID of a tokenizer), with the protocol,
    # weights, reference and batch size of config.evaluate; 0: none.
    "fid_every": 0,
    "fid_images": 2_000,
    "checkpoint_every": 5_000,
    "max_to_keep": 2,  # checkpoints, the newest
    # Seconds without a step after which a run of any mode ends and names the process that is stuck;
    # ten times as many while compiling, saving and measuring; 0: never.
    "stuck_after": 600,
    "stochastic_bits": True,  # encoding during training draws bits instead of rounding
}
OPTIM = {
    "name": "adamw",  # adam | adamw
    "lr": 1e-4,
    "schedule": "constant",  # constant | cosine | drop
    "warmup": 0,  # steps
    "final_lr": 0.0,  # of cosine
    "drop_step": 0,  # of drop: from here on a tenth of the rate
    "b1": 0.9,
    "b2": 0.999,
    "weight_decay": 0.0,
    "no_decay": ("bias$", "scale$"),  # patterns of parameter paths
    "clip": 0.0,  # global gradient norm; 0: none
    "ema": 0.9999,
    "ema_every": 1,  # steps
}
SAMPLE = {
    "labels": "all",  # numbers, ranges and names: 0-9,207,otter
    "per_label": 1,
    "batch_size": 64,  # over all devices
    "dtype": "float32",  # of the computation; bfloat16 is faster on TPU and GPU
    "decode_batch": 0,  # images that a device decodes together; 0: all of its batch
    "columns": 0,  # of the grid; 0: per_label, or a square
    "output": "samples.png",  # below the workdir: NAME.png, NAME.npz or a folder
    "captions": False,  # write the class above each image of a grid
    "animation": "",  # also write NAME.gif or NAME.webp of how the first 16 images are drawn
}
# 0 and '' stand for the kind's own value in `samplers.edits.KINDS`; further settings of the sampler
# are those of config.sampler.
EDIT = {
    "kind": "inpaint",  # inpaint | outpaint | edit | interpolate | enrich
    "image": "",  # picture file of any size
    "mask": "",  # file in the picture's size, white where to redraw (outpaint: where to keep)
    "box": "",  # instead of a mask: x0,y0,x1,y1 in pixels of the picture
    "label": "",  # class to draw; '': the null class, without guidance
    "labels": "",  # of interpolate: two classes
    "steps": 0,  # of interpolate: mixtures; 0: BiGR's 27
    "downsample": 2,  # of enrich: how much the picture is reduced, and the side of a block
    "rounds": 4,  # of enrich: how often every token is drawn again
    "variants": 0,
    "iterations": 0,
    "guidance": 0.0,
    "order": "",
    "gumbel": 0.0,
    "batch_size": 32,  # over all devices
    "blend": False,  # also write the whole picture with the result blended into it
}
RECONSTRUCT = {
    "images": 0,  # 0: all of the split
    "batch_size": 64,
    "split": "test",
    "columns": 16,
    "protocol": "none",  # of rFID; this and the two below are as in config.evaluate
    "weights": "",
    "lpips": "",
}
TOKENIZE = {
    "batch_size": 64,
    "shard": 8192,  # images in a file
    "split": "all",
    "views": 2,  # 2: also store the bits of the flipped image
}
EVALUATE = {
    "kind": "generation",  # generation | reconstruction | comparison | probe
    "tokenizers": "",  # of comparison: NAME=DIR,NAME=DIR,...
    # adm | pytorch_fid | random (a small random network, to try things out) | none (no features)
    "protocol": "adm",
    "weights": "",  # Inception's: zoo:inception_adm or a file; '': those in the cache
    "samples": "",  # npz or folder; '': draw config.sample's labels with the generator
    "scales": "",  # of guidance, for a sweep: 1,1.5,2; '': config.sampler.guidance
    "reference": "",  # npz in ADM's format, or a folder; '': config.data
    "save_reference": "",  # also write the reference's statistics, NAME.npz below the workdir
    "split": "all",  # of config.data
    "images": 0,  # of config.data at most, evenly spread; 0: all
    "manifold": 10_000,  # images of the reference that precision, recall and KID see
    "batch_size": 64,  # over all devices
    "lpips": "",  # of reconstruction: hub, a file or a directory; '': no LPIPS
    "layers": "all",  # of probe, counted from 0: 0-23, 12
    "probe_l2": 1e-4,
    "probe_steps": 100,  # of L-BFGS
}
BENCHMARK = {
    # Some of memory, tokenizer, train, sample, compile: train,sample; all: all but compile.
    "kind": "all",
    "repeats": 5,  # timed, after one that is not; a repeat is a fifth of a second, or one call
    # Of sample: images drawn together, 1,4,16,64; '': one, and config.sample.batch_size.
    "batches": "",
    "device": "",  # of memory: TPU v5e, H100, ...; '': the devices here
    "devices": 0,  # of memory: their number; 0: as many as are here
    # Of compile: devices that need not be here, v5e:2x4 (TPUs), h100:8, cpu:8; '': those here.
    "topology": "",
}
LOSS = {
    "l1": 1.0,
    "l2": 0.0,
    "perceptual_weight": 1.0,  # of LPIPS (VGG16); 0: none, and no file is needed
    "perceptual_weights": "hub",  # or a file or directory
    # A family ignores those of these three losses that it does not have.
    "code_weight": 0.0,  # how certain each bit is (binary_ae)
    "entropy_weight": 0.1,  # certain codes, all of them in use (sign, spherical bits)
    "commitment_weight": 0.25,  # distance to the code (sign, spherical bits)
    "gan_weight": 1.0,  # 0: no discriminator
    "gan_start": 30_001,  # step
    "gan_max_weight": 1.0,  # bound of the adaptive weight
    "gan_augment": False,  # DiffAugment: colour and translation
    "lecam_weight": 0.0,  # LeCam regularisation, arXiv 2104.03310
    "discriminator_width": 64,
    "discriminator_layers": 3,
}


def base(generator: str = "bigr") -> Any:
    """Returns the settings that every config shares, with the sampler of a generator family."""
    return ConfigDict(
        {
            "seed": 0,
            "tokenizer": "",  # model directory; not for training a tokenizer
            "generator": "",  # model directory, for sampling
            "init_from": "",  # model directory of the same sizes that training starts from
            "data": data.default_config(),
            "train": TRAIN,
            "optim": OPTIM,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # -1: the devices that are left
            "sampler": dataclasses.asdict(default_plan(generator)),
            "sample": SAMPLE,
            "edit": EDIT,
            "reconstruct": RECONSTRUCT,
            "tokenize": TOKENIZE,
            "evaluate": EVALUATE,
            "benchmark": BENCHMARK,
            # Directory that keeps compiled programs for the next start, below the workdir unless
            # it is absolute; '': none.
            "compile_cache": "compiled",
        }
    )


def tokenizer(family: str, **fields: Any) -> Any:
    """Returns the settings for training a tokenizer of a family."""
    config = base()
    config.model = build.model_config("tokenizer", family, **fields)
    config.train.task = "tokenizer"
    config.loss = ConfigDict(LOSS)
    # The range of reconstruction losses and discriminator: [0, 1] for the binary autoencoder, as
    # its authors train it; LPIPS was made for [-1, 1].
    config.loss.pixel_range = (0.0, 1.0) if family == "binary_ae" else (-1.0, 1.0)
    return config


def generator(family: str, **fields: Any) -> Any:
    """Returns the settings for training a generator of a family."""
    config = base(family)
    config.model = build.model_config("generator", family, **fields)
    config.train.task = "generator"
    return config


# ---- What several files of configs/ share ----

# The ImageNet classes that the sampling scripts of DiT, BiGR and BitDance draw.
SHOWN_CLASSES = "207,360,387,974,88,979,417,279"
# Guidance of the BitDance authors' evaluation, by size.
BITDANCE_GUIDANCE = {"B_1x": 3.2, "B_4x": 3.9, "B_16x": 6.1, "L_1x": 4.0, "H_1x": 4.55}

# Generator family -> its authors' weight decay, and the paths they leave out beside the usual ones.
_DECAY = {
    "bigr": (2e-2, ("^denoiser/",)),
    "bitdance": (0.05, ("^bits_in/", "class_embedding", "query_tokens")),
}


def released(name: str) -> Any:
    """Returns the settings for using a generator of the zoo with its tokenizer."""
    entry = zoo.get(name)
    config = base(entry.family)
    config.generator = f"zoo:{name}"
    config.tokenizer = f"zoo:{entry.tokenizer}"
    return config


def imagenet_tokenizer(family: str, **fields: Any) -> Any:
    """Returns the settings for a long training of a tokenizer on a folder of images."""
    config = tokenizer(family, **fields)
    _imagenet(config, config.model.image_size)
    config.train.log_every = 200
    return config


def imagenet_generator(name: str, **fields: Any) -> Any:
    """Returns the settings for training a generator of the zoo on a folder of images.

    Sizes, tokenizer and optimiser are its authors', and the computation is in bfloat16.
    """
    entry = zoo.get(name)
    config = generator(entry.family, **entry.hparams, **fields, dtype="bfloat16")
    config.tokenizer = f"zoo:{entry.tokenizer}"
    _imagenet(config, 16 * config.model.grid[0])  # every released tokenizer has stride 16
    _authors_adamw(config)
    config.sample.labels = SHOWN_CLASSES
    return config


def small_tokenizer(family: str, **fields: Any) -> Any:
    """Returns the settings for a tokenizer of small images, without LPIPS and GAN."""
    config = tokenizer(family, **fields)
    config.data.flip = False
    config.optim.schedule = "cosine"
    config.loss.perceptual_weight = 0.0
    config.loss.gan_weight = 0.0
    return config


def digits_generator(family: str, **fields: Any) -> Any:
    """Returns the settings for a small generator on the bits that launch/quickstart.sh writes."""
    sizes = {"width": 96, "layers": 4, "heads": 4, "mlp_multiple": 64}
    config = generator(family, bits=24, grid=(4, 4), num_classes=10, **sizes, **fields)
    config.tokenizer = "runs/digits/tokenizer/model"
    config.data.source = "bits"
    config.data.path = "runs/digits/bits"
    config.data.flip = False
    config.train.batch_size = 32
    config.train.steps = 3000
    config.train.preview_every = 1000
    config.train.preview_images = 40
    config.train.checkpoint_every = 1000
    _authors_adamw(config)
    config.optim.lr = 2e-3
    config.optim.warmup = 50
    config.optim.schedule = "cosine"
    config.optim.ema = 0.99
    config.sampler.guidance = 2.0
    config.sample.per_label = 10
    return config


def _imagenet(config: Any, image_size: int) -> None:
    """Sets the data of a long run: a folder of images, all of them for training."""
    config.data.source = "folder"
    config.data.image_size = image_size
    config.data.holdout = 0.0
    config.train.checkpoint_every = 10_000


def _authors_adamw(config: Any) -> None:
    """Sets AdamW as the authors of a generator family do, but for the learning rate."""
    weight_decay, more = _DECAY[config.model.family]
    config.optim.b2 = 0.95
    config.optim.weight_decay = weight_decay
    config.optim.no_decay += more
    config.optim.clip = 1.0
