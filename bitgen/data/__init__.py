"""Data: images or packed bits, in batches that are the same on any number of hosts.

Configuration         default_config
Batches               make_batches, Batches
Sources               make_source, Source
Packed bits           pack_bits, unpack_bits, PackedWriter, PackedSource
Images                bitgen.images: files, crops, grids
"""

from ml_collections import ConfigDict

from bitgen.data.batches import Batches, make_batches
from bitgen.data.packed import PackedSource, PackedWriter, pack_bits, unpack_bits
from bitgen.data.sources import Source, make_source

__all__ = [
    "Batches",
    "PackedSource",
    "PackedWriter",
    "Source",
    "default_config",
    "make_batches",
    "make_source",
    "pack_bits",
    "unpack_bits",
]


def default_config() -> ConfigDict:
    """Returns `config.data` with every key; the comments explain the values."""
    config = ConfigDict()
    # digits (scikit-learn's, no download) | folder | list | tar | tfds | npz | bits
    config.source = "digits"
    # folder: of PATH/class/name.jpg; tar: ILSVRC2012_img_train.tar or one laid out like it;
    # list: a text file with a line for each image, its path and maybe a label or height and width;
    # npz: a file with image, uint8 [n, H, W, 3], and optionally label [n];
    # bits: what --mode=tokenize wrote; tfds: its data_dir, '' for the default
    config.path = ""
    # tfds: the builder, and the split of it that is the data
    config.builder = ""
    config.builder_split = "train"
    # train | test | all: `test` is the share `holdout` of the data, the same for every seed
    config.split = "train"
    config.holdout = 0.1
    # pixels along the side of the square images
    config.image_size = 32
    # The crop in training; evaluation takes the centre crop and flips nothing.
    # center (ADM) | random (ADM: crop_scale_min to crop_scale_max of the shorter side) |
    # resize (Binary Latent Diffusion: 1.05 x image_size, then a random square)
    config.crop = "center"
    config.crop_scale_min = 0.8
    config.crop_scale_max = 1.0
    # Between these epochs, counted from 0, the share of images with that crop falls from all to
    # none; the others get the centre crop; -1: all images, always
    config.crop_fade_start = -1
    config.crop_fade_end = -1
    # mirror half of the images; from a bits folder: choose either view
    config.flip = True
    # decoding threads; workers > 0 are processes that decode instead, one batch each
    config.threads = 16
    config.workers = 0
    # batches prepared ahead (by each worker process, if there are any)
    config.prefetch = 2
    # training stops if a larger share of the images cannot be read
    config.max_broken_share = 0.01
    return config
