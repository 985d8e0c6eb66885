r"""BiGR's zero-shot applications on your own picture, with the released models.

Inpaint what a mask (white: redraw) or a box marks, and draw around it; a class steers either:

    EDIT="python -m bitgen.main --config=configs/bigr_edit.py --mode=edit --config.edit"
    $EDIT.kind=inpaint --config.edit.image=a.jpg --config.edit.mask=mask.png --workdir=runs/in
    $EDIT.kind=outpaint --config.edit.image=a.jpg --config.edit.box=60,60,200,200 --workdir=runs/out
    $EDIT.kind=edit --config.edit.image=a.jpg --config.edit.mask=mask.png --workdir=runs/edit \
        --config.edit.label="ice bear"

Add the detail that half the resolution lacks; go from one class to another (no picture):

    $EDIT.kind=enrich --config.edit.image=a.jpg --workdir=runs/enrich
    $EDIT.kind=interpolate --config.edit.labels=284,388 --workdir=runs/interpolate

Any picture size; the model sees ADM's centre crop. `--config.edit.blend=True` also blends the
result into the whole picture (pip install 'bitgen[edit]'). Look at `edit.png`; the settings are in
`edit.json`. The settings of the first three are BiGR's: guidance 2.5 (of use only with a class), 25
iterations, 8 variants; interpolation 20 iterations and 27 mixtures; enrichment guidance 10 (again
only with a class), 20 iterations for each quarter of the tokens, 4 rounds.

Hardware: one accelerator of 16 GB; variants spread over all devices. Time and quality with the
released weights have not been measured here.
"""

from bitgen import config


def get_config():
    """Returns the settings."""
    c = config.base()
    c.tokenizer = "zoo:bigr_bae_d24"
    c.generator = "zoo:bigr_L_d24"
    return c
