"""Hugging Face files on one side, jlora's trees on the other: the only place that transposes.

`names` holds the one name table; `base` reads a base model; `peft` reads and writes adapters;
`merged` writes full checkpoints.
"""
