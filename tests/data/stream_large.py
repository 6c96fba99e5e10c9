"""A process of its own for test_store.py: a file tokenised to the disk, packed, read in batches; its memory as JSON."""

import json
import os
import re
import sys
import time
from pathlib import Path

from jlora.config import DataSection
from jlora.data.encoding import tokenize
from jlora.data.packing import Epochs, batches
from jlora.data.tokens import load_tokenizer

BATCHES = 3000


def main() -> None:
    """Arguments: file, tokenizer, cache folder."""
    source, tokenizer, cache = sys.argv[1:]
    cfg = DataSection(train=source, format="completion", max_length=512, cache_dir=cache)
    peak, seconds, began = {}, {}, time.monotonic()

    def done(stage: str) -> None:
        # Not getrusage, whose peak is that of the process that started this one, too.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak[stage] = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
        seconds[stage] = round(time.monotonic() - began, 1)

    opened = load_tokenizer(tokenizer, None)
    done("start")
    dataset = tokenize(source, opened, cfg)
    done("tokenised")
    epochs = Epochs(dataset, cfg, 8, seed=0)
    total = epochs.num_batches(1)
    done("packed")
    tokens = sum(int((batch["segments"] > 0).sum()) for batch in batches(epochs, 8, last=min(total, BATCHES)))
    done("batches")
    print(
        json.dumps(
            {
                "bytes": os.path.getsize(source), "rows": dataset.read, "tokens": int(dataset.lengths.sum()),
                "batches": total, "tokens_in_batches": tokens, "peak_bytes": peak, "seconds": seconds,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
