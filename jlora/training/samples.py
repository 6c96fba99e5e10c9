"""What a run answers to a few of its own rows, before and after training. Knows nothing of HTML."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.data.dataset import Dataset
from jlora.data.speakers import turns
from jlora.files.atomic import write_json
from jlora.hf.pretrained import Pretrained
from jlora.inference.generate import generate
from jlora.inference.model import Adapted
from jlora.reports.run_files import parse, read_text

# Tokens of an answer, and of a text without a prompt that stand for one.
NEW_TOKENS = 96
TEXT_PROMPT = 24
FILE = "samples.json"


def choose(
    dataset: Dataset, count: int, pretrained: Pretrained, longest: int
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Prompts from the first rows of the data, token ids each, and the samples that they begin.

    A row's prompt is what comes before its first trained token; of a plain text, some of its first tokens. A sample's
    `cut` names those of its texts that were cut at the most tokens, which for a row are `longest`.
    """
    prompts, samples = [], []
    for example in dataset.examples[:count]:
        sequence = example.sequences()[0]
        start = int(np.argmax(sequence.trained))
        start = start if start > 1 else min(TEXT_PROMPT, len(sequence.ids) // 2)
        end = start + int(
            np.argmin([*sequence.trained[start:], False])
        )  # of a conversation, where its first answer ends
        tokenizer, prompt = pretrained.tokenizer, sequence.ids[:start].tolist()
        cut = end == len(sequence.ids) >= longest and int(sequence.ids[-1]) != tokenizer.eos_id
        prompts.append(prompt)
        samples.append(
            {
                "prompt": tokenizer.decode(prompt),
                "turns": turns(tokenizer, prompt),
                "wanted": tokenizer.decode(sequence.ids[start:end].tolist()),
                "cut": ["wanted"] * cut,
            }
        )
    return prompts, samples


class Samples:
    """Greedy answers of a run to a few of its rows, kept in the run folder from before the first step on."""

    def __init__(
        self, run_dir: Path, dataset: Dataset, count: int, pretrained: Pretrained, dtype: jnp.dtype, longest: int
    ):
        """Choose the rows.

        Args:
          longest: tokens at which rows are cut.
        """
        self._path, self._pretrained, self._dtype = run_dir / FILE, pretrained, dtype
        self._prompts, self._samples = choose(dataset, count, pretrained, longest)

    def take(self, when: str, parts: dict[str, Any]) -> None:
        """Answer with `parts`, {"base", "adapter"} as they are now, and write it down as `when`: before or after."""
        kept = read_samples(self._path)
        if [sample.get("prompt") for sample in kept] == [sample["prompt"] for sample in self._samples]:
            self._samples = kept
        model = Adapted(replace(self._pretrained, base=parts["base"]), parts["adapter"], self._dtype)
        *_, texts = generate(model, self._prompts, max_new_tokens=NEW_TOKENS)
        decode: Callable[[list[int]], str] = self._pretrained.tokenizer.decode
        for number, (sample, ids) in enumerate(zip(self._samples, texts, strict=True)):
            cut = [name for name in sample.get("cut", []) if name != when] + [when] * (len(ids) >= NEW_TOKENS)
            self._samples[number] = sample | {when: decode(ids), "cut": cut}
        write_json(self._path, {"samples": self._samples})


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of a file; none where it is missing or no such file."""
    found = (parse(read_text(path)) or {}).get("samples")
    return found if isinstance(found, list) and all(isinstance(sample, dict) for sample in found) else []
