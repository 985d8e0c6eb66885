r"""BiGR's zero-shot applications on your own picture, with the released models.

Inpaint inside a mask (white: redraw) or a box, or outpaint around it; a class can guide both:

    EDIT="python -m bitgen.main --config=configs/bigr_edit.py --mode=edit --config.edit"
    $EDIT.kind=inpaint --config.edit.image=a.jpg --config.edit.mask=mask.png --workdir=runs/in
    $EDIT.kind=outpaint --config.edit.image=a.jpg --config.edit.box=60,60,200,200 --workdir=runs/out
    $EDIT.kind=edit --config.edit.image=a.jpg --config.edit.mask=mask.png --workdir=runs/edit \
        --config.edit.label="ice bear"

Add the detail that half the resolution lacks, or interpolate between two classes (no picture):

    $EDIT.kind=enrich --config.edit.image=a.jpg --workdir=runs/enrich
    $EDIT.kind=interpolate --config.edit.labels=284,388 --workdir=runs/interpolate

Pictures have any size; the model sees ADM's centre crop. `--config.edit.blend=True` also blends the
result into the whole picture (pip install 'bitgen[edit]'). The result is `edit.png`, the settings
are in `edit.json`. The defaults are BiGR's. The first three kinds: guidance 2.5 (with a class
only), 25 iterations, 8 variants. Interpolation: 20 iterations and 27 mixtures. Enrichment: guidance
10 (with a class only), 20 iterations for each quarter of the tokens, 4 rounds.

Hardware: one accelerator with 16 GB; variants are spread over all devices. Time and quality with
the released weights have not been measured here.
"""

from bitgen import config


def get_config():
    """Returns the settings."""
    return config.released("bigr_L_d24")
