"""A base whose embedding, and head where it has one of its own, get rows for tokens that they have none for.

A new row is the mean of the others, as `resize_token_embeddings(mean_resizing=True)` of transformers means it: the
noise of 3e-5 of a standard deviation that it adds is below what bfloat16 tells apart, and a mean needs no seed, so
whoever opens the base again finds the same rows.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from jlora.hf.names import tensor_name
from jlora.hf.packed import Packed

# Weights of a table that are added up at once.
ADDED_WEIGHTS = 2**22


class Grown:
    """A source with a larger vocabulary; what it does not change is the other's.

    Its hash is over the tensors as they are stored, and their new shapes, which is all that the new rows follow from.

    Attributes:
      base: the source as it is. config, model, shapes: as of a base that has the rows.
    """

    def __init__(self, base: Any, rows: int):
        """Give `base` an embedding of `rows`, more than it has; reads no weight."""
        self.base = base
        self.kept = base.model.vocab_size
        self.model = replace(base.model, vocab_size=rows)
        self.config = base.config | {"vocab_size": rows}
        tables = (tensor_name(self.model.names, leaf, None) for leaf in ("embed_tokens", "lm_head"))
        of_base = {name: base.shapes[name] for name in tables if name in base.shapes}
        # One that does not fit its own config is left as it is, and refused by that.
        self._tables = {name: shape for name, shape in of_base.items() if shape[:1] == (self.kept,)}
        self._means: dict[str, np.ndarray] = {}
        self.shapes = base.shapes | {name: (rows, *shape[1:]) for name, shape in self._tables.items()}
        self.dtypes, self.sizes, self.has_codes = base.dtypes, base.sizes, base.has_codes
        self.stored = base.stored

    def stored_codes(self, name: str, kind: str | None) -> Packed | None:
        """As of `SafetensorsFolder`."""
        return self.base.stored_codes(name, kind)

    def mean(self, name: str) -> np.ndarray:
        """The mean row of a table as it is stored, float32; summed in float64, in the same order everywhere."""
        if name not in self._means:
            height, width = self._tables[name]
            total, step = np.zeros(width), max(1, ADDED_WEIGHTS // width)
            for start in range(0, height, step):
                part = self.base.part(name, (start, min(start + step, height)), (0, width))
                total += part.astype(np.float32).sum(axis=0, dtype=np.float64)
            self._means[name] = (total / height).astype(np.float32)
        return self._means[name]

    def part(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """As of `SafetensorsFolder`; of a table with new rows a new array, float32."""
        if name not in self._tables:
            return self.base.part(name, rows, columns)
        new = np.tile(self.mean(name)[slice(*columns)], (max(0, rows[1] - max(rows[0], self.kept)), 1))
        if rows[0] >= self.kept:
            return new
        old = self.base.part(name, (rows[0], min(rows[1], self.kept)), columns).astype(np.float32)
        return np.concatenate([old, new])

    def read(self, name: str) -> np.ndarray:
        """One tensor whole, a new array."""
        if name not in self._tables:
            return self.base.read(name)
        rows, width = self.shapes[name]
        return self.part(name, (0, rows), (0, width))
