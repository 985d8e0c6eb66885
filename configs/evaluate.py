r"""Metrics as the field computes them: of generated images, of reconstructions, of representations.

    EVALUATE="python -m bitgen.main --config=configs/evaluate.py --mode=evaluate"

ADM's metrics of a file of samples against its reference, both npz, or of two folders of images:

    $EVALUATE --workdir=runs/a --config.evaluate.samples=samples.npz \
        --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz

A generator, with 50 images of each class that are not written, and a sweep of guidance, which also
plots FID against Inception score:

    $EVALUATE --workdir=runs/b --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz \
        --config.generator=zoo:bigr_L_d24 --config.tokenizer=zoo:bigr_bae_d24
    $EVALUATE --workdir=runs/b --config.evaluate.reference=VIRTUAL_imagenet256_labeled.npz \
        --config.evaluate.scales=1,1.5,2,2.5,3,4

A reference made of your own data and kept for later; a tokenizer by pytorch-fid's protocol, with
LPIPS; a linear probe of each layer (the features need images x layers x width x 4 bytes of memory):

    $EVALUATE --workdir=runs/c --config.data.source=folder --config.data.path=pictures \
        --config.data.image_size=256 --config.evaluate.save_reference=reference.npz \
        --config.evaluate.samples=samples.npz
    $EVALUATE --workdir=runs/d --config.evaluate.kind=reconstruction \
        --config.evaluate.protocol=pytorch_fid --config.evaluate.lpips=hub \
        --config.tokenizer=zoo:bigr_bae_d24 --config.data.path=imagenet/val
    $EVALUATE --workdir=runs/e --config.evaluate.kind=probe --config.data.path=imagenet/train \
        --config.evaluate.images=100000 --config.evaluate.layers=6-17

Several tokenizers on the same images: a table of bits per pixel and errors, a page of pictures, and
the validation curves of the runs that had config.train.validate_every:

    $EVALUATE --workdir=runs/f --config.evaluate.kind=comparison --config.evaluate.protocol=none \
        --config.data.path=pictures --config.evaluate.split=test \
        --config.evaluate.tokenizers=a=runs/a/model,b=runs/b/model

`--config.evaluate.weights=zoo:inception_adm` (or inception_pytorch_fid) downloads Inception's
weights once. By default they are looked up in the cache, and an error says where to put them.
`--config.evaluate.protocol=random` needs no file; its numbers compare only with each other.

Hardware: any. The same command resumes a killed run of a generator; batch size and number of
devices do not change the images. Times on an accelerator and published numbers have not been
measured here.
"""

from bitgen import config


def get_config():
    """Returns the settings."""
    c = config.released("bigr_L_d24")
    c.data.source = "folder"
    c.data.image_size = 256
    c.sample.per_label = 50
    return c
