"""Files of rows, and data sets of known lengths."""

import json
from unittest.mock import Mock

import numpy as np
import pytest

from jlora.config import DataSection
from jlora.data.dataset import Dataset
from jlora.data.encoding import tokenize
from jlora.data.prompts import Example
from jlora.data.rows import read_rows
from jlora.data.tokens import Tokenizer
from jlora.errors import DataError

ROWS = [{"prompt": f"{i}:", "completion": "x" * (1 + i % 5), "id": i} for i in range(7)]
GOOD = json.dumps(ROWS[0]).encode()


def section(**changes):
    return DataSection(**({"train": "-", "format": "completion", "max_length": 32} | changes))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def lengths_dataset(lengths):
    """Examples that can be told apart: the token ids of each are its number + 10."""
    examples = []
    for number, length in enumerate(lengths):
        trained = np.ones(length, bool)
        trained[0] = False
        examples.append(Example(np.full(length, number + 10, np.int32), trained))
    return Dataset(examples, read=len(examples), places=[f"rows.jsonl:{n}" for n in range(1, len(examples) + 1)])


RANDOM_LENGTHS = np.random.default_rng(3).integers(2, 33, 60).tolist()


def values(path, split="train"):
    return [row.value for row in read_rows(str(path), split)]


def error_of(path, **changes):
    """The message of the DataError of tokenising a file, with a tokenizer that is not reached."""
    with pytest.raises(DataError) as caught:
        tokenize(str(path), changes.pop("tokenizer", Mock(Tokenizer)), section(**changes))
    message = str(caught.value)
    assert "\n" not in message
    return message
