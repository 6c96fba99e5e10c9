"""The sections and keys of a run's configuration.

Owns every default, each exactly once, and the line that documents it. Knows nothing of JAX, of
model shapes (they come from the base's own config.json, see `jlora.hf`) or of what a key causes.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveInt, field_validator, model_validator

from jlora.config.data import DataSection
from jlora.config.lora import LoraSection
from jlora.config.section import NonEmpty, NonNegative, Positive, Section, Share
from jlora.config.yaml_text import dump_yaml

MOST_STEPS = 2**31 - 1  # of int32, which steps are counted in

Dtype = Literal["bfloat16", "float32"]
Quantization = Literal["int8", "fp8", "nf4", "int4"]
Compute = Literal["int8", "fp8"]
# Fastest first, and each holds less than the one before it: see `jlora.model.remat`.
Remat = Literal["none", "lean", "qkv", "attention", "full", "offload", "auto"]
# What configs and checkpoints of earlier versions have, and what keeps the same products in less memory.
FORMER_REMAT = {"dots": "lean"}


class ModelSection(Section):
    """The base model and how it is run."""

    path: NonEmpty = Field(
        description="base model: a Hugging Face folder, a .gguf file or a hub name; for plan also llama2-7b, -13b, "
        "-70b, qwen3-8b, -32b, gemma3-12b, -27b, phi4-14b, gpt2 to gpt2-xl, distilgpt2"
    )
    tokenizer: str | None = Field(None, description="another folder for the tokenizer, where the base has none")
    resize_embeddings: bool = Field(
        False,
        description="give the embedding, and the head, rows for tokens of the tokenizer that they have none for: the "
        "mean of the others",
    )
    dtype: Dtype = Field(
        "bfloat16", description="base weights and matmuls; float32 (never TF32) for parity checks and CPUs"
    )
    quantization: Quantization | None = Field(
        None,
        description="the base's projections in 8 bits (int8, fp8) or 4 (nf4 as QLoRA, int4), quantised while they "
        "are read; embedding, head and norms stay in dtype",
    )
    compute: Compute | None = Field(
        None,
        description="products with the base's projections in 8 bits on both sides and in both passes, the base held in "
        "them: int8 on A100 and TPU v5e, fp8 on Ada, Hopper and later; null is in dtype",
    )
    compute_max_loss_gap: Positive | None = Field(
        0.1,
        description="with compute: how far the held-out loss of the base may be over that in dtype, before the first "
        "step; null does not look",
    )
    compute_fallback: bool = Field(
        False, description="with compute: train in dtype where the loss is further off, and do not stop"
    )
    attention: Literal["auto", "reference", "blocked", "cudnn", "splash"] = Field(
        "auto",
        description="attention: all scores in memory (reference), tile by tile (blocked), cuDNN on GPUs, splash on "
        "TPUs, or what fits (auto)",
    )
    remat: Remat = Field(
        "full",
        description="what the backward pass computes again; kept are everything (none), what spares each product of a "
        "weight (lean), of that all but gate and up (qkv), nor q, k and v (attention), a layer's input alone (full), "
        "or that in the host's memory (offload); auto takes the first of them that fits",
    )
    scan_layers: bool = Field(
        True,
        description="the layers as one compiled loop, which compiles soon and copies each layer's weights out of their "
        "stack, or (false) one by one, each in arrays of its own",
    )

    @model_validator(mode="before")
    @classmethod
    def _held_as_computed(cls, tree: Any) -> Any:
        """A base whose codes are multiplied with is held in them."""
        if isinstance(tree, dict) and tree.get("compute") in get_args(Compute) and tree.get("quantization") is None:
            return tree | {"quantization": tree["compute"]}
        return tree

    def conflicts(self) -> Iterator[str]:
        if self.compute not in (None, self.quantization):
            yield (
                f"compute={self.compute} multiplies with codes of its own kind, but quantization={self.quantization} "
                f"holds others; set quantization={self.compute} or leave it out"
            )

    @field_validator("remat", mode="before")
    @classmethod
    def _former_name(cls, value: Any) -> Any:
        return FORMER_REMAT.get(value, value) if isinstance(value, str) else value


class ObjectiveSection(Section):
    """What is minimised."""

    name: Literal["sft", "dpo", "ipo", "hinge", "orpo"] = Field(
        "sft",
        description="the next token's cross-entropy (sft), or a loss on pairs of answers, with data.format=preference: "
        "see docs/objectives.md",
    )
    beta: Positive = Field(
        0.1, description="how much a pair's log-ratios count (dpo, hinge), tau of ipo, the weight of orpo's odds"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="share of the pairs that may be the wrong way round (dpo)"
    )

    def conflicts(self) -> Iterator[str]:
        if self.label_smoothing and self.name != "dpo":
            yield f"label_smoothing is dpo's, and name is {self.name}; set it to 0"


class TrainingSection(Section):
    """The loop."""

    batch_size: PositiveInt = Field(8, description="rows of a batch in one optimizer step, over all devices")
    gradient_accumulation_steps: PositiveInt = Field(
        1, description="parts that a batch is split into to save memory; the result is the same"
    )
    epochs: Annotated[int, Field(gt=0, le=10**6)] | Annotated[float, Field(gt=0, le=10**6)] = Field(
        1, description="passes over the data, such as 3 or 0.5; max_steps overrides it"
    )
    max_steps: Annotated[int, Field(gt=0, le=MOST_STEPS)] | None = Field(
        None, description="optimizer steps; the data repeat, reshuffled"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="adapter init, dropout and row order")
    log_every: PositiveInt = Field(1, description="steps between lines of metrics.jsonl")
    eval_every: PositiveInt | None = Field(None, description="steps between evaluations; null: start and end only")
    evals_per_epoch: PositiveInt | None = Field(None, description="evaluations an epoch, instead of eval_every")
    save_every: PositiveInt | None = Field(None, description="steps between checkpoints; null: at the end only")
    saves_per_epoch: PositiveInt | None = Field(None, description="checkpoints an epoch, instead of save_every")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="evaluations in a row without a lower held-out loss, after which training stops; null: never"
    )
    early_stopping_min_delta: NonNegative = Field(
        0.0, description="nats by which a held-out loss must be lower than the lowest before to count"
    )
    export: Literal["last", "best"] | None = Field(
        None,
        description="the adapter that a finished run leaves: its last step's, or the evaluated step's with the lowest "
        "held-out loss; null: best with early_stopping_patience, else last",
    )
    keep_checkpoints: PositiveInt = Field(2, description="newest checkpoints kept, beside the best by held-out loss")
    max_nonfinite_steps: Annotated[int, Field(ge=0)] = Field(
        10,
        description="steps skipped, for a loss or gradients that are not finite or a spike, before the run stops "
        "(exit 6)",
    )
    max_loss_spike: Annotated[float, Field(gt=1.0)] | None = Field(
        None,
        description="a step whose loss is over so many times the median of the last 32 (once there are 8) is skipped, "
        "such as 3.0; null: none is",
    )
    neftune_noise_alpha: Positive | None = Field(
        None, description="noise on embeddings in training, within alpha / sqrt(length * width) (arXiv:2310.05914)"
    )
    samples: Annotated[int, Field(ge=0, le=32)] = Field(
        0,
        description="rows, held-out ones if there are, that are answered before and after training, for report.html; "
        "on one device alone",
    )
    wandb: str | None = Field(None, description="Weights & Biases project to log to; needs the extra wandb")
    mlflow: str | None = Field(
        None, description="MLflow experiment to log to, where MLFLOW_TRACKING_URI says; needs the extra mlflow"
    )
    trackio: str | None = Field(None, description="trackio project to log to; needs the extra trackio")

    @property
    def exports_best(self) -> bool:
        """Whether a run's adapter is that of the lowest held-out loss."""
        return self.export == "best" or (self.export is None and self.early_stopping_patience is not None)

    def conflicts(self) -> Iterator[str]:
        for every, per_epoch in (("eval_every", "evals_per_epoch"), ("save_every", "saves_per_epoch")):
            if getattr(self, every) is not None and getattr(self, per_epoch) is not None:
                yield f"{every} and {per_epoch} say the same twice; set one of them"
        evaluates = self.eval_every is not None or self.evals_per_epoch is not None
        if self.exports_best and not evaluates:
            key = "export=best" if self.export == "best" else "early_stopping_patience"
            yield f"{key} goes by the held-out loss on the way; set evals_per_epoch or eval_every"
        if self.early_stopping_min_delta and self.early_stopping_patience is None:
            yield "early_stopping_min_delta goes with early_stopping_patience; set that, too"
        if self.batch_size % self.gradient_accumulation_steps:
            yield (
                f"batch_size {self.batch_size} cannot be split into {self.gradient_accumulation_steps} equal "
                "parts; make gradient_accumulation_steps a divisor of batch_size"
            )


class OptimizerSection(Section):
    """The update rule."""

    name: Literal["adamw", "adafactor", "lion", "sgd"] = Field("adamw", description="optimizer")
    learning_rate: Positive = Field(2e-4, description="peak learning rate")
    weight_decay: NonNegative = Field(0.0, description="weight decay, decoupled; with sgd added to the gradient")
    b1: Share = Field(0.9, description="first-moment decay; momentum of sgd")
    b2: Share = Field(0.999, description="second-moment decay (adamw, lion)")
    eps: Positive = Field(1e-8, description="added to AdamW's denominator")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay from the peak over the steps after warm-up, or none"
    )
    warmup_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] = Field(
        0, description="steps of linear warm-up; the first has rate 0, as in transformers"
    )
    warmup_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="share of all steps that warm up, rounded up, instead of warmup_steps"
    )
    min_learning_rate_ratio: Share = Field(0.0, description="share of the peak at which cosine and linear end")
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0)] | None = Field(
        None, description="LoRA+: the learning rate of B is so many times that of A (arXiv:2402.12354)"
    )
    max_grad_norm: Positive | None = Field(
        1.0, description="gradients are scaled down to this global norm; null: never"
    )

    def conflicts(self) -> Iterator[str]:
        if self.warmup_steps and self.warmup_ratio is not None:
            yield "warmup_steps and warmup_ratio say the same twice; set one of them"
        if self.min_learning_rate_ratio and self.schedule == "constant":
            yield "min_learning_rate_ratio is where a schedule ends; set schedule=cosine or linear"


class ResumeSection(Section):
    """Going on from a checkpoint."""

    allow_changes: list[str] = Field(
        [],
        description="what may differ from the run that wrote the checkpoint, by the names of the refusal, such as "
        "config.optimizer.learning_rate or hashes.data; recorded in summary.json",
    )


class MeshSection(Section):
    """How devices share the work."""

    data: int = Field(1, description="devices over which batches are split, weights copied")
    fsdp: int = Field(-1, description="devices over which batches and weights are split; -1: the rest")
    tensor: int = Field(1, description="devices over which heads and mlp are split")
    context: int = Field(1, description="devices over which the tokens of each row are split")

    def conflicts(self) -> Iterator[str]:
        sizes = (self.data, self.fsdp, self.tensor, self.context)
        if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
            yield "axes are positive device counts, and at most one is -1 (the rest)"


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

    def conflicts(self) -> Iterator[str]:
        if len({self.coordinator is None, self.num_processes is None, self.process_id is None}) > 1:
            yield "set coordinator, num_processes and process_id, or none of them"
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            yield f"coordinator must be host:port, not '{self.coordinator}'"
        if self.process_id is not None and self.num_processes is not None and self.process_id >= self.num_processes:
            yield f"process_id {self.process_id} must be below num_processes {self.num_processes}"


class Config(Section):
    """A whole run."""

    model: ModelSection
    method: Literal["lora", "full"] = Field("lora", description="train adapters, or every weight of the base")
    lora: LoraSection = LoraSection()
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    resume: ResumeSection = ResumeSection()
    sweep: list[dict[str, Any]] = Field(
        [],
        description="runs trained one after another over one base: each a name and the dotted keys in which it "
        "differs; see docs/sweep.md",
    )
    sweep_halving: bool = Field(
        False, description="train a sweep's runs rung by rung, and stop the worse half by held-out loss at each"
    )
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()
    output_dir: NonEmpty = Field(
        description="run folder; holding a checkpoint of the same run, training resumes from it"
    )

    def conflicts(self) -> Iterator[str]:
        if self.method == "full" and not self.model.scan_layers:
            yield "model.scan_layers=false is for a frozen base, and method=full trains it; set it to true"
        if self.method == "full" and self.model.quantization is not None:
            yield (
                f"method=full trains every weight, which model.quantization={self.model.quantization} cannot hold; "
                "set model.quantization=null or method=lora"
            )
        pairs, wanted = self.data.format == "preference", self.objective.name != "sft"
        if pairs and not wanted:
            yield "data.format=preference holds pairs, which sft cannot use; set objective.name=dpo"
        if wanted and not pairs:
            yield f"objective.name={self.objective.name} needs pairs; set data.format=preference"
        if wanted and self.method != "lora":
            yield f"objective.name={self.objective.name} is for adapters; set method=lora"
        if wanted and self.data.train_on != "response":
            yield f"objective.name={self.objective.name} counts answers alone; set data.train_on=response"
        if self.training.exports_best and self.data.eval is None:
            key = "early_stopping_patience" if self.training.early_stopping_patience else "export=best"
            yield f"training.{key} goes by the held-out loss; set data.eval, such as 0.1"
        if self.method == "full" and self.optimizer.loraplus_lr_ratio is not None:
            yield "optimizer.loraplus_lr_ratio is about an adapter's B, which method=full does not have"

    def dump_yaml(self) -> str:
        """The resolved configuration, every default filled in, as YAML."""
        return dump_yaml(self.model_dump())


# By name, what of a config has keys of its own.
SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def known_keys() -> list[str]:
    """Every key of a config."""
    inner = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
    return [*(name for name in Config.model_fields if name not in SECTIONS), *inner]


def dotted(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted key; an empty mapping has none."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key, in sections that are made where they are missing.

    Raises:
      ValueError: a part of the key is no section.
    """
    *sections, leaf = key.split(".")
    for name in sections:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ValueError(f"'{name}' is not a section")
    tree[leaf] = value
