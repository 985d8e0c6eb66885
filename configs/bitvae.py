r"""BitVAE, Infinity's multi-scale tokenizer, in its authors' two stages: one scale, then many.

    python -m bitgen.main --config=configs/bitvae.py:d16_stage1 --workdir=runs/bitvae_d16_stage1 \
        --config.data.path=/data/imagenet/train
    python -m bitgen.main --config=configs/bitvae.py:d16_stage2 --workdir=runs/bitvae_d16_stage2 \
        --config.data.path=/data/imagenet/train

Sizes: d16_stage1, d16_stage2, d32_stage1, d32_stage2; stage 2 starts from
runs/bitvae_dN_stage1/model unless --config.init_from says otherwise. To test one on a list of
files (or on a folder, --config.data.source=folder):

    python -m bitgen.main --config=configs/bitvae.py:d16_stage2 --workdir=runs/bitvae_d16_stage2 \
        --mode=reconstruct --config.data.source=list --config.data.path=labels/imagenet/val.txt \
        --config.reconstruct.split=all --config.reconstruct.protocol=pytorch_fid \
        --config.reconstruct.lpips=hub

From the authors' training scripts: the network; batch 256; 500,000 steps, then 200,000; AdamW with
rate 1e-4 and a tenth of it for the last 50,000 steps, betas 0.9 and 0.95, clipping at 1; L1 and
LPIPS (VGG16) with weight 1; a GAN of weight 0.3 from step 50,000 (in stage 2 from the first step)
whose discriminator is 128 wide; commitment 0.25 and entropy 0.1, both times 4; scales other than
the last are dropped in half the batches; gradients flow through the residuals.

Different here: images have one size, where the authors' stage 2 mixes 256, 512 and 1,024 pixels
(set config.model.image_size and config.data.image_size). The schedule is `dynamic`, with which they
test; they train with `dense`. Stage 1 has one scale, where they already have all (set
config.model.schedule=dynamic, and drop_rate, keep_first and keep_last as in stage 2). The GAN's
weight is a bound, as everywhere in bitgen. The discriminator's rate is the model's, not twice that.
Their penalty on its mean logits is missing (config.loss.lecam_weight is a different one). The
computation is in bfloat16.

The settings of the regularised variant (d32reg) are not published. In stage 2,
config.model.flip_prob and flip_scales flip bits of the first scales at random; the defaults of the
authors' script, which no published command uses, are 0.5 and 1.

The recipe is for 8 GPUs with 80 GB and 16 images each at a time, and recomputes residual blocks in
the backward pass; on 32 GPUs add --config.train.accumulate=1. Without a network, set
config.loss.perceptual_weights to a file, or config.loss.perceptual_weight=0. Not run here at this
size: no time or quality was measured. The authors report at 256 px rFID 1.22 and PSNR 20.9 for d16,
0.61 and 22.7 for d32, 0.75 and 21.9 for d32reg.
"""

from bitgen import config
from bitgen.errors import choose

_ONE_SCALE = {"schedule": "same1", "detach_residual": False}
_MANY_SCALES = {
    "schedule": "dynamic",
    "detach_residual": False,
    "drop_rate": 0.5,
    "keep_first": False,
    "keep_last": True,
}
SIZES = {
    "d16_stage1": {"bits": 16, **_ONE_SCALE},
    "d16_stage2": {"bits": 16, **_MANY_SCALES},
    "d32_stage1": {"bits": 32, **_ONE_SCALE},
    "d32_stage2": {"bits": 32, **_MANY_SCALES},
}
PER_DEVICE, DEVICES, PARTS = 16, 8, 2
_CODE = 4  # the authors' factor of the losses on the code


def get_config(size: str = "d16_stage1"):
    """Returns the settings of a size and stage."""
    fields = choose("size", size, SIZES)
    c = config.imagenet_tokenizer("bitvae", dtype="bfloat16", remat=True, **fields)
    c.data.crop = "random"
    c.data.crop_scale_min = 1.0
    c.train.batch_size = PER_DEVICE * DEVICES * PARTS
    c.train.accumulate = PARTS
    c.train.steps = 500_000
    c.optim.lr = 1e-4
    c.optim.schedule = "drop"
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.weight_decay = 0.01  # AdamW's default in PyTorch
    c.optim.no_decay = ()
    c.optim.clip = 1.0
    c.loss.commitment_weight = 0.25 * _CODE
    c.loss.entropy_weight = 0.1 * _CODE
    c.loss.gan_weight = 0.3
    c.loss.gan_start = 50_000
    c.loss.discriminator_width = 128
    if size.endswith("stage2"):
        c.init_from = f"runs/bitvae_{size.replace('stage2', 'stage1')}/model"
        c.train.steps = 200_000
        c.loss.gan_start = 0
    c.optim.drop_step = c.train.steps - 50_000
    return c
