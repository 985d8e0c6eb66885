"""The binary autoencoder's released sizes."""

import pytest

from bitgen.tokenizers.binary_ae import BinaryAutoencoder, decoder_layout, encoder_layout


@pytest.mark.parametrize(
    ("fields", "grid", "attention"),
    [
        ({"bits": 24}, 16, 3),  # two residual blocks at 16x16, and the middle
        ({"bits": 128, "decoder_multiplier": 3.0}, 16, 3),
        ({"bits": 32, "image_size": 512}, 32, 1),
    ],
)
def test_released_sizes(fields, grid, attention):
    module = BinaryAutoencoder(**fields)
    assert module.grid == (grid, grid)
    assert sum(kind == "attn" for kind, _, _ in encoder_layout(module)) == attention
    decoder = [kind for kind, _, _ in decoder_layout(module)]
    times = int(fields.get("decoder_multiplier", 1))
    assert decoder.count("res") == 2 + 5 * 2 * times
    assert decoder.count("attn") == 1 + (attention - 1) * times
