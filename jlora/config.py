"""The run configuration: YAML file + `dotted.key=value` overrides -> one validated `Config`.

Owns every default, each exactly once, and the line that documents it. Knows nothing of JAX, of
model shapes (they come from the base's own config.json, see `jlora.hf`) or of what a key causes.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from jlora.errors import ConfigError

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ATTENTION_PROJECTIONS + MLP_PROJECTIONS

NonEmpty = Annotated[str, Field(min_length=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Dtype = Literal["bfloat16", "float32"]
Quantization = Literal["int8", "fp8", "nf4", "int4"]
# Fastest first, and each holds less than the one before it: see `jlora.remat`.
Remat = Literal["none", "dots", "qkv", "attention", "full", "offload", "auto"]
Format = Literal["alpaca", "completion", "text", "messages"]
TrainOn = Literal["response", "all"]
Prompt = Literal["stanford", "chat"]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, and values do not change once validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model and how it is run."""

    path: NonEmpty = Field(
        description="base model: a Hugging Face folder, a .gguf file or a hub name; for plan also llama2-7b, -13b, -70b"
    )
    tokenizer: str | None = Field(None, description="another folder for the tokenizer, where the base has none")
    dtype: Dtype = Field("bfloat16", description="base weights and matmuls; float32 for parity checks and CPUs")
    quantization: Quantization | None = Field(
        None,
        description="the base's projections in 8 bits (int8, fp8) or 4 (nf4 as QLoRA, int4), quantised while they "
        "are read; embedding, head and norms stay in dtype",
    )
    attention: Literal["auto", "reference", "blocked", "cudnn", "splash"] = Field(
        "auto",
        description="attention: all scores in memory (reference), tile by tile (blocked), cuDNN on GPUs, splash on "
        "TPUs, or what fits (auto)",
    )
    remat: Remat = Field(
        "full",
        description="what the backward pass computes again; kept are everything (none), all matmul results (dots), "
        "attention's inputs and output (qkv), its output (attention), a layer's input alone (full), or that in the "
        "host's memory (offload); auto takes the first of them that fits",
    )


class LoraSection(Section):
    """The adapter."""

    rank: PositiveInt = Field(16, description="rank R of the A/B factors")
    alpha: Annotated[float, Field(gt=0.0)] = Field(32.0, description="the product BA is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="dropout probability on the adapter's input"
    )
    target_modules: list[str] | Literal["all-linear"] = Field(
        list(ATTENTION_PROJECTIONS),
        description="projections that get an adapter, of " + ", ".join(PROJECTIONS) + "; or all-linear",
    )
    init_from: str | None = Field(None, description="PEFT adapter folder to start from")
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (arXiv:2312.03732)")

    @model_validator(mode="after")
    def _known_targets(self) -> "LoraSection":
        if isinstance(self.target_modules, list):
            if not self.target_modules:
                raise ValueError("target_modules is empty; name at least one projection")
            for name in self.target_modules:
                if name not in PROJECTIONS:
                    raise ValueError(f"target_modules holds '{name}'{_nearest(name, PROJECTIONS)}")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """The targeted projections, in the model's own order."""
        chosen = PROJECTIONS if self.target_modules == "all-linear" else self.target_modules
        return tuple(name for name in PROJECTIONS if name in chosen)


class DataSection(Section):
    """Rows, and how they become batches."""

    train: NonEmpty = Field(description="json, jsonl, parquet or csv file, a folder of them, or a hub data set")
    eval: NonEmpty | Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="held-out rows: another file or data set, or a fraction of train"
    )
    split: str = Field("train", description="split to read where the source is a hub data set")
    format: Format = Field(
        "alpaca",
        description="alpaca (instruction, input, output), completion (prompt, completion), text (text) or "
        "messages (messages: role, content)",
    )
    prompt: Prompt = Field(
        "stanford", description="how an alpaca row is written: Stanford's prompt, or the model's chat template"
    )
    chat_template: str | None = Field(
        None, description="llama2, chatml or a .jinja file; null takes the tokenizer's own"
    )
    max_length: Annotated[int, Field(ge=2, le=2**20)] = Field(1024, description="tokens in a row of a batch")
    packing: bool = Field(True, description="several short rows in one row of a batch, isolated from each other")
    train_on: TrainOn = Field("response", description="which tokens the loss counts")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that can not be trained on stops the run, or is dropped and counted"
    )


class TrainingSection(Section):
    """The loop."""

    batch_size: PositiveInt = Field(8, description="rows of a batch in one optimizer step, over all devices")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="parts that a batch is split into to save memory; the result is the same"
    )
    epochs: PositiveInt = Field(1, description="passes over the data; max_steps overrides it")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps; the data repeat, reshuffled")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="adapter init, dropout and row order")
    log_every: PositiveInt = Field(1, description="steps between lines of metrics.jsonl")
    eval_every: PositiveInt | None = Field(None, description="steps between evaluations; null: start and end only")
    save_every: PositiveInt | None = Field(None, description="steps between checkpoints; null: at the end only")
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept, beside the best by held-out loss")
    max_nonfinite_steps: Annotated[int, Field(ge=0)] = Field(
        10, description="steps with non-finite loss or gradients that are skipped before the run stops (exit 6)"
    )
    wandb: str | None = Field(None, description="Weights & Biases project to log to; needs the wandb package")

    @model_validator(mode="after")
    def _whole_microbatches(self) -> "TrainingSection":
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} can not be split into {self.gradient_accumulation_steps} equal "
                "parts; make gradient_accumulation_steps a divisor of batch_size"
            )
        return self


class OptimizerSection(Section):
    """The update rule."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = Field("adamw", description="optimizer")
    learning_rate: Annotated[float, Field(gt=0.0)] = Field(2e-4, description="peak learning rate")
    weight_decay: NonNegative = Field(0.0, description="weight decay, decoupled; with sgd added to the gradient")
    b1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="first-moment decay; momentum of sgd")
    b2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.999, description="second-moment decay (adamw, lion)")
    eps: Annotated[float, Field(gt=0.0)] = Field(1e-8, description="added to AdamW's denominator")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay from the peak to zero over the steps after warm-up, or none"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up from zero")
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = Field(
        1.0, description="gradients are scaled down to this global norm; null: never"
    )


class MeshSection(Section):
    """How devices share the work."""

    data: int = Field(1, description="devices over which batches are split, weights copied")
    fsdp: int = Field(-1, description="devices over which batches and weights are split; -1: the rest")
    tensor: int = Field(1, description="devices over which heads and mlp are split")

    @model_validator(mode="after")
    def _one_rest(self) -> "MeshSection":
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            raise ValueError("axes are positive device counts, and at most one is -1 (the rest)")
        return self


class DistributedSection(Section):
    """Several processes as one job. Left alone, SLURM, TPU pods, Kubernetes and Open MPI are detected."""

    coordinator: str | None = Field(None, description="host:port of process 0; null: detected, or one process alone")
    num_processes: PositiveInt | None = Field(None, description="processes of the job")
    process_id: Annotated[int, Field(ge=0)] | None = Field(
        None, description="number of this process, from 0; the one key in which the hosts of a job differ"
    )
    start_timeout: PositiveInt = Field(300, description="seconds in which all processes must have started")
    host_timeout: PositiveInt = Field(100, description="seconds after which a silent process ends the job")
    step_timeout: PositiveInt = Field(
        1800, description="seconds without a finished step after which a job of several processes ends"
    )

    @model_validator(mode="after")
    def _all_or_none(self) -> "DistributedSection":
        if len({self.coordinator is None, self.num_processes is None, self.process_id is None}) > 1:
            raise ValueError("set coordinator, num_processes and process_id, or none of them")
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(f"coordinator must be host:port, not '{self.coordinator}'")
        if self.process_id is not None and self.num_processes is not None and self.process_id >= self.num_processes:
            raise ValueError(f"process_id {self.process_id} must be below num_processes {self.num_processes}")
        return self


class Config(Section):
    """A whole run."""

    model: ModelSection
    method: Literal["lora", "full"] = Field("lora", description="train adapters, or every weight of the base")
    lora: LoraSection = LoraSection()
    data: DataSection
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()
    output_dir: NonEmpty = Field(
        description="run folder; holding a checkpoint of the same run, training goes on from it"
    )

    @model_validator(mode="after")
    def _frozen_if_quantized(self) -> "Config":
        if self.method == "full" and self.model.quantization is not None:
            raise ValueError(
                f"method=full trains every weight, which model.quantization={self.model.quantization} can not hold; "
                "set model.quantization=null or method=lora"
            )
        return self

    def dump_yaml(self) -> str:
        """The resolved configuration, every default filled in, as YAML."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read YAML, apply `dotted.key=value` overrides (values are YAML), validate.

    Raises:
      ConfigError: unreadable file, bad YAML, unknown key (with the nearest name) or bad value.
    """
    path = Path(path)
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can not be read ({error.strerror}); check --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys such as model and data, not {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `2e-4` is a number, as in YAML 1.2, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key '{twice}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """YAML text as plain values, by the rules of a config: `2e-4` is a number, a key stands once."""
    return yaml.load(text, _Loader)  # noqa: S506, a SafeLoader


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}' is not of the form dotted.key=value")
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override '{override}': '{name}' is not a section")
    try:
        tree[leaf] = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': {_one_line(error)}") from None


def describe(error: ValidationError) -> str:
    """The first problem in one sentence; the number of others behind it."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    # Members of a union show up behind the key as type tags; the keys of the file are the known fields.
    section: Any = Config
    names: list[str] = []
    for part in first["loc"]:
        names.append(str(part))
        field = section.model_fields.get(str(part))
        if field is None:
            break
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            break
        section = field.annotation
    key = ".".join(names)
    if first["type"] == "extra_forbidden":
        text = f"unknown key '{key}'{_nearest(names[-1], section.model_fields)}"
        elsewhere = [
            f"{name}.{names[-1]}"
            for name, field in Config.model_fields.items()
            if isinstance(field.annotation, type)
            and issubclass(field.annotation, Section)
            and names[-1] in field.annotation.model_fields
        ]
        if elsewhere:
            text = f"unknown key '{key}'; did you mean '{elsewhere[0]}'?"
    elif first["type"] == "missing":
        text = f"key '{key}' is missing; set it in the file or as {key}=VALUE"
    elif first["type"] == "value_error":
        text = f"{key}: {first['ctx']['error']}"
    elif first["type"] == "model_type":
        text = f"{key}: must hold keys of its own ({', '.join(section.model_fields)}), but it is {first['input']!r}"
    else:
        # Each member of a union has its say.
        says = [p["msg"] for p in problems if p["loc"][: len(names)] == first["loc"][: len(names)]]
        wanted = " or ".join(dict.fromkeys(say.removeprefix("Input should be ") for say in says))
        text = f"{key}: should be {wanted}, but it is {first['input']!r}"
    text = text.removeprefix(": ")  # a problem of the whole has no key
    others = len(problems) - 1
    return text if not others or first["type"] != "extra_forbidden" else f"{text} ({others} more problems)"


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"


def reference() -> str:
    """The configuration reference as Markdown, one table a section, made from the models above."""
    lines = [
        "# Configuration reference",
        "",
        "Made by `python -m jlora.config`. Any key can be overridden on the command line as `dotted.key=value`.",
    ]
    top = [name for name, field in Config.model_fields.items() if not _is_section(field.annotation)]
    lines += ["", "## Top level", "", *_table({name: Config.model_fields[name] for name in top})]
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            lines += ["", f"## {name}", "", *_table(section.model_fields)]
    return "\n".join(lines) + "\n"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _table(fields: Any) -> list[str]:
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{yaml_scalar(field.default)}`"
        choices = [f"`{choice}`" for choice in get_args(field.annotation) if isinstance(choice, str)]
        meaning = field.description + (f" ({', '.join(choices)})" if choices and len(choices) > 1 else "")
        rows.append(f"| `{name}` | {default} | {meaning} |")
    return rows


def yaml_scalar(value: Any) -> str:
    """`value` as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


def main() -> None:
    """Print the configuration reference."""
    from jlora.cli import Parser  # here alone: nothing else of a config is a command

    Parser(prog="python -m jlora.config", description=reference.__doc__).parse_args()
    print(reference(), end="")


if __name__ == "__main__":
    main()
