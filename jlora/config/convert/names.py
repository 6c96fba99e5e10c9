"""What other tools call the keys of a config: a hint for who writes theirs. Whole files are `convert`'s."""

from jlora.config.convert import axolotl, torchtune
from jlora.config.convert.rules import To, Without

# Of transformers, TRL, PEFT, Unsloth and LLaMA-Factory: their name -> the key, or the key with its value.
NAMES = {
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model_name_or_path", "pretrained"), "model.path"),
    **dict.fromkeys(("tokenizer_name", "tokenizer_name_or_path"), "model.tokenizer"),
    **dict.fromkeys(("torch_dtype", "bf16", "fp16", "pure_bf16"), "model.dtype"),
    **dict.fromkeys(("load_in_4bit", "quantization_bit"), "model.quantization=nf4"),
    "load_in_8bit": "model.quantization=int8",
    **dict.fromkeys(("attn_implementation", "flash_attn"), "model.attention"),
    **dict.fromkeys(("gradient_checkpointing", "use_gradient_checkpointing"), "model.remat"),
    **dict.fromkeys(("finetuning_type", "adapter", "peft_type"), "method"),
    **dict.fromkeys(("r", "lora_r", "lora_rank", "lora_dim"), "lora.rank"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    **dict.fromkeys(("lora_target", "lora_target_modules", "lora_targets"), "lora.target_modules"),
    **dict.fromkeys(("rslora", "peft_use_rslora"), "lora.use_rslora"),
    **dict.fromkeys(("dora", "peft_use_dora"), "lora.use_dora"),
    "adapter_name_or_path": "lora.init_from",
    **dict.fromkeys(("dataset", "datasets", "train_file", "dataset_name", "train_dataset", "data_path"), "data.train"),
    **dict.fromkeys(("eval_dataset", "validation_file", "val_size", "val_set_size", "test_datasets"), "data.eval"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len", "block_size"), "data.max_length"),
    **dict.fromkeys(("sample_packing", "pack_sequences"), "data.packing"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), "data.train_on=all"),
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss", "train_on_responses_only"), "data.train_on=response"
    ),
    **dict.fromkeys(("template", "prompt_template"), "data.chat_template"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "training.epochs"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "micro_batch_size", "train_batch_size"),
        "training.batch_size, of all devices and parts together",
    ),
    "gradient_accumulation": "training.gradient_accumulation_steps",
    **dict.fromkeys(("logging_steps", "log_every_n_steps"), "training.log_every"),
    "eval_steps": "training.eval_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep_checkpoints",
    "load_best_model_at_end": "training.export=best",
    "report_to": "training.wandb, mlflow or trackio",
    **dict.fromkeys(("lr", "base_lr"), "optimizer.learning_rate"),
    **dict.fromkeys(("optim", "optimizer_name"), "optimizer.name"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), "optimizer.schedule"),
    "num_warmup_steps": "optimizer.warmup_steps",
    **dict.fromkeys(("adam_beta1", "beta1"), "optimizer.b1"),
    **dict.fromkeys(("adam_beta2", "beta2"), "optimizer.b2"),
    "adam_epsilon": "optimizer.eps",
    **dict.fromkeys(("clip_grad_norm", "max_norm", "gradient_clipping"), "optimizer.max_grad_norm"),
    **dict.fromkeys(("pref_beta", "rl_beta", "dpo_beta"), "objective.beta"),
    **dict.fromkeys(("pref_loss", "loss_type", "rl"), "objective.name"),
}


def in_jlora(key: str) -> str | None:
    """What jlora has for another tool's key, as a clause; None where it is of no tool known here.

    Args:
      key: dotted, in whatever section it was written.
    """
    leaf = key.rpartition(".")[2]
    rules = [NAMES.get(leaf), axolotl.TABLE.get(leaf), torchtune.TABLE.get(key)]
    match next((rule for rule in rules if rule is not None), None):
        case To(ours=ours):
            return f"in jlora: {ours}"
        case Without(why=why):
            return f"jlora has none ({'it ' * why.startswith('is ')}{why})"
        case None:
            return None
        case ours:
            return f"in jlora: {ours}"


def tool_of(tree: object) -> str | None:
    """Whose whole file this is, that `jlora config --from` converts; None where it is nobody's."""
    if not isinstance(tree, dict):
        return None
    return next((tool.NAME for tool in (axolotl, torchtune) if tool.is_ours(tree)), None)
