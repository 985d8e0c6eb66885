"""Conversion between PyTorch checkpoints and our parameters.

`rules` applies a table of `entries` in both directions. `directory` converts a file to a model
directory and back. Each family is a module with `table(hparams, ...)`, `recognise(shapes)`,
`wrapping(shapes)` and `hparams_from_reference(dict)`; `patchgan` is the discriminator in a
tokenizer's file.
"""
