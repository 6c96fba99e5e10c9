"""Hugging Face files on one side, jlora's trees on the other: the only place that transposes.

`names` holds the one name table; `source` and `load` read a base model; `peft` reads and writes adapters;
`weights` writes full checkpoints.
"""
