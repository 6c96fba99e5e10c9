"""The two sides of scripts/benchmark: what is trained, ours through jlora, the peer through transformers and PEFT.

Each runs in a process of its own, imports only its own side, and trains the same base and adapter from disk on
the same rows. `prepare` makes all of that once, in a third process.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ROPE_THETA = 1e6  # Tunix's Llama knows no other, whatever its config says
IGNORED = -100  # transformers' label of a token that the loss leaves out
Rows = list[tuple[np.ndarray, np.ndarray]]  # ids int32 [n], trained bool [n]


# What both train.


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes base, adapter, our config, the rows and which belong to what part to `folder`.

    Raises:
      DataError, ModelError: rows or tokenizer are not usable, see `jlora.data` and `jlora.data.tokens`.
    """
    rows = _instruction_rows(args) if args.mode == "rows" else _random_rows(args)

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(args.seed)
    shape = LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        vocab_size=args.vocab,
        max_position_embeddings=max(2048, *args.lengths, args.length),
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    device, dtype = torch_target(args)
    with device:
        model = LlamaForCausalLM(shape).to(dtype)
    model.save_pretrained(folder / "base")
    # B is not zero at first, so that the first loss tells an adapter that is misread.
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    write_config(args, folder)
    np.savez(
        folder / "rows.npz",
        ids=np.concatenate([ids for ids, _ in rows]),
        trained=np.concatenate([trained for _, trained in rows]),
        ends=np.cumsum([len(ids) for ids, _ in rows]),
    )
    (folder / "parts.json").write_text(json.dumps(_parts(args, rows)), encoding="utf-8")
    return {}


def torch_target(args: argparse.Namespace) -> tuple[Any, Any]:
    """PyTorch's device and dtype for `--platform` and `--dtype`."""
    import torch

    return torch.device("cuda" if args.platform == "gpu" else "cpu"), getattr(torch, args.dtype)


def _random_rows(args: argparse.Namespace) -> Rows:
    """Rows of full length, every token trained but the first, which nothing predicts."""
    count = _warm_rows(args) + args.batch * args.steps * args.alternations
    ids = np.random.default_rng(args.seed).integers(0, args.vocab, (count, args.length), dtype=np.int32)
    trained = np.arange(args.length) > 0
    return [(row, trained) for row in ids]


def _instruction_rows(args: argparse.Namespace) -> Rows:
    """Rows of `--data` in a random order, by the tokenizer and the prompt that a run of jlora would use."""
    from jlora.config import DataSection
    from jlora.data import encoding
    from jlora.data.tokens import load_tokenizer
    from jlora.errors import ConfigError

    tokenizer = load_tokenizer(args.tokenizer, None)
    if tokenizer.vocab_size > args.vocab:
        raise ConfigError(
            f"{args.tokenizer}: the tokenizer has {tokenizer.vocab_size} tokens; set --vocab to as many or more"
        )
    examples = encoding.tokenize(args.data, tokenizer, DataSection(train=args.data, max_length=args.length)).examples
    warm = _warm_rows(args)
    # Unless told otherwise, as many as there are: the fewer rows a turn has, the emptier is our last batch.
    args.rows = args.rows or max(1, (len(examples) - warm) // args.alternations)
    needed = warm + args.rows * args.alternations
    if len(examples) < needed:
        raise ConfigError(
            f"{args.data}: {len(examples)} rows are too few for {args.alternations} alternations of {args.rows} and "
            f"{warm} to warm up; lower --rows, --alternations or --peer-batch"
        )
    order = np.random.default_rng(args.seed).permutation(len(examples))[:needed]
    return [(examples[i].ids, examples[i].trained) for i in order]


def _warm_rows(args: argparse.Namespace) -> int:
    """Rows before the first turn: `--warmup` batches of ours in mode dense, of the peer in mode rows."""
    return args.warmup * (args.peer_batch if args.mode == "rows" else args.batch)


def _parts(args: argparse.Namespace, rows: Rows) -> list[list[int]]:
    """Rows of each part: those of one batch on both sides, whose losses must agree; the warm-up; the alternations."""
    first, size = args.batch, args.batch * args.steps
    if args.mode == "rows":
        from jlora.data.packing import pack

        first, size = args.peer_batch, args.rows
        lengths = [len(ids) for ids, _ in rows]
        order = np.arange(first)
        while max(len(pack(lengths, order, args.length, True)), _in_order(lengths, first, args.length)) > args.batch:
            first, order = first - 1, order[:-1]
    starts = [0, first, *range(_warm_rows(args), len(rows) + 1, size)]
    return [list(range(start, end)) for start, end in zip(starts, starts[1:], strict=False)]


def _in_order(lengths: list[int], count: int, size: int) -> int:
    """Packed rows that the first `count` rows take if each goes behind the one before, as torchtune packs them."""
    packed = left = 0
    for length in lengths[:count]:
        if length > left:
            packed, left = packed + 1, size
        left -= length
    return packed


def write_config(args: argparse.Namespace, folder: Path) -> None:
    """The config of our run, as a user would write it for these rows."""
    import yaml

    tree = {
        "model": {"path": str(folder / "base"), "dtype": args.dtype, "remat": "lean", "attention": "auto"},
        "method": args.method,
        "data": {"train": args.data, "max_length": args.length, "packing": True},
        "training": {"batch_size": args.batch, "max_steps": 10**6},
        "mesh": {"data": args.devices, "fsdp": 1},
        "optimizer": {"learning_rate": args.learning_rate, "schedule": "constant", "max_grad_norm": None},
        "output_dir": str(folder / "run"),
    }
    if args.method == "lora":
        tree["lora"] = {"rank": args.rank, "alpha": 2 * args.rank, "init_from": str(folder / "adapter")}
    (folder / "ours.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def read_rows(folder: Path) -> Rows:
    """The rows that `prepare` wrote."""
    stored = np.load(folder / "rows.npz")
    ends = stored["ends"][:-1]
    return list(zip(np.split(stored["ids"], ends), np.split(stored["trained"], ends), strict=True))


class Ours:
    """jlora's step on its packed rows: config, loader, step and batches are those of `jlora.train`."""

    def __init__(self, cfg: Any, base: Any, base_hash: str, mesh: Any):
        """Args: cfg: Config; base: Decoder on the devices of `mesh`, base_hash: of its files."""
        import jax

        from jlora.hf.peft import load_adapter
        from jlora.model.adapter import place_adapter
        from jlora.model.adapter_init import new_adapter
        from jlora.training import optim
        from jlora.training.step import init_state, make_forward, make_train_step

        self.cfg, self.mesh, self.compiled = cfg, mesh, None
        self.kernel, self.forward = make_forward(cfg, base.cfg, mesh)
        if cfg.method == "full":
            adapter = {}
        elif cfg.lora.init_from is None:
            adapter = new_adapter(cfg.lora, base.cfg, cfg.training.seed)
        else:
            adapter = load_adapter(Path(cfg.lora.init_from), base.cfg, base_hash, cfg.lora.dropout)
        params = {"adapter": place_adapter(adapter, base.cfg, mesh), "base": base}
        trained, self.frozen = optim.split(params, cfg.method)
        self.state = init_state(trained, cfg, mesh)
        self.hyper = optim.hyperparameters(cfg.optimizer, cfg.training.max_steps)
        step = make_train_step(cfg, self.forward)
        self.step = jax.jit(step, donate_argnums=0)

    def train(self, rows: Rows) -> dict[str, Any]:
        """One pass over the rows, in their order; what is not computing (packing, batching) is in the seconds."""
        import jax

        from jlora.data import packing
        from jlora.data.dataset import Dataset
        from jlora.data.prompts import Example
        from jlora.training import folder
        from jlora.training.summary import peak_memory

        cfg, losses = self.cfg, []
        began = time.perf_counter()
        dataset = Dataset([Example(*row) for row in rows], len(rows))
        epochs = packing.Epochs(dataset, cfg.data, cfg.training.batch_size, None)
        for batch in packing.batches(epochs, cfg.training.batch_size, last=epochs.num_batches(1)):
            on_device = folder.put_batch(batch, cfg.training.gradient_accumulation_steps, self.mesh)
            if self.compiled is None:
                self.compiled = self.step.lower(self.state, self.frozen, on_device, self.hyper).compile()
            self.state, metrics = self.compiled(self.state, self.frozen, on_device, self.hyper)
            losses.append(metrics["loss"])
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - began
        figures = {"tokens": epochs.tokens_at(epochs.num_batches(1)), "losses": [float(loss) for loss in losses]}
        return figures | {"seconds": seconds, "peak_device": peak_memory(None)["device"], "attention": self.kernel}


def open_ours(folder: Path, overrides: list[str]) -> tuple[Any, Any, str, Any]:
    """Our config, and base, hash and mesh for `Ours`."""
    import jax

    from jlora.config import load_config
    from jlora.hf.load import load_base
    from jlora.hf.source import open_source
    from jlora.model.sharding import make_mesh
    from jlora.training.step import param_dtype, stack_sizes

    cfg = load_config(folder / "ours.yaml", overrides)
    mesh = make_mesh(cfg.mesh, jax.devices())
    source = open_source(folder / "base")
    sizes = stack_sizes(cfg, source.model)
    base, base_hash = load_base(source, "base", param_dtype(cfg), mesh, sizes=sizes)
    return cfg, base, base_hash, mesh


class Peer:
    """transformers and PEFT: a plain loop, with each batch padded to its longest row."""

    def __init__(self, args: argparse.Namespace, folder: Path, mode: str):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.set_num_threads(args.threads)
        self.device, self.dtype = torch_target(args)
        full = args.method == "full"
        dtype = torch.float32 if full else self.dtype  # masters of what is trained
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype).to(self.device)
        if not full:
            model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
        model.config.use_cache = False
        if mode == "checkpointing":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if not full:
                model.enable_input_require_grads()
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Fused, as transformers' Trainer has it.
        self.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, fused=True)
        # Rows of unequal length: one program for all shapes, since one for each would be compiled for ever.
        dynamic = True if args.mode == "rows" else None
        self.model = torch.compile(model, dynamic=dynamic) if mode == "compile" else model
        self.batch_size = args.peer_batch if args.mode == "rows" else args.batch
        self.grouped = args.peer_group_by_length

    def train(self, rows: Rows) -> dict[str, Any]:
        """One pass over the rows, in their order or the longest first; in bfloat16 as transformers' Trainer does it."""
        import torch

        losses = []
        began = time.perf_counter()
        if self.grouped:
            rows = sorted(rows, key=lambda row: -len(row[0]))
        for start in range(0, len(rows), self.batch_size):
            batch = collate(rows[start : start + self.batch_size])
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()}).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        peak = None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        seconds = time.perf_counter() - began
        figures = {"tokens": sum(len(ids) for ids, _ in rows), "losses": [loss.item() for loss in losses]}
        return figures | {"seconds": seconds, "peak_device": peak}


def collate(rows: Rows) -> dict[str, Any]:
    """As `DataCollatorForSeq2Seq` pads to the longest; without a mask where nothing is padded, which is faster."""
    import torch

    shape = len(rows), max(len(ids) for ids, _ in rows)
    tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    attended = np.zeros(shape, np.int64)
    for i, (ids, trained) in enumerate(rows):
        tokens[i, : len(ids)], attended[i, : len(ids)] = ids, 1
        labels[i, : len(ids)] = np.where(trained, ids, IGNORED)
    batch = {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
    return batch if attended.all() else batch | {"attention_mask": torch.from_numpy(attended)}


def open_side(args: argparse.Namespace, folder: Path) -> Any:
    """A function from a part's number to what training its rows took."""
    rows, parts = read_rows(folder), json.loads((folder / "parts.json").read_text())
    if args.worker == "ours":
        import jax

        cfg, base, base_hash, mesh = open_ours(folder, args.overrides)
        jax.set_mesh(mesh)
        side: Any = Ours(cfg, base, base_hash, mesh)
    else:
        side = Peer(args, folder, args.worker)
    return lambda number: side.train([rows[i] for i in parts[number]])
