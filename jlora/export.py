"""`python -m jlora.export`: a run's checkpoint as a PEFT adapter folder or a full Hugging Face checkpoint.

Every export proves itself before it is called done: what was written is read back and its logits
compared with the run's own.
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora import cli
from jlora.config import Config
from jlora.errors import ConfigError, ModelError
from jlora.files.atomic import new_folder
from jlora.hf import verify
from jlora.hf.pretrained import load_pretrained, open_adapter, open_pretrained, run_config
from jlora.model.adapter import Adapter, layer_scales, with_scales, without_scales
from jlora.model.adapter_init import new_adapter
from jlora.model.adapter_merge import COMBINATIONS, combine_adapters
from jlora.model.llama import Decoder, LlamaConfig, abstract_decoder, place_adapter
from jlora.model.sharding import named_sharding, one_device_mesh
from jlora.runtime import streams
from jlora.training.checkpoint import Checkpoints
from jlora.training.merge import TOLERANCE
from jlora.training.merge import merge as merge_run

# The proof is in float32, where rounding can not hide a mistake.
PROOF_DTYPE = jnp.dtype("float32")


def restore(
    cfg: Config, run_dir: Path, step: int | None, model: LlamaConfig, base_hash: str, mesh: jax.sharding.Mesh
) -> tuple[int, Adapter, Decoder | None]:
    """Step, adapter and, of a full fine-tuning, weights of a checkpoint (the newest without `step`), on `mesh`.

    Raises:
      ModelError: no such checkpoint, or one of another base or run.
    """
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
    if saved != base_hash:
        raise ModelError(
            f"{run_dir}: was trained on another base (tensors {saved[:12]}..., {cfg.model.path} has "
            f"{base_hash[:12]}...)"
        )
    if cfg.method == "lora":
        fresh = jax.eval_shape(lambda: without_scales(new_adapter(cfg.lora, model, cfg.training.seed))[0])
        adapter = checkpoints.restore_trained(step, {"adapter": place_adapter(fresh, model, mesh)})["adapter"]
        layers = model.num_hidden_layers
        scales = {name: jnp.asarray(layer_scales(cfg.lora, name, layers)) for name in cfg.lora.targets}
        restored = with_scales(adapter, scales), None
    else:
        whole = named_sharding(mesh, ())
        decoder = abstract_decoder(model, jnp.dtype("float32"))
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), decoder)
        restored = {}, checkpoints.restore_trained(step, {"base": like})["base"]
    checkpoints.close()
    return step, *restored


def export(
    run_dir: Path, out: Path, step: int | None, merge: bool, dtype: str | None, peft: bool, cost: bool = False
) -> dict[str, Any]:
    """Export a run; returns what was written and the figures of its proof.

    Raises:
      ModelError: no such checkpoint, another base, or an export that does not compute what the run does.
      MemoryExceeded, ConfigError: see `jlora.training.merge.require_room`.
    """
    cfg = run_config(run_dir)
    if cfg is None:
        raise ModelError(f"{run_dir}: not a run folder (it has no config.yaml)")
    require_new_folder(out)
    full = merge or cfg.method == "full"
    if peft and full:
        raise ConfigError("--verify loads an adapter in PEFT; leave --merge out")
    if cost and (not merge or cfg.method == "full"):
        raise ConfigError("--cost is that of merging an adapter, by --merge; leave it out")
    opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
    model = opened.model
    with new_folder(out) as folder:
        if full:
            chosen = dtype or cfg.model.dtype
            merged = merge_run(cfg, opened, folder, chosen, partial(restore, cfg, run_dir, step, model), cost)
            return merged | {"out": str(out)}
        mesh = one_device_mesh()
        with jax.set_mesh(mesh):
            # PEFT has the base as it is stored.
            kind = None if peft else cfg.model.quantization
            pretrained = load_pretrained(opened, jnp.dtype(cfg.model.dtype), mesh, kind)
            step, adapter, _ = restore(cfg, run_dir, step, model, pretrained.base_hash, mesh)
            where = (cfg.lora, cfg.model.path, pretrained, PROOF_DTYPE, mesh)
            result: dict[str, Any] = {"step": step, "out": str(out), "kind": "adapter"}
            result["logits_relative_difference"] = verify.write_adapter(folder, adapter, *where)
            if peft:
                found = verify.compare_with_peft(folder, adapter, pretrained)
                result["peft_relative_difference"], result["base_read_by"] = found
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
      ConfigError, ModelError: see `jlora.model.adapter_merge`; or no base, or a weight that is no number.
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


def use_host(run_dir: Path, merge: bool, cost: bool) -> None:
    """Tell JAX, before it starts, that the CPU writes whole models, so that no accelerator's memory is taken."""
    cfg, named = run_config(run_dir), os.environ.get("JAX_PLATFORMS", "")
    if cost and named:  # which may leave the CPU out
        jax.config.update("jax_platforms", f"{named},cpu")
    elif not cost and (merge or (cfg is not None and cfg.method == "full")):
        jax.config.update("jax_platforms", "cpu")


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
    parser.add_argument("--cost", action="store_true", help="also measure the loss before and after --merge (see docs)")
    parser.add_argument("--verify", action="store_true", help="also load the adapter in PEFT and compare logits")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()

    def body() -> None:
        if args.adapters:
            if args.merge or args.cost or args.verify or args.step is not None or args.dtype:
                raise ConfigError(
                    "--adapters makes an adapter; leave --merge, --cost, --verify, --step and --dtype out"
                )
            result = export_combined(args.adapters, args.combination, args.rank, args.base, Path(args.out))
            with streams.told(result=args.json):
                if args.json:
                    cli.print_json(result)
                elif not args.quiet:
                    print(f"{result['out']}: {len(args.adapters)} adapters as one of rank {result['rank']}, read back")
            return
        use_host(Path(args.run), args.merge, args.cost)
        result = export(Path(args.run), Path(args.out), args.step, args.merge, args.dtype, args.verify, args.cost)
        with streams.told(result=args.json):
            if args.json:
                cli.print_json(result)
            elif not args.quiet:
                print_result(result)

    cli.run(body)


def print_result(result: dict[str, Any]) -> None:
    """The figures of an export's proof, for people."""
    print(f"{result['out']}: {result['kind']} of step {result['step']}, read back and compared:")
    print(f"  logits differ by {result['logits_relative_difference']:.1e} of their size")
    if "merged_into" in result:
        print(f"  merged into the {result['merged_into']} weights that the adapter was trained on")
    if "cross_entropy_merged" in result:
        before, after = result["cross_entropy_before_merging"], result["cross_entropy_merged"]
        cost = "not measured, as the run's rows are gone"
        if before is not None:
            cost = f"{after - before:+.1e} (from {before:.4f} to {after:.4f})"
        print(f"  its cost in cross-entropy: {cost}")
    if "peft_relative_difference" in result:
        print(f"  in PEFT they differ by {result['peft_relative_difference']:.1e}")
        if result["base_read_by"] == "jlora":
            print("  (on the base as jlora reads it: transformers cannot read this GGUF file)")


if __name__ == "__main__":
    main()
