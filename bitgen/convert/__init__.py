"""Conversion between PyTorch checkpoints and our parameters.

The engine: `rules` applies a table, made of `entries`, in both directions. `directory` goes from a
file to a model directory and back. A family is a module with `table(hparams, ...)`,
`recognise(shapes)`, `wrapping(shapes)` and `hparams_from_reference(dict)`; `patchgan` is the
discriminator in a tokenizer's file.
"""
