"""A torchtune recipe's configuration as a jlora one. Keys as documented by torchtune's recipes and builders (0.7)."""

import re
from typing import Any

from jlora.config.convert.rules import LOGS, Conversion, Differs, Table, To, Without, alike, is_set, one_of
from jlora.config.lora import MLP_PROJECTIONS, PROJECTIONS
from jlora.errors import ConfigError

NAME = "torchtune"

FAMILIES = ("llama2", "code_llama2", "llama3", "llama3_1", "llama3_2", "llama3_3", "mistral", "qwen2", "qwen2_5")
FILES = "the base is read from its folder as it is, whatever its files are called"

# Builders of data sets: the hub's name where one is fixed, our format, and what else is to be said.
Builder = tuple[str | None, str, str | None]
COLUMNS = "rename columns: rows need {}"
PAIRS = COLUMNS.format("prompt, chosen and rejected")
DATASETS: dict[str, Builder] = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca", None),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca", None),
    "instruct_dataset": (None, "completion", COLUMNS.format("prompt and completion, there input and output")),
    "chat_dataset": (None, "messages", None),
    "text_completion_dataset": (None, "text", None),
    "wikitext_dataset": ("EleutherAI/wikitext_document_level", "text", COLUMNS.format("text")),
    "cnn_dailymail_articles_dataset": ("ccdv/cnn_dailymail", "text", COLUMNS.format("text, there article")),
    "samsum_dataset": ("Samsung/samsum", "completion", COLUMNS.format("prompt and completion")),
    "grammar_dataset": ("liweili/c4_200m", "completion", COLUMNS.format("prompt and completion")),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt", None),
    "preference_dataset": (None, "preference", PAIRS),
    "stack_exchange_paired_dataset": (
        "lvwerra/stack-exchange-paired",
        "preference",
        PAIRS,
    ),
    "hh_rlhf_helpful_dataset": (
        "RLHFlow/HH-RLHF-Helpful-standard",
        "preference",
        PAIRS,
    ),
}
OPTIMIZERS = {"AdamW": "adamw", "Adam": "adamw", "SGD": "sgd", "Adafactor": "adafactor", "Lion": "lion"}
OPTIMIZERS |= {"AdamW8bit": "adamw", "PagedAdamW": "adamw", "PagedAdamW8bit": "adamw", "AdamW4bit": "adamw"}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
LOSSES = ("LinearCrossEntropyLoss", "CEWithChunkedOutputLoss", "CrossEntropyLoss", "SFTLoss")


def _optimizer(value: Any) -> str:
    name = str(value).split(".")[-1]
    if name not in OPTIMIZERS:
        raise Differs("jlora has adamw, adafactor, lion and sgd; adamw is taken", instead="adamw")
    if "bit" in name or "Paged" in name:
        raise Differs("the same AdamW, but its moments stay in float32 (4 bytes each)", "cost", "adamw")
    if name == "Adam":
        raise Differs("decays weights by the gradient; adamw does it apart from it", instead="adamw")
    return OPTIMIZERS[name]


def _schedule(value: Any) -> str:
    if str(value).endswith("get_cosine_schedule_with_warmup"):
        return "cosine"
    raise Differs("jlora has cosine, linear and constant; cosine is taken", instead="cosine")


TABLE: Table = {
    "model.lora_rank": To("lora.rank", int),
    "model.lora_alpha": To("lora.alpha", float),
    "model.lora_dropout": To("lora.dropout", float),
    "model.use_dora": To("lora.use_dora", bool),
    "tokenizer.max_seq_len": To("data.max_length", int),
    "checkpointer.checkpoint_dir": To("model.path", str),
    "output_dir": To("output_dir", str),
    "epochs": To("training.epochs", int),
    "seed": To("training.seed", int),
    "log_every_n_steps": To("training.log_every", int),
    "run_val_every_n_steps": To("training.eval_every", int),
    "save_every_n_steps": To("training.save_every", int),
    "keep_last_n_checkpoints": To("training.keep_checkpoints", int),
    "optimizer._component_": To("optimizer.name", _optimizer),
    "optimizer.lr": To("optimizer.learning_rate", float),
    "optimizer.weight_decay": To("optimizer.weight_decay", float),
    "optimizer.eps": To("optimizer.eps", float),
    "optimizer.momentum": To("optimizer.b1", float),
    "lr_scheduler._component_": To("optimizer.schedule", _schedule),
    "lr_scheduler.num_warmup_steps": To("optimizer.warmup_steps", int),
    "clip_grad_norm": To("optimizer.max_grad_norm", float),
    "dtype": To("model.dtype", one_of(DTYPES, "bfloat16", "needs a loss scale; {} is taken")),
    "tensor_parallel_dim": To("mesh.tensor", int),
    "context_parallel_dim": To("mesh.context", int),
    "data_parallel_replicate_dim": To("mesh.data", int),
    "data_parallel_shard_dim": To("mesh.fsdp", int),
    # Other results.
    "model.apply_lora_to_output": Without("result", "lm_head takes no adapter; see lora.modules_to_save", (False,)),
    "model.quantize_base": Without("aside", "said by the component"),
    "shuffle": Without("result", "rows are always shuffled", (True,)),
    "lr_scheduler.num_cycles": Without("result", "the cosine falls to zero once", (0.5,)),
    "optimizer.dampening": Without("result", "there is none", (0, 0.0)),
    "optimizer.nesterov": Without("result", "there is none", (False,)),
    "optimizer.amsgrad": Without("result", "there is none", (False,)),
    "quantizer": Without("result", "no quantisation-aware training"),
    **alike(Without("result", "no distillation from a teacher"), "teacher_model teacher_checkpointer kd_loss kd_ratio"),
    "tokenizer.prompt_template": Without("result", "give a chat template as data.chat_template"),
    "collate_fn": Without("result", "rows become batches as data.format says"),
    # Other speed or memory.
    **alike(
        Without("cost", "is how torchtune computes the same; jlora compiles its step always", (False, 1)),
        "compile optimizer.fused optimizer.foreach optimizer_in_bwd custom_sharded_layers fsdp fsdp_cpu_offload "
        "low_cpu_ram use_loss_parallel_ctx_manager enable_async_checkpointing fsdp_reshard_after_forward "
        "enable_fp8_training ac_mode ac_option batch_size_val loss.num_output_chunks",
    ),
    # Neither.
    **alike(Without("aside", FILES), "checkpointer.checkpoint_files checkpointer.model_type checkpointer._component_"),
    **alike(
        Without("aside", "the base's folder holds its tokenizer; set model.tokenizer for another"),
        "tokenizer._component_ tokenizer.path tokenizer.merges_file",
    ),
    **alike(
        Without("aside", "a jlora run goes on by itself from output_dir's last checkpoint", (False,)),
        "resume_from_checkpoint checkpointer.recipe_checkpoint checkpointer.output_dir "
        "checkpointer.adapter_checkpoint save_adapter_weights_only should_load_recipe_state",
    ),
    **alike(Without("aside", LOGS, (False,)), "metric_logger log_peak_memory_stats log_level profiler"),
    "device": Without("aside", "JAX takes what is there"),
}

# Read together with others below.
JOINT = (
    *("model._component_", "model.lora_attn_modules", "model.apply_lora_to_mlp", "dataset", "dataset_val"),
    *("batch_size", "gradient_accumulation_steps", "max_steps_per_epoch", "optimizer.betas", "loss._component_"),
    *("loss.beta", "loss.label_smoothing", "loss.gamma", "enable_activation_checkpointing"),
    "enable_activation_offloading",
)
# Mappings that are looked into; the others are one key.
OPENED = ("model", "tokenizer", "checkpointer", "optimizer", "lr_scheduler", "loss")


def is_ours(tree: dict[str, Any]) -> bool:
    """Whether a file looks like one of torchtune's."""
    return isinstance(tree.get("model"), dict) and "_component_" in tree["model"]


def convert(tree: dict[str, Any], devices: int) -> Conversion:
    """A torchtune recipe as a jlora config, with notes on what is not in it.

    Args:
      devices: how many it runs on: torchtune's batch is each one's, jlora's is that of all.

    Raises:
      ConfigError: a model that is not of the Llama family, or no LoRA recipe.
    """
    tree = _resolve(tree, tree)
    out = Conversion()
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in OPENED and isinstance(value, dict):
            flat |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        else:
            flat[key] = value
    given = {key: value for key, value in flat.items() if is_set(value)}
    _model(given, out)
    for key, value in given.items():
        if key in TABLE:
            out.apply(key, value, TABLE[key])
        elif key not in JOINT:
            out.note(key, value, "result", "the converter does not know this key; see torchtune's recipe")
    _training(given, devices, out)
    _data(given, out)
    _objective(given, out)
    return out


def _resolve(value: Any, tree: dict[str, Any]) -> Any:
    """`${key}` and `${section.key}` as what they stand for."""
    if isinstance(value, dict):
        return {key: _resolve(inner, tree) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner, tree) for inner in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        found: Any = tree
        for name in match[1].split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return match[0] if found is None or isinstance(found, dict | list) else str(found)

    return re.sub(r"\$\{([\w.]+)\}", look_up, value)


def _model(given: dict[str, Any], out: Conversion) -> None:
    component = str(given["model._component_"])
    *_, family, builder = ["", *component.split(".")]
    if family not in FAMILIES:
        raise ConfigError(f"model._component_: '{component}' is not one of the families {', '.join(FAMILIES)}")
    if not builder.startswith(("lora_", "qlora_")):
        raise ConfigError(f"model._component_: '{component}' is no LoRA recipe; --from takes lora_* and qlora_*")
    quantized = builder.startswith("qlora_") or given.get("model.quantize_base")
    out.set("model.quantization", "nf4" if quantized else None)
    named = ["o_proj" if name == "output_proj" else name for name in given.get("model.lora_attn_modules", [])]
    targets = [*named, *(MLP_PROJECTIONS if given.get("model.apply_lora_to_mlp") else ())]
    out.set("lora.target_modules", [name for name in PROJECTIONS if name in targets])
    if unknown := [name for name in named if name not in PROJECTIONS]:
        out.note("model.lora_attn_modules", unknown, "result", "no such projection")
    # What the builders and recipes take where a key is not there, and jlora would not.
    out.set("lora.rank", 8)
    out.set("lora.alpha", 16.0)
    if "tokenizer.max_seq_len" not in given:
        out.note("tokenizer.max_seq_len", None, "result", "no row is cut there; here data.max_length cuts: set it")
    out.set("optimizer.max_grad_norm", None)
    if str(given.get("optimizer._component_", "")).endswith("AdamW"):
        out.set("optimizer.weight_decay", 0.01)


def _training(given: dict[str, Any], devices: int, out: Conversion) -> None:
    parts = int(given.get("gradient_accumulation_steps", 1))
    replicas = max(1, devices // out.devices_of_a_row)
    out.set("training.batch_size", int(given.get("batch_size", 1)) * parts * replicas)
    out.set("training.gradient_accumulation_steps", parts)
    kept = "full" if given.get("enable_activation_checkpointing") else "none"
    out.set("model.remat", "offload" if given.get("enable_activation_offloading") else kept)
    if "lr_scheduler._component_" not in given:
        out.set("optimizer.schedule", "constant")
    if betas := given.get("optimizer.betas"):
        out.set("optimizer.b1", float(betas[0]))
        out.set("optimizer.b2", float(betas[1]))
    if most := given.get("max_steps_per_epoch"):
        epochs = int(given.get("epochs", 1))
        out.set("training.max_steps", int(most) * epochs)
        out.note("max_steps_per_epoch", most, "result", "a shorter epoch would end there; here the data repeat")


def _data(given: dict[str, Any], out: Conversion) -> None:
    rows, several = given.get("dataset"), []
    if isinstance(rows, list):
        alike = [one for one in rows if one.get("_component_") == rows[0].get("_component_")]
        for other in rows:
            if other not in alike:
                out.note("dataset", other.get("_component_"), "result", "the sources of a mixture have one format")
        rows, several = (rows[0] if rows else None), alike
    if not isinstance(rows, dict):
        out.note("dataset", rows, "result", "no rows are named: set data.train")
        return
    builder = str(rows.get("_component_")).split(".")[-1]
    source, kind, more = DATASETS.get(builder, (None, "completion", "write rows of a format of data.format"))
    if more:
        out.note("dataset._component_", builder, "result", more)
    train = [{"path": _source(one, source)} for one in several]
    out.set("data.train", train if len(train) > 1 else _source(rows, source))
    out.set("data.format", kind)
    out.set("data.packing", bool(rows.get("packed", False)))
    if kind == "preference" and (length := out.get("data.max_length")):
        out.set("data.max_length", 2 * length)  # here a pair's two sequences share a row
    # Of the builders, those of Alpaca rows alone train the prompt as well unless told otherwise.
    if kind not in ("text", "preference"):
        out.set("data.train_on", "all" if rows.get("train_on_input", kind == "alpaca") else "response")
    sharegpt = rows.get("conversation_style") == "sharegpt"
    if sharegpt:
        out.set("data.format", "sharegpt")
    wanted = "conversations" if sharegpt else "messages"
    if (column := rows.get("conversation_column", wanted)) != wanted:
        out.note("dataset.conversation_column", column, "result", COLUMNS.format(wanted))
    if rows.get("column", "text") != "text":
        out.note("dataset.column", rows["column"], "result", COLUMNS.format("text"))
    for key in ("column_map", "new_system_prompt", "filter_fn", "subset", "name"):
        if is_set(rows.get(key)):
            out.note(f"dataset.{key}", rows[key], "result", "rows are read as they are: change them in the file")
    if "split_across_pack" in rows:
        out.set("data.split_long", bool(rows["split_across_pack"]))
    split, held = rows.get("split"), given.get("dataset_val")
    if split:
        out.set("data.split", str(split))
    if isinstance(held, dict):
        _held_out(_source(held, source), str(held.get("split", "train")), split, out)


def _source(rows: dict[str, Any], by_builder: str | None) -> str:
    files = rows.get("data_files")
    files = files[0] if isinstance(files, list) and files else files
    return str(files or rows.get("source") or by_builder or "rows.jsonl")


def _held_out(held: str, held_split: str, split: Any, out: Conversion) -> None:
    """`train[:95%]` and `train[95%:]` of one source are a fraction held out; another source is data.eval."""
    rest = re.fullmatch(r"(\w+)\[(\d+)%:\]", held_split)
    if rest and held == out.get("data.train") and str(split) == f"{rest[1]}[:{rest[2]}%]":
        out.set("data.eval", (100 - int(rest[2])) / 100)
        out.set("data.split", rest[1])
        out.note("dataset_val.split", held_split, "cost", "as many rows are held out, drawn by training.seed")
        return
    out.set("data.eval", held)
    if held_split != str(split or "train"):
        out.note("dataset_val.split", held_split, "result", "data.split is that of data.train and of data.eval")


def _objective(given: dict[str, Any], out: Conversion) -> None:
    loss = str(given.get("loss._component_", LOSSES[0])).split(".")[-1]
    if loss in LOSSES:
        return
    name = {"DPOLoss": "dpo", "RSOLoss": "hinge"}.get(loss)
    if name is None:
        out.note("loss._component_", loss, "result", "jlora has cross-entropy, dpo, ipo, hinge and orpo")
        return
    out.set("objective.name", name)
    out.set("objective.beta", float(given.get("loss.beta", given.get("loss.gamma", 0.1))))
    if name == "dpo":
        out.set("objective.label_smoothing", float(given.get("loss.label_smoothing", 0.0)))
