"""What a run answers to a few of its own rows, before and after training. Knows nothing of HTML."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.data.speakers import turns
from jlora.files.atomic import write_json
from jlora.inference.generate import generate
from jlora.inference.model import Adapted
from jlora.reports.run_files import parse, read_text
from jlora.training.opening import Run

# Tokens of an answer, and of a text without a prompt that stand for one.
NEW_TOKENS = 96
TEXT_PROMPT = 24
FILE = "samples.json"


class Samples:
    """Greedy answers of a run to a few of its rows, kept in the run folder from before the first step on.

    A row's prompt is what comes before its first trained token; of a plain text, some of its first tokens. A sample's
    `cut` names those of its texts that were cut at the most tokens, which for a row are `data.longest`.
    """

    def __init__(self, run: Run):
        """Choose the rows: the first held-out ones, or training ones where there are none."""
        self._run = run
        self._prompts: list[list[int]] = []
        self._samples: list[dict[str, Any]] = []
        tokenizer, rows = run.pretrained.tokenizer, run.eval_data or run.train_data
        for example in rows.examples[: run.cfg.training.samples]:
            sequence = example.sequences()[0]
            start = int(np.argmax(sequence.trained))
            start = start if start > 1 else min(TEXT_PROMPT, len(sequence.ids) // 2)
            # Of a conversation, where its first answer ends.
            end = start + int(np.argmin([*sequence.trained[start:], False]))
            prompt = sequence.ids[:start].tolist()
            cut = end == len(sequence.ids) >= run.cfg.data.longest and int(sequence.ids[-1]) != tokenizer.eos_id
            self._prompts.append(prompt)
            self._samples.append(
                {
                    "prompt": tokenizer.decode(prompt),
                    "turns": turns(tokenizer, prompt),
                    "wanted": tokenizer.decode(sequence.ids[start:end].tolist()),
                    "cut": ["wanted"] * cut,
                }
            )

    def take(self, when: str) -> None:
        """Answer with base and adapter as they are now, and write it down as `when`: before or after."""
        run, path = self._run, self._run.folder / FILE
        kept = read_samples(path)
        if [sample.get("prompt") for sample in kept] == [sample["prompt"] for sample in self._samples]:
            self._samples = kept
        parts = run.params
        model = Adapted(replace(run.pretrained, base=parts["base"]), parts["adapter"], run.forward.dtype)

        def answers() -> list[list[int]]:
            return list(generate(model, self._prompts, max_new_tokens=NEW_TOKENS))[-1]

        texts = run.of_base(f"{len(self._prompts)} answers", answers)[0] if when == "before" else answers()
        for number, (sample, ids) in enumerate(zip(self._samples, texts, strict=True)):
            cut = [name for name in sample.get("cut", []) if name != when] + [when] * (len(ids) >= NEW_TOKENS)
            self._samples[number] = sample | {when: run.pretrained.tokenizer.decode(ids), "cut": cut}
        write_json(path, {"samples": self._samples})


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of a file; none where it is missing or no such file."""
    found = (parse(read_text(path)) or {}).get("samples")
    return found if isinstance(found, list) and all(isinstance(sample, dict) for sample in found) else []
