"""The peers of scripts/benchmark that have an interpreter of their own: Tunix, and torchtune.

Both read the base's safetensors and PEFT's adapter, and train with what their package has for it.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_sides import IGNORED, ROPE_THETA, Rows, read_rows

ADAPTER_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.lora_([AB])\.weight")


def read_adapter(folder: Path) -> dict[tuple[int, str, str], np.ndarray]:
    """PEFT's adapter: by layer, projection ("q") and side ("A" or "B"); A [R in], B [out R] float32.

    Raises:
      ValueError: a tensor of another name.
    """
    from safetensors.numpy import load_file

    tensors = {}
    for name, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        key = ADAPTER_KEY.fullmatch(name)
        if key is None:
            raise ValueError(f"{name} is not a tensor of the adapter that the benchmark makes")
        tensors[int(key[1]), key[2], key[3]] = tensor
    return tensors


def norm_eps(folder: Path) -> float:
    """What the base adds to its mean squares."""
    return json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))["rms_norm_eps"]


class Tunix:
    """Tunix's Llama with qwix's LoRA in its PeftTrainer; rows are padded to `--length`, as its data loaders do it."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        import jax
        import jax.numpy as jnp
        import optax
        import qwix
        from flax import nnx
        from tunix.models.llama3 import model as llama
        from tunix.models.llama3 import params
        from tunix.sft import peft_trainer, utils

        self.batch_size = args.peer_batch if args.mode == "rows" else args.batch
        self.length = args.length
        cfg = llama.ModelConfig(
            num_layers=args.layers,
            vocab_size=args.vocab,
            embed_dim=args.dim,
            hidden_dim=args.ffn,
            num_heads=args.heads,
            head_dim=args.dim // args.heads,
            num_kv_heads=args.heads,
            rope_theta=int(ROPE_THETA),
            norm_eps=norm_eps(folder),
        )
        self.mesh = jax.make_mesh((args.devices, 1), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)
        with self.mesh:
            model = params.create_model_from_safe_tensors(str(folder / "base"), cfg, self.mesh, jnp.float32)
            if args.method == "lora":
                lora = qwix.LoraProvider(module_path=".*(q|k|v|o)_proj", rank=args.rank, alpha=2.0 * args.rank)
                model = qwix.apply_lora_to_model(model, lora, **model.get_model_input(), rngs=nnx.Rngs(args.seed))
                for (layer, name, side), tensor in read_adapter(folder).items():
                    weights = getattr(getattr(model.layers[layer].attn, f"{name}_proj"), f"w_lora_{side.lower()}")
                    fresh = weights.get_value()
                    weights.set_value(jax.device_put(tensor.T.reshape(fresh.shape), fresh.sharding))
        losses = self.losses = []

        class Trainer(peft_trainer.PeftTrainer):
            """Keeps the losses."""

            def _post_process_train_step(self, aux: Any) -> None:
                losses.append(aux)

        def loss_twice(
            model: Any, input_tokens: Any, input_mask: Any, positions: Any, attention_mask: Any
        ) -> tuple[Any, Any]:
            loss = peft_trainer._default_loss_fn(model, input_tokens, input_mask, positions, attention_mask)
            return loss, loss

        def inputs(batch: dict[str, Any]) -> dict[str, Any]:
            attended = batch["attended"]
            return {
                "input_tokens": batch["tokens"],
                "input_mask": batch["trained"],
                "positions": utils.build_positions_from_mask(attended),
                "attention_mask": utils.make_causal_attn_mask(attended),
            }

        optimizer = optax.adamw(args.learning_rate, weight_decay=0.0)
        trainer = Trainer(model, optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=10**9))
        trainer.is_managed_externally = True  # it would close itself after the first turn
        self.trainer = trainer.with_loss_fn(loss_twice, has_aux=True).with_gen_model_input_fn(inputs)

    def train(self, rows: Rows) -> dict[str, Any]:
        """One pass over the rows, in their order."""
        self.losses.clear()
        began = time.perf_counter()
        with self.mesh:
            self.trainer.train(self._batches(rows))  # waits for its last step
        losses = [float(loss) for loss in self.losses]
        return {"tokens": sum(len(ids) for ids, _ in rows), "losses": losses, "seconds": time.perf_counter() - began}

    def _batches(self, rows: Rows) -> Any:
        for start in range(0, len(rows), self.batch_size):
            # The last batch too has all its rows: another shape would be another program.
            tokens = np.zeros((self.batch_size, self.length), np.int32)
            trained, attended = np.zeros(tokens.shape, np.bool_), np.zeros(tokens.shape, np.bool_)
            for i, (ids, mask) in enumerate(rows[start : start + self.batch_size]):
                tokens[i, : len(ids)], trained[i, : len(ids)], attended[i, : len(ids)] = ids, mask, True
            yield {"tokens": tokens, "trained": trained, "attended": attended}


class Torchtune:
    """torchtune's Llama, loss and packing in the loop of its recipe for one device, eager or compiled as that does it.

    Its builder for Llama 3, which is that for Llama 2 with a rotary base that can be set.
    """

    def __init__(self, args: argparse.Namespace, folder: Path, compiled: bool):
        import torch
        from safetensors.torch import load_file
        from torchtune import training
        from torchtune.models.convert_weights import hf_to_tune
        from torchtune.models.llama3 import llama3, lora_llama3
        from torchtune.modules.loss import CEWithChunkedOutputLoss
        from torchtune.modules.peft import get_adapter_params, set_trainable_params

        torch.set_num_threads(args.threads)
        self.packed, self.length, self.batch_size = args.mode == "rows", args.length, args.batch
        shape = {
            "vocab_size": args.vocab,
            "num_layers": args.layers,
            "num_heads": args.heads,
            "num_kv_heads": args.heads,
            "embed_dim": args.dim,
            "max_seq_len": args.length,
            "intermediate_dim": args.ffn,
            "norm_eps": norm_eps(folder),
            "rope_base": int(ROPE_THETA),
        }
        weights = hf_to_tune(load_file(folder / "base" / "model.safetensors"), args.heads, args.heads, args.dim)
        if args.method == "full":
            model = llama3(**shape)
        else:
            targets = ["q_proj", "k_proj", "v_proj", "output_proj"]
            model = lora_llama3(targets, **shape, lora_rank=args.rank, lora_alpha=2.0 * args.rank)
            set_trainable_params(model, get_adapter_params(model))
            weights |= {name: torch.from_numpy(tensor) for name, tensor in _tuned(read_adapter(folder), args.heads)}
        model.load_state_dict(weights)
        self.loss = CEWithChunkedOutputLoss(ignore_index=IGNORED)
        model.set_num_output_chunks(self.loss.num_output_chunks)
        if compiled:
            training.compile_model(model, verbose=False)
            self.loss = training.compile_loss(self.loss, verbose=False)
        self.model = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0, fused=True)

    def train(self, rows: Rows) -> dict[str, Any]:
        """One pass over the rows, in their order."""
        import torch
        from torch.utils.data import DataLoader
        from torchtune.data import padded_collate_packed, padded_collate_sft
        from torchtune.datasets import PackedDataset

        losses = []
        began = time.perf_counter()
        samples: Any = [
            {"tokens": ids.tolist(), "labels": np.where(trained, ids, IGNORED).tolist()} for ids, trained in rows
        ]
        if self.packed:
            samples = PackedDataset(samples, max_seq_len=self.length)
        collate = padded_collate_packed if self.packed else padded_collate_sft
        for batch in DataLoader(samples, self.batch_size, collate_fn=collate):
            labels = batch.pop("labels")
            unknown = torch.full((len(labels), 1), IGNORED)
            loss = self.loss(self.model(**batch), torch.hstack((labels[:, 1:], unknown)))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        seconds = time.perf_counter() - began
        tokens = sum(len(ids) for ids, _ in rows)
        return {"tokens": tokens, "losses": [loss.item() for loss in losses], "seconds": seconds}


def _tuned(adapter: dict[tuple[int, str, str], np.ndarray], heads: int) -> list[tuple[str, np.ndarray]]:
    """PEFT's adapter by torchtune's names; rows of a head stand in pairs, as its rotary embedding has them."""
    tensors = []
    for (layer, name, side), tensor in adapter.items():
        if side == "B" and name in "qk":
            halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        projection = "output_proj" if name == "o" else f"{name}_proj"
        tensors.append((f"layers.{layer}.attn.{projection}.lora_{side.lower()}.weight", tensor))
    return tensors


def open_side(args: argparse.Namespace, folder: Path) -> Callable[[int], dict[str, Any]]:
    """A function from a part's number to what training its rows took."""
    rows, parts = read_rows(folder), json.loads((folder / "parts.json").read_text(encoding="utf-8"))
    side = Tunix(args, folder) if args.worker == "tunix" else Torchtune(args, folder, args.worker != "torchtune")
    return lambda number: side.train([rows[i] for i in parts[number]]) | {"peak_device": None}
