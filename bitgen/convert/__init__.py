"""Conversion between PyTorch checkpoints and our parameters.

The engine: `rules` applies a table, made of `entries`, in both directions.
A family: `table(hparams, ...)`, `recognise(shapes)`, `wrapping(shapes)` and
`hparams_from_reference(dict)`, in `binary_ae` and `bigr`; `patchgan` is the part of a tokenizer's
file that it was trained against.
"""
