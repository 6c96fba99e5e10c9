"""A run's checkpoint as an adapter folder or a full checkpoint, and several adapters as one."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora.config import Config
from jlora.errors import ConfigError, ModelError
from jlora.files.atomic import new_folder
from jlora.hf import verify
from jlora.hf.pretrained import base_of, load_pretrained, open_adapter, open_pretrained, run_config
from jlora.model.adapter import Adapter, layer_scales, place_adapter, targets, with_scales, without_scales
from jlora.model.adapter_init import new_adapter
from jlora.model.adapter_merge import combine_adapters
from jlora.model.config import ModelConfig
from jlora.model.llama import Decoder, abstract_decoder
from jlora.model.sharding import named_sharding, one_device_mesh
from jlora.training.checkpoint import Checkpoints
from jlora.training.merge import merge as merge_run

# The proof is in float32, where rounding cannot hide a mistake.
PROOF_DTYPE = jnp.dtype("float32")

# A checkpoint: a step, the one with the lowest held-out loss, or the newest.
Step = int | Literal["best"] | None


def restore(
    cfg: Config, run_dir: Path, step: Step, model: ModelConfig, base_hash: str, mesh: jax.sharding.Mesh
) -> tuple[int, Adapter, Decoder | None]:
    """Step, adapter and, of a full fine-tuning, weights of a checkpoint (the newest without `step`), on `mesh`.

    Raises:
      ModelError: no such checkpoint, or one of another base or run.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints", cfg.training.keep_checkpoints, read_only=True)
    steps = checkpoints.steps()
    if step == "best" and (step := checkpoints.best()) is None:
        raise ModelError(
            f"{run_dir}: no checkpoint has a held-out loss (data.eval, training.eval_every); leave --step best out"
        )
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
        scales = {name: jnp.asarray(layer_scales(cfg.lora, name, model)) for name in targets(cfg.lora, model)}
        restored = with_scales(adapter, scales), None
    else:
        whole = named_sharding(mesh, ())
        decoder = abstract_decoder(model, jnp.dtype("float32"))
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), decoder)
        restored = {}, checkpoints.restore_trained(step, {"base": like})["base"]
    checkpoints.close()
    return step, *restored


def export(
    run_dir: Path,
    out: Path,
    step: Step,
    merge: bool,
    dtype: str | None,
    peft: bool,
    cost: bool = False,
    base: str | None = None,
) -> dict[str, Any]:
    """Export a run; returns what was written and the figures of its proof.

    Args:
      base: where the base lies now, if not where the run had it; its tensors' hash is that of the run's.

    Raises:
      ModelError: no such checkpoint, another base, or an export that does not compute what the run does.
      MemoryExceeded, ConfigError: see `jlora.training.merge.require_room`.
    """
    cfg = run_config(run_dir)
    if cfg is None:
        raise ModelError(f"{run_dir}: not a run folder (it has no config.yaml)")
    if base is not None:
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": base})})
    require_new_folder(out)
    full = merge or cfg.method == "full"
    if peft and full:
        raise ConfigError("--verify loads an adapter in PEFT; leave --merge out")
    if dtype and not full:
        raise ConfigError("--dtype is that of a whole checkpoint (--merge); an adapter is written in float32")
    if cost and (not merge or cfg.method == "full"):
        raise ConfigError("--cost is that of merging an adapter, by --merge; leave it out")
    try:
        opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
    except ModelError as error:
        if base is not None or Path(cfg.model.path).exists():
            raise
        raise ModelError(f"{error}; if the base has moved, say where it lies with --base") from None
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
            where = (cfg.lora, pretrained, PROOF_DTYPE, mesh)
            result: dict[str, Any] = {"step": step, "out": str(out), "kind": "adapter"}
            result["logits_relative_difference"] = verify.write_adapter(folder, adapter, *where)
            if peft:
                found = verify.compare_with_peft(folder, adapter, pretrained)
                result["peft_relative_difference"], result["base_read_by"] = found
    return result


def require_new_folder(out: Path) -> None:
    """Something can be written to `--out`, and nothing lies there.

    Raises:
      ConfigError: or it is where a disk is mounted, whose folder can get nothing else's name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not an empty folder; name a new one")
    if os.path.ismount(out):
        raise ConfigError(f"--out {out}: is where a disk is mounted; name a new folder in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {out.parent} cannot be made ({error.strerror}); name another") from None
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: {out.parent} cannot be written to; name another")


def export_combined(
    weighted: list[str], how: str, rank: int | None, base: str | None, out: Path, dtype: jnp.dtype = PROOF_DTYPE
) -> dict[str, Any]:
    """Several adapters of one base as one PEFT folder.

    Args:
      weighted: FOLDER=WEIGHT of each adapter.

    Raises:
      ConfigError, ModelError: see `jlora.model.adapter_merge`; or no base, or a weight that is no number.
    """
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
        pretrained = load_pretrained(open_pretrained(base or base_of(folders[0]), None, None), dtype, mesh)
        adapters = {folder: open_adapter(folder, pretrained) for folder in folders}
        adapter, section = combine_adapters(adapters, weights, how, rank, pretrained.base.cfg)
        placed = place_adapter(adapter, pretrained.base.cfg, mesh)
        with new_folder(out) as made:
            difference = verify.write_adapter(made, placed, section, pretrained, dtype, mesh)
    result = {"out": str(out), "kind": "adapter", "combination": how, "rank": section.rank}
    return result | {"logits_relative_difference": difference}


def use_host(run_dir: Path, merge: bool, cost: bool) -> None:
    """Tell JAX, before it starts, that the CPU writes whole models, so that no accelerator's memory is taken."""
    cfg, named = run_config(run_dir), os.environ.get("JAX_PLATFORMS", "")
    if cost and named:  # which may leave the CPU out
        jax.config.update("jax_platforms", f"{named},cpu")
    elif not cost and (merge or (cfg is not None and cfg.method == "full")):
        jax.config.update("jax_platforms", "cpu")
