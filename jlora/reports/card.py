"""A model card: what a run's export is, what it was made from and by, and how to use it. Holds no row unasked.

README.md of a repository on the Hugging Face hub, whose first lines are the YAML that the hub reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.config.yaml_text import dump_yaml
from jlora.reports.figures import mapping
from jlora.reports.run_files import RunFiles, last_value, read_run

RELATIONS = {"adapter": "adapter", "full": "finetune", "gguf": "quantized"}
LIBRARIES = {"adapter": "peft", "full": "transformers"}
# Of `lora`, what vLLM does not load.
NOT_IN_VLLM = ("use_dora", "modules_to_save", "trainable_tokens")
SHOWN_LORA = ("rank", "alpha", "dropout", "target_modules", "use_rslora", "use_dora", "init_lora_weights")
SHOWN_TRAINING = ("batch_size", "gradient_accumulation_steps", "seed")
SHOWN_OPTIMIZER = ("name", "learning_rate", "schedule", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm")


@dataclass(frozen=True)
class Exported:
    """What a card is of.

    Attributes:
      kind: adapter, full or gguf. step: of the run. files: names of what was written.
      base: its name on the hub, or where it lies here. license: that it names, as the hub calls it.
      repository: OWNER/NAME that it is for; None for a folder.
      rank: the largest of an adapter, as it was written; None of anything else.
      versions: of the libraries that exported it.
    """

    kind: str
    step: int
    files: list[str]
    base: str
    license: str | None
    repository: str | None
    rank: int | None
    versions: dict[str, str]

    @property
    def base_on_hub(self) -> str | None:
        """Where the base can be had; None where nobody else knows its path."""
        return None if Path(self.base).is_absolute() or self.base.lower().endswith(".gguf") else self.base

    @property
    def name(self) -> str:
        """By which it is loaded."""
        return self.repository or "PATH/TO/THIS/FOLDER"


def card(run_dir: Path, exported: Exported, samples: int) -> str:
    """The text of a card.

    Args:
      samples: rows of the run that are shown with the answers before and after training.
    """
    run = read_run(run_dir)
    cfg = run.keys()
    title = (exported.repository or run.name).rpartition("/")[2]
    parts = [
        f"---\n{dump_yaml(_metadata(exported, cfg))}---",
        f"# {title}",
        _what(exported, cfg),
        "## Use it\n\n" + "\n\n".join(_use(exported, cfg)),
        "## Results\n\n" + _results(run, exported.step),
        "## Trained on\n\n" + _data(run, cfg),
        "## How\n\n" + _how(run, cfg, exported),
    ]
    if shown := run.summary["samples"][:samples]:
        parts.append("## Samples\n\n" + "\n\n".join(_sample(number, each) for number, each in enumerate(shown, 1)))
    return "\n\n".join(parts) + "\n"


def _metadata(exported: Exported, cfg: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": ["lora", "jlora"]}
    if exported.base_on_hub:
        found |= {"base_model": exported.base_on_hub, "base_model_relation": RELATIONS[exported.kind]}
    if exported.kind in LIBRARIES:
        found["library_name"] = LIBRARIES[exported.kind]
    if exported.license:
        found["license"] = exported.license
    if on_hub := [name for name in _sources(cfg) if _is_hub_name(name)]:
        found["datasets"] = on_hub
    return found


def _sources(cfg: dict[str, Any]) -> list[str]:
    train = mapping(cfg.get("data")).get("train")
    sources = [mapping(each).get("path") for each in train] if isinstance(train, list) else [train]
    return [source for source in sources if isinstance(source, str)]


def _is_hub_name(path: str) -> bool:
    return path.count("/") == 1 and path[:1] not in "./~" and not Path(path).suffix and not Path(path).exists()


def _what(exported: Exported, cfg: dict[str, Any]) -> str:
    kinds = {
        "adapter": "A LoRA adapter, in PEFT's format, of",
        "full": "The whole weights, with what was trained merged in, of",
        "gguf": "One GGUF file for llama.cpp and Ollama, with what was trained merged in, of",
    }
    base = exported.base_on_hub or Path(exported.base).name
    told = f"[{base}](https://huggingface.co/{base})" if exported.base_on_hub else f"`{base}`"
    quantization = mapping(cfg.get("model")).get("quantization")
    held = f" It was trained over the base in {quantization}." if quantization else ""
    licence = f"The base's licence, {exported.license}," if exported.license else "The licence of the base"
    return f"{kinds[exported.kind]} {told}.{held} {licence} holds for this, too."


def _use(exported: Exported, cfg: dict[str, Any]) -> list[str]:
    """Exact commands."""
    base, name, lora = exported.base_on_hub or "BASE", exported.name, mapping(cfg.get("lora"))
    if exported.kind == "gguf":
        file = next(file for file in exported.files if file.endswith(".gguf"))
        stem = file.removesuffix(".gguf")
        ollama = f"ollama create {stem} -f {stem}.Modelfile\nollama run {stem}"
        found = [_code(f"llama-server -m {file}"), _code(ollama)]
    elif exported.kind == "full":
        lines = ["from transformers import AutoModelForCausalLM", ""]
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{name}")')
        found = [_code("\n".join(lines), "python"), _code(f"vllm serve {name}")]
    else:
        lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
        lines.append(f'base = AutoModelForCausalLM.from_pretrained("{base}")')
        lines.append(f'model = PeftModel.from_pretrained(base, "{name}")')
        served = f"vllm serve {base} --enable-lora --max-lora-rank {exported.rank} --lora-modules mine={name}"
        converted = f"python llama.cpp/convert_lora_to_gguf.py {name} --outfile mine-lora.gguf"
        added = "llama-server -m BASE.gguf --lora mine-lora.gguf"
        refused = [key for key in NOT_IN_VLLM if lora.get(key)] + ["bias"] * (lora.get("bias") not in (None, "none"))
        found = [_code("\n".join(lines), "python")]
        if refused:
            found.append(f"vLLM and llama.cpp do not load {', '.join(refused)}: merge it first.")
        else:
            found += [_code(served), _code(f"{converted}\n{added}")]
    data = mapping(cfg.get("data"))
    if data.get("format") == "alpaca" and data.get("prompt") == "stanford":
        found.append("Prompts are written as Stanford Alpaca's: `### Instruction:`, `### Input:`, `### Response:`.")
    elif data.get("format") in ("completion", "text"):
        found.append("Prompts are completed as they are, without a chat template.")
    else:
        found.append("Prompts are written by the chat template of the tokenizer.")
    return found


def _code(text: str, language: str = "bash") -> str:
    return f"```{language}\n{text}\n```"


def _results(run: RunFiles, step: int) -> str:
    points = run.series["eval_loss"]
    before = last_value([point for point in points if point[0] == 0])
    after = last_value([point for point in points if 0 < point[0] <= step])
    if before is None or after is None:
        return "No rows were held out."
    rows = run.summary["rows"].get("eval")
    of = f" of {rows:,} rows" if isinstance(rows, int) and rows else ""
    lines = [f"| held-out loss{of} | |", "| --- | --- |", f"| before training | {before:.4f} |"]
    return "\n".join([*lines, f"| after {step:,} steps | {after:.4f} |"])


def _data(run: RunFiles, cfg: dict[str, Any]) -> str:
    rows, hashes, data = run.summary["rows"], run.summary["hashes"], mapping(cfg.get("data"))
    names = ", ".join(f"`{name if _is_hub_name(name) else Path(name).name}`" for name in _sources(cfg))
    lines = [f"- rows: {names}, format {data.get('format')}"]
    counts = [(rows.get("used"), "trained on"), (rows.get("eval"), "held out")]
    if told := ", ".join(f"{count:,} {what}" for count, what in counts if isinstance(count, int)):
        lines.append(f"- {told}")
    for key, what in (("data", "rows as trained on"), ("eval", "held-out rows"), ("base", "base's weights")):
        if isinstance(hashes.get(key), str):
            lines.append(f"- SHA-256 of the {what}: `{hashes[key]}`")
    return "\n".join(lines)


def _how(run: RunFiles, cfg: dict[str, Any], exported: Exported) -> str:
    lines = []
    sections: dict[str, tuple[str, ...]] = {"training": SHOWN_TRAINING, "optimizer": SHOWN_OPTIMIZER}
    if cfg.get("method") != "full":
        sections = {"lora": SHOWN_LORA} | sections
    for section, keys in sections.items():
        values = mapping(cfg.get(section))
        lines += [f"| {section}.{key} | {values[key]} |" for key in keys if values.get(key) not in (None, [], {})]
    data, model = mapping(cfg.get("data")), mapping(cfg.get("model"))
    lines += [f"| data.max_length | {data.get('max_length')} |", f"| model.dtype | {model.get('dtype')} |"]
    tokens = run.summary["tokens"].get("total")
    facts = [f"{exported.step:,} steps"] + [f"{tokens:,} tokens"] * isinstance(tokens, int)
    facts += [str(run.summary["device"])] * bool(run.summary.get("device"))
    versions = run.summary["versions"] or exported.versions
    by = ", ".join(f"{name} {version}" for name, version in versions.items())
    again = ""
    if exported.kind == "adapter":
        again = "\n\n`provenance.json` says what it was made from; `jlora reproduce` makes it again and compares."
    table = "\n".join(["| key | value |", "| --- | --- |", *lines])
    return f"{', '.join(facts)}.\n\n{table}\n\nMade by {by}.{again}"


def _sample(number: int, sample: dict[str, Any]) -> str:
    parts = ((sample.get("prompt"), "prompt"), (sample.get("before"), "before"), (sample.get("after"), "after"))
    return f"### {number}\n\n" + "\n\n".join(
        f"{what}:\n\n{_quoted(str(text).strip())}" for text, what in parts if text is not None
    )


def _quoted(text: str) -> str:
    """A text as a block in which nothing is Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
