"""`python -m jlora.export`: a run's checkpoint as a PEFT adapter folder or a full Hugging Face checkpoint.

Every export proves itself before it is called done: what was written is read back and its logits
compared with the run's own.
"""

import math
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
from jlora.adapter import Adapter
from jlora.atomic import new_folder
from jlora.checkpoint import Checkpoints
from jlora.combine import COMBINATIONS, combine_adapters
from jlora.config import Config
from jlora.data import read_data
from jlora.errors import ConfigError, DataError, ModelError
from jlora.evaluate import Evaluator
from jlora.folders import inside
from jlora.generate import one_device_mesh
from jlora.gguf import GGUFFile
from jlora.hf.base import open_source
from jlora.hf.load import load_base
from jlora.hf.merged import add_adapter, merged_tensor, save_checkpoint, trained_tensor, untied
from jlora.initial import new_adapter
from jlora.model import Decoder
from jlora.pretrained import Pretrained, load_pretrained, open_adapter, open_pretrained, run_config
from jlora.step import Forward, init_state, place_adapter

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
    if step is None:
        step = checkpoints.newest_whole()
    elif (found := checkpoints.fault(step)) is not None:
        raise ModelError(f"{run_dir}/checkpoints/{step}: the checkpoint is damaged ({found}); export another step")
    saved = checkpoints.identity(step)["hashes"]["base"]
    if saved != pretrained.base_hash:
        raise ModelError(
            f"{run_dir}: was trained on another base (tensors {saved[:12]}..., {cfg.model.path} has "
            f"{pretrained.base_hash[:12]}...)"
        )
    model = pretrained.base.cfg
    adapter: Adapter = {}
    if cfg.method == "lora":
        adapter = place_adapter(new_adapter(cfg.lora, model, cfg.training.seed), model, mesh)
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
    """Write a full checkpoint in `folder`, read it back, compare logits; returns their difference, among others.

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

    shape, config = untied(base.cfg, source.config, adapter)
    save_checkpoint(folder, shape, tensor, config, dtype, partial(add_tokenizer, pretrained))
    expected = verify.probe_logits(base, adapter, PROOF_DTYPE)
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
    files = list(pretrained.tokenizer.files)
    if pretrained.path.is_dir():
        files.append(inside(pretrained.path, "generation_config.json"))
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
    require_new_folder(out)
    full = merge or cfg.method == "full"
    if peft and full:
        raise ConfigError("--verify loads an adapter in PEFT; leave --merge out")
    mesh = one_device_mesh()
    with new_folder(out) as folder, jax.set_mesh(mesh):
        stored = jnp.dtype("float32" if full else cfg.model.dtype)
        opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
        # PEFT has the base as it is stored.
        pretrained = load_pretrained(opened, stored, mesh, None if peft else cfg.model.quantization)
        step, adapter, base = restore(cfg, run_dir, step, pretrained, mesh)
        result = {"step": step, "out": str(out), "kind": "full" if full else "adapter"}
        if full:
            chosen = dtype or cfg.model.dtype
            return result | export_full(folder, chosen, pretrained, base, adapter, cfg)
        difference = verify.write_adapter(folder, adapter, cfg.lora, cfg.model.path, pretrained, PROOF_DTYPE, mesh)
        result["logits_relative_difference"] = difference
        if peft:
            result["peft_relative_difference"] = verify.compare_with_peft(folder, adapter, pretrained)
    return result


def require_new_folder(out: Path) -> None:
    """Something can be written to `--out`, and nothing lies there.

    Raises: ConfigError: or it is where a disk is mounted, whose folder can get nothing else's name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not an empty folder; name a new one")
    if os.path.ismount(out):
        raise ConfigError(f"--out {out}: is where a disk is mounted; name a new folder in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {out.parent} can not be made ({error.strerror}); name another") from None
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: {out.parent} can not be written to; name another")


def export_combined(
    weighted: list[str], how: str, rank: int | None, base: str | None, out: Path, dtype: jnp.dtype = PROOF_DTYPE
) -> dict[str, Any]:
    """Several adapters of one base as one PEFT folder.

    Args:
      weighted: FOLDER=WEIGHT of each adapter.

    Raises:
      ConfigError, ModelError: see `jlora.combine`; or no base, or a weight that is no number.
    """
    if base is None:
        raise ConfigError("--adapters needs --base, the base that they were trained on")
    if rank is not None and (how != "svd" or rank < 1):
        raise ConfigError(f"--rank {rank} is the rank of --combination svd, a positive number; leave it out")
    require_new_folder(out)
    folders, weights = [], []
    for one in weighted:
        folder, _, weight = one.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            raise ConfigError(f"--adapters {one}: must be FOLDER=WEIGHT, such as runs/a=0.7") from None
        if not folder or folder in folders or not math.isfinite(weights[-1]):
            raise ConfigError(f"--adapters {one}: each folder is named once, with a finite weight")
        folders.append(folder)
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        pretrained = load_pretrained(open_pretrained(base, None, None), dtype, mesh)
        adapters = {folder: open_adapter(folder, pretrained) for folder in folders}
        adapter, section = combine_adapters(adapters, weights, how, rank)
        placed = place_adapter(adapter, pretrained.base.cfg, mesh)
        with new_folder(out) as made:
            difference = verify.write_adapter(made, placed, section, base, pretrained, dtype, mesh)
    result = {"out": str(out), "kind": "adapter", "combination": how, "rank": section.rank}
    return result | {"logits_relative_difference": difference}


def main() -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m jlora.export", description="Export a run.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder")
    source.add_argument("--adapters", nargs="+", metavar="FOLDER=WEIGHT", help="adapters of one base, to be made one")
    parser.add_argument("--base", help="the base of --adapters")
    parser.add_argument(
        "--combination", choices=COMBINATIONS, default="cat", help="of --adapters (default %(default)s)"
    )
    parser.add_argument("--rank", type=int, help="of --combination svd; default: the adapters' largest")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest")
    parser.add_argument("--out", required=True, help="new folder to write")
    parser.add_argument("--merge", action="store_true", help="a full checkpoint with the adapter merged in")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="of merged weights; default: the run's")
    parser.add_argument("--verify", action="store_true", help="also load the adapter in PEFT and compare logits")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()

    def body() -> None:
        if args.adapters:
            if args.merge or args.verify or args.step is not None or args.dtype:
                raise ConfigError("--adapters makes an adapter; leave --merge, --verify, --step and --dtype out")
            result = export_combined(args.adapters, args.combination, args.rank, args.base, Path(args.out))
            if args.json:
                cli.print_json(result)
            elif not args.quiet:
                print(f"{result['out']}: {len(args.adapters)} adapters as one of rank {result['rank']}, read back")
            return
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
