"""Where the real tokenizers, models and texts lie that some tests read; without them those are skipped."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(os.environ.get("JLORA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the test data are not here (JLORA_TEST_DATA)")

SMOLLM2 = Path(
    os.environ.get("JLORA_SMOLLM2_GGUF", Path(__file__).parents[1] / "build" / "SmolLM2-135M-Instruct.Q4_1.gguf")
)

needs_smollm2 = pytest.mark.skipif(not SMOLLM2.is_file(), reason="the base is not here; scripts/fetch_base brings it")


def read_rows(name: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl file under SHARED."""
    return [json.loads(line) for line in (SHARED / name).read_text(encoding="utf-8").splitlines()]
