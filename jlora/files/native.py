"""Opens somebody else's file with a library in native code, whose death then kills no run.

A script, for `sandbox.tried` alone: `native.py tokenizer < tokenizer.json` or `native.py arrow FILE...`. Imports
nothing of jlora, and ends with an error where the file does.
"""

import sys

# Letters, digits and signs, what normalizers know, and runs on which a pattern may never end.
TEXT = (
    "".join(map(chr, range(32, 127))) + "\n\t é ① ﬁ ☃ \u0301 日本 \N{GRINNING FACE} " + "a" * 64 + "! " + "0" * 64 + "!"
)


def tokenizer(content: bytes) -> None:
    """Load a tokenizer.json; encode and decode a text. A text that it refuses is no fault of it."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_buffer(content)
    loaded.no_truncation()
    loaded.no_padding()
    loaded.get_vocab(with_added_tokens=True)
    for special in (True, False):
        try:
            ids = loaded.encode(TEXT, add_special_tokens=special).ids
        except Exception:  # the library raises nothing narrower; a panic is none
            continue
        loaded.decode(ids[:64])


def arrow(path: str) -> None:
    """Look at every value of a file of record batches, be it a stream or of random access."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(path) as file:
        try:
            batches = iter(ipc.open_stream(file))
        except pyarrow.ArrowInvalid:
            reader = ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            batch.validate(full=True)


if __name__ == "__main__":
    if sys.argv[1] == "tokenizer":
        tokenizer(sys.stdin.buffer.read())
    else:
        for path in sys.argv[2:]:
            arrow(path)
