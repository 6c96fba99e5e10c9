"""Rows -> tokenised examples -> packed rows -> batches, with a position that can be saved.

Knows nothing of models or devices. What other modules use of it is named here.
"""

from jlora.data.dataset import Dataset, hold_out
from jlora.data.encoding import read_data, read_train, split, tokenize
from jlora.data.packing import Batch, Epochs, batches, pack, pack_row

__all__ = [
    "Batch",
    "Dataset",
    "Epochs",
    "batches",
    "hold_out",
    "pack",
    "pack_row",
    "read_data",
    "read_train",
    "split",
    "tokenize",
]
