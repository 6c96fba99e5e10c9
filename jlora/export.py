"""`python -m jlora.export`: a run's checkpoint as a PEFT adapter folder or a full Hugging Face checkpoint.

Every export proves itself before it is called done: what was written is read back and its logits
compared with the run's own.
"""

import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora import attention, cli, optim, verify
from jlora.adapter import Adapter, init_adapter
from jlora.checkpoint import Checkpoints
from jlora.config import Config
from jlora.errors import ConfigError, DataError, ModelError
from jlora.evaluate import Evaluator
from jlora.generate import one_device_mesh
from jlora.gguf import GGUFFile
from jlora.hf.base import open_source
from jlora.hf.load import load_base
from jlora.hf.merged import add_adapter, merged_tensor, save_checkpoint, trained_tensor
from jlora.model import Decoder, projection_shapes
from jlora.pretrained import Pretrained, load_pretrained, open_pretrained, run_config
from jlora.step import Forward, init_state, place_adapter
from jlora.train import read_data

# The proof is in float32, where rounding can not hide a mistake.
PROOF_DTYPE = jnp.dtype("float32")

# Rows on which the cost of merging into a quantised base is measured.
COST_ROWS = 64

# Difference of logits that rounding to a dtype may make (see `verify.require_equal`).
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def restore(
    cfg: Config, run_dir: Path, step: int | None, pretrained: Pretrained, mesh: jax.sharding.Mesh
) -> tuple[int, Adapter, Decoder]:
    """Step, adapter and base of a checkpoint (the newest without `step`); one of the two is the run's own."""
    checkpoints = Checkpoints(run_dir / "checkpoints", cfg.training.keep_checkpoints, read_only=True)
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise ModelError(f"{run_dir}: holds no {wanted}; it has {', '.join(map(str, steps)) or 'none'}")
    step = steps[-1] if step is None else step
    saved = checkpoints.identity(step)["hashes"]["base"]
    if saved != pretrained.base_hash:
        raise ModelError(
            f"{run_dir}: was trained on another base (tensors {saved[:12]}..., {cfg.model.path} has "
            f"{pretrained.base_hash[:12]}...)"
        )
    model = pretrained.base.cfg
    adapter: Adapter = {}
    if cfg.method == "lora":
        adapter = init_adapter(cfg.lora, projection_shapes(model), model.num_hidden_layers, cfg.training.seed)
        adapter = place_adapter(adapter, model, mesh)
    params = {"adapter": adapter, "base": pretrained.base}
    labels = optim.labels(params, cfg.method)
    state = init_state(params, optim.make_optimizer(cfg.optimizer, 1, labels), cfg, mesh)
    trained = checkpoints.restore(step, state).state.trained
    checkpoints.close()
    _, frozen = optim.partition(params, labels)
    combined = optim.combine(trained, frozen)
    return step, combined["adapter"], combined["base"]


def export_full(
    folder: Path, dtype: str, pretrained: Pretrained, base: Decoder, adapter: Adapter, cfg: Config
) -> dict[str, Any]:
    """Write a full checkpoint, read it back, compare logits; returns their relative difference, among others.

    Merging into a quantised base takes the weights that the adapter was trained on, dequantised: the result computes
    what the run did, while merging into the stored ones would put the adapter on weights it has never seen.
    """
    source = pretrained.source

    def tensor(name: str, entry: Any) -> Any:
        if cfg.method == "full":
            return trained_tensor(base, entry)
        if cfg.model.quantization is not None:
            return add_adapter(trained_tensor(base, entry), entry, adapter)
        return merged_tensor(source, entry, name, adapter)

    save_checkpoint(folder, base.cfg, tensor, source.config, dtype, partial(add_tokenizer, pretrained))
    expected = verify.probe_logits(base, adapter, PROOF_DTYPE)
    with verify.removed_if_wrong(folder):
        written, _ = load_base(open_source(folder), str(folder), PROOF_DTYPE, one_device_mesh())
        found = verify.probe_logits(written, {}, PROOF_DTYPE)
        result: dict[str, Any] = {"dtype": dtype}
        result["logits_relative_difference"] = verify.require_equal(folder, expected, found, TOLERANCE[dtype])
    if cfg.model.quantization is not None:
        result |= {"merged_into": f"dequantised {cfg.model.quantization}"}
        result |= merge_cost(cfg, pretrained, base, adapter, written)
    return result


def merge_cost(
    cfg: Config, pretrained: Pretrained, base: Decoder, adapter: Adapter, merged: Decoder
) -> dict[str, float | None]:
    """Mean loss before and after merging, on the run's first held-out rows, or training rows where it has none.

    Null where the rows are no longer there.
    """
    try:
        train_data, eval_data = read_data(cfg, pretrained.tokenizer)
    except DataError:
        return {"loss_before_merging": None, "loss_merged": None}
    rows = eval_data or train_data
    rows = replace(rows, examples=rows.examples[:COST_ROWS])
    mesh = one_device_mesh()
    evaluator = Evaluator(rows, cfg.data, 1, Forward(attention.reference, "none", PROOF_DTYPE), mesh)
    return {
        "loss_before_merging": evaluator.mean_loss(base, adapter)[0],
        "loss_merged": evaluator.mean_loss(merged, {})[0],
    }


def add_tokenizer(pretrained: Pretrained, folder: Path) -> None:
    """The tokenizer's own files, and the generation config, beside the weights."""
    if isinstance(pretrained.source, GGUFFile) and not pretrained.tokenizer.files:
        pretrained.source.tokenizer().save_pretrained(folder)
    files = [*pretrained.tokenizer.files, pretrained.path / "generation_config.json"]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def export(run_dir: Path, out: Path, step: int | None, merge: bool, dtype: str | None, peft: bool) -> dict[str, Any]:
    """Export a run; returns what was written and the figures of its proof.

    Raises:
      ModelError: no such checkpoint, another base, or an export that does not compute what the run does.
    """
    cfg = run_config(run_dir)
    if cfg is None:
        raise ModelError(f"{run_dir}: not a run folder (it has no config.yaml)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not an empty folder; name a new one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {out.parent} can not be made ({error.strerror}); name another") from None
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: {out.parent} can not be written to; name another")
    full = merge or cfg.method == "full"
    if peft and full:
        raise ConfigError("--verify loads an adapter in PEFT; leave --merge out")
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        stored = jnp.dtype("float32" if full else cfg.model.dtype)
        opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
        # PEFT has the base as it is stored.
        pretrained = load_pretrained(opened, stored, mesh, None if peft else cfg.model.quantization)
        step, adapter, base = restore(cfg, run_dir, step, pretrained, mesh)
        result = {"step": step, "out": str(out), "kind": "full" if full else "adapter"}
        if full:
            chosen = dtype or cfg.model.dtype
            return result | export_full(out, chosen, pretrained, base, adapter, cfg)
        difference = verify.export_adapter(out, adapter, cfg.lora, cfg.model.path, pretrained, PROOF_DTYPE, mesh)
        result["logits_relative_difference"] = difference
        if peft:
            result["peft_relative_difference"] = verify.compare_with_peft(out, adapter, pretrained)
    return result


def main() -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m jlora.export", description="Export a run.")
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    parser.add_argument("--out", required=True, help="new folder to write")
    parser.add_argument("--merge", action="store_true", help="a full checkpoint with the adapter merged in")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="of merged weights; default: the run's")
    parser.add_argument("--verify", action="store_true", help="also load the adapter in PEFT and compare logits")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()

    def body() -> None:
        result = export(Path(args.run), Path(args.out), args.step, args.merge, args.dtype, args.verify)
        if args.json:
            cli.print_json(result)
        elif not args.quiet:
            print(f"{result['out']}: {result['kind']} of step {result['step']}, read back and compared:")
            print(f"  logits differ by {result['logits_relative_difference']:.1e} of their size")
            if "merged_into" in result:
                print(f"  merged into the {result['merged_into']} weights that the adapter was trained on")
                before, after = result["loss_before_merging"], result["loss_merged"]
                cost = "not measured, as the run's rows are gone"
                if before is not None:
                    cost = f"{after - before:+.1e} (from {before:.4f} to {after:.4f})"
                print(f"  its cost in loss: {cost}")
            if "peft_relative_difference" in result:
                print(f"  in PEFT they differ by {result['peft_relative_difference']:.1e}")
            sys.stdout.flush()

    cli.run(body)


if __name__ == "__main__":
    main()
