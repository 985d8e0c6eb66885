"""Every setting of a run with its default; a file in `configs/` changes what it needs.

The functions return a ConfigDict, typed Any: a checker cannot know its attributes.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from bitgen import build, data
from bitgen.samplers.images import default_plan


def base(generator: str = "bigr") -> Any:
    """Returns the settings that every config shares, with the sampler of a family of generators."""
    config: Any = ConfigDict()
    config.seed = 0
    config.tokenizer = ""  # model directory; read by every task and mode but tokenizer training
    config.generator = ""  # model directory; read by sampling
    config.init_from = ""  # model directory that training starts from, with the same sizes
    config.data = data.default_config()

    config.train = ConfigDict()
    config.train.task = ""  # tokenizer | generator
    config.train.steps = 100_000
    config.train.batch_size = 64  # over all devices
    # A step takes its batch in so many equal parts, one after another, in the memory of a part.
    config.train.accumulate = 1
    # Patterns of paths of the model's parameters that do not change: of a tokenizer,
    # ("^encoder/", "^quantizer/") trains the decoder alone and leaves all bits as they are.
    config.train.freeze = ()
    config.train.log_every = 100
    config.train.preview_every = 5_000  # pictures; 0: none
    config.train.preview_images = 32
    # Steps between errors of the averaged model on config.data's split `test`: `val_l1`, `val_psnr`
    # of a tokenizer, `val_loss` of a generator; 0: never.
    config.train.validate_every = 0
    # A small FID (of a tokenizer rFID) of the averaged model against config.data, by the protocol,
    # weights, reference and batch size of config.evaluate; 0: none.
    config.train.fid_every = 0
    config.train.fid_images = 2_000
    config.train.checkpoint_every = 5_000
    config.train.max_to_keep = 2  # newest checkpoints kept
    # Seconds without a step after which a run of any mode ends and says which process is stuck, ten
    # times as many for compiling, saving and measuring; 0: never.
    config.train.stuck_after = 600
    config.train.stochastic_bits = True  # online encoding draws bits instead of rounding

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adam | adamw
    config.optim.lr = 1e-4
    config.optim.schedule = "constant"  # constant | cosine | drop
    config.optim.warmup = 0  # steps
    config.optim.final_lr = 0.0  # of cosine
    config.optim.drop_step = 0  # of drop: a tenth of the rate from there on
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.weight_decay = 0.0
    config.optim.no_decay = ("bias$", "scale$")  # patterns of paths
    config.optim.clip = 0.0  # global gradient norm; 0: none
    config.optim.ema = 0.9999
    config.optim.ema_every = 1  # steps

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.sampler = ConfigDict(dataclasses.asdict(default_plan(generator)))

    config.sample = ConfigDict()
    config.sample.labels = "all"  # indices and ranges: 0-9,207,360
    config.sample.per_label = 1
    config.sample.batch_size = 64  # over all devices
    config.sample.dtype = "float32"  # of the computation; bfloat16 is faster on TPU and GPU
    config.sample.decode_batch = 0  # images that a device decodes at a time; 0: all of its batch
    config.sample.columns = 0  # of the grid; 0: per_label, or a square
    config.sample.output = "samples.png"  # below the workdir
    config.sample.captions = False  # the class above each image of a grid
    config.sample.animation = ""  # also NAME.gif or NAME.webp: how the first 16 images are drawn

    # 0 and '' leave it to the kind: `samplers.edits.KINDS`. What is not here is config.sampler's.
    config.edit = ConfigDict()
    config.edit.kind = "inpaint"  # or outpaint, edit, interpolate, enrich
    config.edit.image = ""  # picture file of any size
    config.edit.mask = ""  # file of the picture's size, white where to redraw; outpaint: to keep
    config.edit.box = ""  # instead of a mask: x0,y0,x1,y1 in pixels of the picture
    config.edit.label = ""  # class of what is drawn; none: the null class, without guidance
    config.edit.labels = ""  # of interpolate: two classes
    config.edit.steps = 0  # of interpolate: mixtures; 0: BiGR's 27
    config.edit.downsample = 2  # of enrich: by how much the view is reduced; the side of blocks
    config.edit.rounds = 4  # of enrich: times that every token is drawn again
    config.edit.variants = 0
    config.edit.iterations = 0
    config.edit.guidance = 0.0
    config.edit.order = ""
    config.edit.gumbel = 0.0
    config.edit.batch_size = 32  # over all devices
    config.edit.blend = False  # also the whole picture with the result blended into it

    config.reconstruct = ConfigDict()
    config.reconstruct.images = 0  # 0: all of the split
    config.reconstruct.batch_size = 64
    config.reconstruct.split = "test"
    config.reconstruct.columns = 16
    # These as in config.evaluate.
    config.reconstruct.protocol = "none"  # of rFID
    config.reconstruct.weights = ""
    config.reconstruct.lpips = ""

    config.tokenize = ConfigDict()
    config.tokenize.batch_size = 64
    config.tokenize.shard = 8192  # images a file
    config.tokenize.split = "all"
    config.tokenize.views = 2  # 2: also the bits of the flipped image

    config.evaluate = ConfigDict()
    config.evaluate.kind = "generation"  # or reconstruction, comparison, probe
    config.evaluate.tokenizers = ""  # of comparison: NAME=DIR,NAME=DIR,...
    # adm | pytorch_fid; random: a small random network, to try things out; none: no features
    config.evaluate.protocol = "adm"
    config.evaluate.weights = ""  # Inception's: zoo:inception_adm or a file; '': in the cache
    config.evaluate.samples = ""  # npz or folder; '': of the generator, config.sample's labels
    config.evaluate.scales = ""  # of guidance, 1,1.5,2: a sweep; '': config.sampler.guidance
    config.evaluate.reference = ""  # npz (ADM's) or folder; '': config.data
    config.evaluate.save_reference = ""  # also write its statistics, NAME.npz below the workdir
    config.evaluate.split = "all"  # of config.data
    config.evaluate.images = 0  # of config.data at most, evenly spread; 0: all
    config.evaluate.manifold = 10_000  # of them, how many precision, recall and KID look at
    config.evaluate.batch_size = 64  # over all devices
    config.evaluate.lpips = ""  # of reconstruction: hub, file or directory; '': no LPIPS
    config.evaluate.layers = "all"  # of probe, counted from 0: 0-23, 12
    config.evaluate.probe_l2 = 1e-4
    config.evaluate.probe_steps = 100  # of L-BFGS

    config.benchmark = ConfigDict()
    # all, or some of memory, tokenizer, train, sample, compile: train,sample; all: all but compile
    config.benchmark.kind = "all"
    config.benchmark.repeats = 5  # timed, after one that is not; a repeat is a second or a call
    # Of sample: images drawn at once, 1,4,16,64; '': one, and config.sample.batch_size of them.
    config.benchmark.batches = ""
    config.benchmark.device = ""  # of memory: TPU v5e, H100, ...; '': the devices here
    config.benchmark.devices = 0  # of memory: so many of them; 0: as many as are here
    # Of compile: devices that need not be here, v5e:2x4 (TPUs), h100:8, cpu:8; '': those here.
    config.benchmark.topology = ""

    # Compiled programs are kept in this directory, of the workdir unless it is absolute, for the
    # next start of the same; '': nowhere.
    config.compile_cache = "compiled"
    return config


def tokenizer(family: str, **fields: Any) -> Any:
    """Returns the settings for training a tokenizer of a family."""
    config = base()
    config.model = build.model_config("tokenizer", family, **fields)
    config.train.task = "tokenizer"
    config.loss = ConfigDict()
    config.loss.l1 = 1.0
    config.loss.l2 = 0.0
    config.loss.perceptual_weight = 1.0  # LPIPS (VGG16); 0: none, and no file is needed
    config.loss.perceptual_weights = "hub"  # or a file or directory
    # Of the losses on the code, those that the family does not have are ignored.
    config.loss.code_weight = 0.0  # certainty of each bit (binary_ae)
    config.loss.entropy_weight = 0.1  # certain codes, all in use (sign, spherical bits)
    config.loss.commitment_weight = 0.25  # distance to the code (sign, spherical bits)
    config.loss.gan_weight = 1.0  # 0: no discriminator
    config.loss.gan_start = 30_001  # step
    config.loss.gan_max_weight = 1.0  # bound of the adaptive weight
    config.loss.gan_augment = False  # DiffAugment: colour and translation
    config.loss.lecam_weight = 0.0  # LeCam regularisation, arXiv 2104.03310
    config.loss.discriminator_width = 64
    config.loss.discriminator_layers = 3
    # What reconstruction losses and the discriminator see: [0, 1] as the binary autoencoder's
    # authors train it; LPIPS was made for [-1, 1].
    config.loss.pixel_range = (0.0, 1.0) if family == "binary_ae" else (-1.0, 1.0)
    return config


def generator(family: str, **fields: Any) -> Any:
    """Returns the settings for training a generator of a family."""
    config = base(family)
    config.model = build.model_config("generator", family, **fields)
    config.train.task = "generator"
    return config
