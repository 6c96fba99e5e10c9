"""An Axolotl configuration as a jlora one. Keys as documented in Axolotl's config reference (0.13, 2026-07)."""

from typing import Any

from jlora.config.convert.axolotl_rows import TEMPLATE, datasets
from jlora.config.convert.rules import LOGS, Conversion, Differs, Table, To, Without, alike, is_set, one_of
from jlora.config.lora import PROJECTIONS

NAME = "Axolotl"
# 8-bit and paged states hold the same moments in fewer bytes; jlora's are float32.
ADAMW = ("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "optimi_adamw", "flash_adamw")
ADAMW_SMALL = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw", "ao_adamw_4bit"),
    *("ao_adamw_8bit", "ao_adamw_fp8"),
)
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
SPEED = "is how Axolotl computes the same; jlora chooses its own (model.attention)"
SHARING = "devices share the work by mesh, without a file of its own"
HUB = "jlora uploads nothing; the adapter lies in output_dir/adapter"


def _optimizer(value: Any) -> str:
    name = str(value).lower()
    if name in ADAMW or name == "flash_adam":
        return "adamw"
    if name in ADAMW_SMALL:
        raise Differs("the same AdamW, but its moments stay in float32 (4 bytes each)", "cost", "adamw")
    if name.removeprefix("flash_") in ("adafactor", "sgd"):
        return name.removeprefix("flash_")
    if name in ("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "lion", "flash_lion"):
        return "lion"
    raise Differs("jlora has adamw, adafactor, lion and sgd; adamw is taken", instead="adamw")


def _remat(value: Any) -> str:
    if value in ("offload", "unsloth"):
        return "offload"
    if value == "offload_disk":
        raise Differs("goes to the host's memory, not to disk", "cost", "offload")
    return "full" if value else "none"


def _targets(value: Any) -> Any:
    if value == "all-linear":
        return value
    names = [value] if isinstance(value, str) else list(value)
    known = [name for name in PROJECTIONS if name in names]
    if len(known) < len(names):
        others = ", ".join(str(name) for name in names if name not in known)
        raise Differs(f"adapters are for {', '.join(PROJECTIONS)}, not for {others}", instead=known or None)
    return known


def _layers(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else [int(layer) for layer in value]


def _modules(value: Any) -> list[str]:
    known = [name for name in value if name in ("embed_tokens", "lm_head")]
    if len(known) < len(value):
        raise Differs("only embed_tokens and lm_head can be trained in full beside an adapter", instead=known or None)
    return known


def _initial(value: Any) -> Any:
    if value is True or value in ("gaussian", "pissa", "olora") or str(value).startswith("pissa_niter_"):
        return value
    raise Differs("A and B start as with true (Kaiming-uniform and 0)", instead=True)


def _steps(value: Any) -> int:
    if isinstance(value, bool) or float(value) < 1:
        raise Differs("a share of all steps; jlora counts steps", "cost")
    return int(value)


def _template_file(value: Any) -> str:
    if str(value).endswith((".jinja", ".jinja2")) and "\n" not in str(value):
        return str(value)
    raise Differs("write it to a .jinja file and name that in data.chat_template")


def _held_out(value: Any) -> float | None:
    if float(value) >= 1:
        raise Differs("a number of rows; data.eval takes a fraction or a file")
    return float(value) or None


TABLE: Table = {
    "base_model": To("model.path", str),
    "tokenizer_config": To("model.tokenizer", str),
    "sequence_len": To("data.max_length", int),
    "sample_packing": To("data.packing", bool),
    "train_on_inputs": To("data.train_on", lambda value: "all" if value else "response"),
    "val_set_size": To("data.eval", _held_out),
    "chat_template": TEMPLATE,
    "chat_template_jinja": To("data.chat_template", _template_file),
    "lora_r": To("lora.rank", int),
    "lora_alpha": To("lora.alpha", float),
    "lora_dropout": To("lora.dropout", float),
    "lora_target_modules": To("lora.target_modules", _targets),
    "lora_model_dir": To("lora.init_from", str),
    "lora_modules_to_save": To("lora.modules_to_save", _modules),
    "lora_rank_pattern": To("lora.rank_pattern", dict),
    "lora_alpha_pattern": To("lora.alpha_pattern", dict),
    "peft_use_rslora": To("lora.use_rslora", bool),
    "peft_use_dora": To("lora.use_dora", bool),
    "peft_layers_to_transform": To("lora.layers_to_transform", _layers),
    "peft_init_lora_weights": To("lora.init_lora_weights", _initial),
    "loraplus_lr_ratio": To("optimizer.loraplus_lr_ratio", float),
    "neftune_noise_alpha": To("training.neftune_noise_alpha", float),
    "num_epochs": To("training.epochs", lambda value: int(value) if float(value).is_integer() else float(value)),
    "max_steps": To("training.max_steps", lambda value: int(value) if int(value) > 0 else None),
    "seed": To("training.seed", int),
    "logging_steps": To("training.log_every", _steps),
    "evals_per_epoch": To("training.evals_per_epoch", int),
    "saves_per_epoch": To("training.saves_per_epoch", int),
    "early_stopping_patience": To("training.early_stopping_patience", int),
    "load_best_model_at_end": To("training.export", lambda value: "best" if value else "last"),
    "eval_steps": To("training.eval_every", _steps),
    "save_steps": To("training.save_every", _steps),
    "save_total_limit": To("training.keep_checkpoints", int),
    "optimizer": To("optimizer.name", _optimizer),
    "learning_rate": To("optimizer.learning_rate", float),
    "weight_decay": To("optimizer.weight_decay", float),
    "adam_beta1": To("optimizer.b1", float),
    "adam_beta2": To("optimizer.b2", float),
    "adam_epsilon": To("optimizer.eps", float),
    "max_grad_norm": To("optimizer.max_grad_norm", lambda value: float(value) or None),
    "lr_scheduler": To("optimizer.schedule", one_of(SCHEDULES, "cosine")),
    "warmup_steps": To("optimizer.warmup_steps", int),
    "cosine_min_lr_ratio": To("optimizer.min_learning_rate_ratio", float),
    "gradient_checkpointing": To("model.remat", _remat),
    "tensor_parallel_size": To("mesh.tensor", int),
    "dp_replicate_size": To("mesh.data", int),
    "dp_shard_size": To("mesh.fsdp", int),
    **dict.fromkeys(("context_parallel_size", "sequence_parallel_degree"), To("mesh.context", int)),
    "rl_beta": To("objective.beta", float),
    "orpo_alpha": To("objective.beta", float),
    "dpo_label_smoothing": To("objective.label_smoothing", float),
    "output_dir": To("output_dir", str),
    # Other results.
    "special_tokens": Without("result", "the tokenizer's own tokens are used; change them in its folder"),
    "tokens": Without(
        "result",
        "no token is added to a tokenizer; save one that has them, and set model.tokenizer and model.resize_embeddings",
    ),
    "added_tokens_overrides": Without("result", "the tokenizer's own tokens are used"),
    "default_system_message": Without("result", "write it into the rows"),
    "group_by_length": Without("result", "rows are drawn in a random order, whatever their length", (False,)),
    **alike(
        Without("result", "there is one learning rate, and LoRA+'s for B"),
        "lr_groups embedding_lr embedding_lr_scale loraplus_lr_embedding",
    ),
    "cosine_constant_lr_ratio": Without("result", "the cosine goes on to the last step"),
    "lr_scheduler_kwargs": Without("result", "a schedule has optimizer.warmup_steps alone"),
    "optim_args": Without("result", "set optimizer.b1, b2 and eps"),
    "relora": Without("result", "an adapter is not merged in mid-course", (False,)),
    "loftq": Without("result", "A and B do not start from the base's rounding error"),
    "unfrozen_parameters": Without("result", "the base stays frozen; see lora.modules_to_save and method: full"),
    "lora_fan_in_fan_out": Without("result", "is for other architectures", (False,)),
    "shuffle_merged_datasets": Without("result", "rows are always shuffled", (True,)),
    "curriculum_sampling": Without("result", "rows are always shuffled", (False,)),
    "dataset_exact_deduplication": Without("result", "rows that stand twice are trained twice", (False,)),
    "excess_length_strategy": Without("result", "a row that is too long is cut at its end", ("truncate",)),
    "min_sample_len": Without("result", "no row is too short"),
    "test_datasets": Without("result", "name one file in data.eval"),
    "pretraining_dataset": Without("result", "use data.train with data.format=text"),
    "qat": Without("result", "no quantisation-aware training"),
    **alike(
        Without("result", "training.max_loss_spike skips a spike instead of stopping"),
        "loss_watchdog_threshold loss_watchdog_patience",
    ),
    # Other speed or memory.
    **alike(
        Without("cost", SPEED, (False,)),
        "flash_attention xformers_attention sdp_attention flex_attention sage_attention eager_attention "
        "attn_implementation flash_attn_cross_entropy flash_attn_fuse_mlp lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel torch_compile torch_compile_backend tf32 chunked_cross_entropy activation_offloading "
        "gradient_checkpointing_kwargs eval_batch_size selective_checkpointing pad_to_sequence_len "
        "eval_sample_packing lora_on_cpu fp8",
    ),
    **alike(Without("cost", SHARING, (False,)), "deepspeed fsdp fsdp_config fsdp_version ddp device_map max_memory"),
    "eval_strategy": Without("cost", "set training.evals_per_epoch or eval_every", ("no", "steps")),
    "save_strategy": Without("cost", "set training.saves_per_epoch or save_every", ("no", "steps")),
    # Neither.
    **alike(
        Without("aside", LOGS),
        "wandb_project wandb_entity wandb_watch wandb_name wandb_run_id wandb_log_model wandb_mode "
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name use_mlflow use_comet comet_project_name "
        "use_tensorboard use_wandb include_tokens_per_second",
    ),
    **alike(Without("aside", HUB), "hub_model_id hub_strategy push_dataset_to_hub hub_revision"),
    **alike(
        Without("aside", "a jlora run resumes by itself from output_dir's last checkpoint", (False,)),
        "resume_from_checkpoint auto_resume_from_checkpoints save_first_step save_only_model",
    ),
    **alike(
        Without("aside", "the base's own config.json and tokenizer say it", (False,)),
        "base_model_config model_type tokenizer_type tokenizer_use_fast tokenizer_legacy is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model",
    ),
    **alike(
        Without("aside", "is about Axolotl's own running", (False,)),
        "dataset_prepared_path dataset_processes dataset_num_proc dataloader_num_workers strict dataloader_pin_memory "
        "dataloader_prefetch_factor local_rank ddp_timeout debug low_cpu_mem_usage save_safetensors gc_steps "
        "hf_use_auth_token bnb_config_kwargs remove_unused_columns lora_target_parameters trust_remote_code float16 "
        "bfloat16",
    ),
}

# Read together with others below.
JOINT = (
    *("adapter", "load_in_8bit", "load_in_4bit", "lora_target_linear", "micro_batch_size", "batch_size"),
    *("gradient_accumulation_steps", "datasets", "rl", "bf16", "fp16", "float32", "warmup_ratio", "plugins"),
)

# What Axolotl does where a key is not there, and jlora would not.
DEFAULTS = {"sequence_len": 512, "sample_packing": False, "gradient_checkpointing": False, "seed": 42}


def is_ours(tree: dict[str, Any]) -> bool:
    """Whether a file looks like one of Axolotl's."""
    return "base_model" in tree


def convert(tree: dict[str, Any], devices: int) -> Conversion:
    """An Axolotl file as a jlora config, with notes on what is not in it.

    Args:
      devices: how many it runs on: Axolotl's batch is each one's, jlora's is that of all.
    """
    out = Conversion()
    given = {key: value for key, value in tree.items() if is_set(value)}
    if isinstance(given.get("special_tokens"), dict) and set(given["special_tokens"]) == {"pad_token"}:
        del given["special_tokens"]  # padding is masked, whatever its token
    for key, value in (DEFAULTS | given).items():
        if key in TABLE:
            out.apply(key, value, TABLE[key])
        elif key not in JOINT and value is not False:
            out.note(key, value, "result", "the converter does not know this key; see Axolotl's reference")
    _method(given, out)
    _batch(given, devices, out)
    _precision(given, out)
    _warmup(given, out)
    datasets(given, out)
    _evaluation(given, out)
    _objective(given, out)
    for plugin in given.get("plugins", []):
        speed = "liger" in plugin or "cut_cross" in plugin
        out.note("plugins", plugin, *(("cost", SPEED) if speed else ("result", "no such part here")))
    return out


def _method(given: dict[str, Any], out: Conversion) -> None:
    adapter = given.get("adapter")
    if adapter is None:
        out.set("method", "full")
    elif adapter not in ("lora", "qlora"):
        out.note("adapter", adapter, "result", "jlora has LoRA and its kin; lora is taken")
    four = given.get("load_in_4bit") or adapter == "qlora"
    eight = given.get("load_in_8bit") and not four
    if eight:
        out.note("load_in_8bit", True, "result", "int8 without bitsandbytes' float16 outliers")
    out.set("model.quantization", None if adapter is None else "nf4" if four else "int8" if eight else None)
    if given.get("lora_target_linear"):
        out.set("lora.target_modules", "all-linear")


def _batch(given: dict[str, Any], devices: int, out: Conversion) -> None:
    micro, parts = int(given.get("micro_batch_size", 1)), int(given.get("gradient_accumulation_steps", 1))
    if "batch_size" in given and "gradient_accumulation_steps" not in given:
        parts = max(1, int(given["batch_size"]) // micro)
    replicas = max(1, devices // out.devices_of_a_row)
    out.set("training.batch_size", micro * parts * replicas)
    out.set("training.gradient_accumulation_steps", parts)


def _precision(given: dict[str, Any], out: Conversion) -> None:
    single = given.get("bf16") is False and not given.get("fp16")
    out.set("model.dtype", "float32" if single or given.get("float32") else "bfloat16")
    if given.get("fp16"):
        out.note("fp16", given["fp16"], "result", "float16 needs a loss scale; bfloat16 is taken")


def _warmup(given: dict[str, Any], out: Conversion) -> None:
    steps = out.get("training.max_steps")
    if "warmup_steps" in given:
        return
    ratio = float(given.get("warmup_ratio", 0.03))
    if steps:
        most = steps if "warmup_ratio" in given else 100
        out.set("optimizer.warmup_steps", min(int(ratio * steps), most))
    elif ratio:
        out.set("optimizer.warmup_ratio", ratio)


def _evaluation(given: dict[str, Any], out: Conversion) -> None:
    """What goes by held-out rows; Axolotl evaluates and saves after each epoch where nothing is said."""
    if out.get("data.eval") is None:
        for key, ours in (("early_stopping_patience", "early_stopping_patience"), ("load_best_model_at_end", "export")):
            if given.get(key):
                out.note(key, given[key], "result", "goes by held-out rows, and there are none: set data.eval")
                out.set(f"training.{ours}", None)
    elif not {"eval_steps", "evals_per_epoch", "eval_strategy"} & given.keys():
        out.set("training.evals_per_epoch", 1)
    if not {"save_steps", "saves_per_epoch", "save_strategy"} & given.keys():
        out.set("training.saves_per_epoch", 1)
    if out.get("optimizer.schedule") == "constant" and "cosine_min_lr_ratio" in given:
        out.set("optimizer.min_learning_rate_ratio", 0.0)


def _objective(given: dict[str, Any], out: Conversion) -> None:
    kind = given.get("rl")
    if not kind:
        return
    known = kind in ("dpo", "ipo", "orpo")
    out.set("objective.name", kind if known else "dpo")
    if not known:
        out.note("rl", kind, "result", "jlora has dpo, ipo, hinge and orpo; dpo is taken")
