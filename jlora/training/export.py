"""A run's checkpoint as an adapter folder or a full Hugging Face checkpoint, and several adapters as one.

A full checkpoint, the base with the adapter merged in or a full fine-tuning's own weights, is made on the host, with no
accelerator and no whole model: the base is read, merged, cast and written a few rows at a time, and the proof runs base
with adapter, then what was written, with one tensor in memory. What is held beside is the adapter, or the weights of a
full fine-tuning.
"""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora.config import Config, MeshSection
from jlora.data.encoding import read_data
from jlora.errors import ConfigError, DataError, MemoryExceeded, ModelError
from jlora.files.atomic import new_folder
from jlora.files.paths import inside
from jlora.hf import verify
from jlora.hf.adapters import base_of, embedding_rows, find_adapter, open_adapter, run_config
from jlora.hf.gguf import GGUFFile
from jlora.hf.grown import Grown
from jlora.hf.license import made_of
from jlora.hf.load import hash_base, load_base
from jlora.hf.names import name_table
from jlora.hf.pretrained import Opened, load_pretrained, open_base, open_pretrained, with_ids
from jlora.hf.source import check_names, open_source
from jlora.hf.weights import Dequantized, Merged, Stored, Trained, Weights, save_checkpoint, stored_bytes, untied
from jlora.model import attention
from jlora.model.adapter import Adapter, layer_scales, place_adapter, targets, with_scales, without_scales
from jlora.model.adapter_init import new_adapter
from jlora.model.adapter_merge import combine_adapters
from jlora.model.config import ModelConfig
from jlora.model.llama import Decoder, abstract_decoder
from jlora.model.sharding import make_mesh, named_sharding, one_device_mesh
from jlora.training import auto_remat
from jlora.training.checkpoint import Checkpoints
from jlora.training.evaluator import Evaluator
from jlora.training.provenance import provenance_of, write_provenance
from jlora.training.step import Forward, count_parameters

# The proof is in float32, where rounding cannot hide a mistake.
PROOF_DTYPE = jnp.dtype("float32")

# Rows on which the cost of merging is measured.
COST_ROWS = 64

# Difference of logits that rounding to a dtype may make (see `verify.require_equal`).
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

# What blocks of rows, tokenizer, compiled programs and the checkpoint's reader take beside the weights.
SPARE_BYTES = 512 * 2**20

# A checkpoint: a step, the one with the lowest held-out loss, or the newest.
Step = int | Literal["best"] | None


def host_mesh() -> jax.sharding.Mesh:
    """One CPU device, whatever accelerators there are."""
    return make_mesh(MeshSection(data=1, fsdp=1, tensor=1), jax.devices("cpu")[:1])


def restore(
    cfg: Config, run_dir: Path, step: int, model: ModelConfig, base_hash: str, mesh: jax.sharding.Mesh
) -> tuple[Adapter, Decoder | None]:
    """Adapter and, of a full fine-tuning, weights of a checkpoint, on `mesh`.

    Raises:
      ModelError: it is one of another base or run.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints", cfg.training.keep_checkpoints, read_only=True)
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
    return restored


def restore_weights(
    cfg: Config, opened: Opened, run_dir: Path, step: int, mesh: jax.sharding.Mesh
) -> tuple[Adapter, Decoder | None, Weights]:
    """What `restore` gives, and the weights that the adapter was trained over, or that were trained themselves."""
    source, model = opened.source, opened.model
    adapter, trained = restore(cfg, run_dir, step, model, hash_base(source, opened.name), mesh)
    if trained is not None:
        return adapter, trained, Trained(trained)
    kind = cfg.model.quantization
    return adapter, None, Stored(source) if kind is None else Dequantized(source, model, kind)


def find_step(cfg: Config, run_dir: Path, step: Step) -> int:
    """The checkpoint that is meant, which is whole.

    Raises:
      ModelError: there is none such.
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
    checkpoints.close()
    return step


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
      MemoryExceeded, ConfigError: see `require_room`.
    """
    cfg = trained_config(run_dir, base)
    require_new_folder(out)
    full = merge or cfg.method == "full"
    if peft and full:
        raise ConfigError("--verify loads an adapter in PEFT; leave --merge out")
    if dtype and not full:
        raise ConfigError("--dtype is that of a whole checkpoint (--merge); an adapter is written in float32")
    if cost and (not merge or cfg.method == "full"):
        raise ConfigError("--cost is that of merging an adapter, by --merge; leave it out")
    found = find_step(cfg, run_dir, step)
    opened = open_trained(cfg, moved=base is None)
    cfg, model = with_ids(cfg, opened), opened.model
    with new_folder(out) as folder:
        if full:
            chosen = dtype or cfg.model.dtype
            return write_full(cfg, opened, run_dir, found, folder, chosen, cost) | {"out": str(out)} | made_of(opened)
        mesh = one_device_mesh()
        with jax.set_mesh(mesh):
            # PEFT has the base as it is stored.
            kind = None if peft else cfg.model.quantization
            pretrained = load_pretrained(opened, jnp.dtype(cfg.model.dtype), mesh, kind)
            adapter, _ = restore(cfg, run_dir, found, model, pretrained.base_hash, mesh)
            where = (cfg.lora, pretrained, PROOF_DTYPE, mesh)
            result: dict[str, Any] = {"step": found, "out": str(out), "kind": "adapter"}
            result |= made_of(opened)
            result["logits_relative_difference"] = verify.write_adapter(folder, adapter, *where)
            write_provenance(folder, provenance_of(cfg, run_dir, found))
            if peft:
                compared = verify.compare_with_peft(folder, adapter, pretrained)
                result["peft_relative_difference"], result["base_read_by"] = compared
    return result


def trained_config(run_dir: Path, base: str | None) -> Config:
    """The config of a run, whose base may lie elsewhere by now.

    Raises:
      ModelError: not a run folder.
    """
    cfg = run_config(run_dir)
    if cfg is None:
        raise ModelError(f"{run_dir}: not a run folder (it has no config.yaml)")
    return cfg if base is None else cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": base})})


def open_trained(cfg: Config, moved: bool) -> Opened:
    """The base of a run, no weight read yet.

    Args:
      moved: nobody has said where it lies now.
    """
    try:
        return open_base(cfg)
    except ModelError as error:
        if not moved or Path(cfg.model.path).exists():
            raise
        raise ModelError(f"{error}; if the base has moved, say where it lies with --base") from None


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


def export_combined(weighted: list[str], how: str, rank: int | None, base: str | None, out: Path) -> dict[str, Any]:
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
        rows = max(embedding_rows(find_adapter(folder)) for folder in folders)
        opened = open_pretrained(base or base_of(folders[0]), None, None, rows=rows)
        pretrained = load_pretrained(opened, PROOF_DTYPE, mesh)
        adapters = {folder: open_adapter(folder, pretrained) for folder in folders}
        adapter, section = combine_adapters(adapters, weights, how, rank, pretrained.base.cfg)
        placed = place_adapter(adapter, pretrained.base.cfg, mesh)
        with new_folder(out) as made:
            difference = verify.write_adapter(made, placed, section, pretrained, PROOF_DTYPE, mesh)
    result = {"out": str(out), "kind": "adapter", "combination": how, "rank": section.rank}
    return result | {"logits_relative_difference": difference}


def use_host(run_dir: Path, merge: bool, cost: bool) -> None:
    """Tell JAX, before it starts, that the CPU writes whole models, so that no accelerator's memory is taken."""
    cfg, named = run_config(run_dir), os.environ.get("JAX_PLATFORMS", "")
    if cost and named:  # which may leave the CPU out
        jax.config.update("jax_platforms", f"{named},cpu")
    elif not cost and (merge or (cfg is not None and cfg.method == "full")):
        jax.config.update("jax_platforms", "cpu")


def needed_memory(cfg: Config, model: ModelConfig) -> int:
    """Bytes of the host that merging takes beside what the process holds already.

    The proof holds a projection in float32, and at times a second one: with DoRA its squares, else the one before it,
    whose product is not over. Of the adapter, or of the weights of a full fine-tuning, there is one copy.
    """
    largest = max(math.prod(entry.hf_shape) for entry in name_table(model).values() if entry.transposed)
    if cfg.method == "full":
        trained = count_parameters(abstract_decoder(model, jnp.dtype("float32")))
    else:
        trained = count_parameters(jax.eval_shape(lambda: new_adapter(cfg.lora, model, 0)))
    return 2 * 4 * largest + 4 * trained + SPARE_BYTES


def require_room(out: Path, cfg: Config, model: ModelConfig, dtype: str) -> None:
    """Refuse a merge that would not fit in the host's memory or on the disk, before anything is written.

    Raises:
      MemoryExceeded, ConfigError: with what is needed and what there is.
    """
    need, free = needed_memory(cfg, model), auto_remat.free_host_bytes()
    if need > free:
        raise MemoryExceeded(
            f"merging {cfg.model.path} takes {need / 2**30:,.1f} GiB of the host's memory, and {free / 2**30:,.1f} GiB "
            "are available; end other programs, or merge on another machine"
        )
    need, free = stored_bytes(model, dtype), shutil.disk_usage(out.parent).free
    if need > free:
        raise ConfigError(
            f"--out {out}: the checkpoint takes {need / 2**30:,.1f} GiB in {dtype}, and {free / 2**30:,.1f} GiB are "
            "free; make room, or name a folder on another disk"
        )


def write_full(
    cfg: Config, opened: Opened, run_dir: Path, step: int, out: Path, dtype: str, cost: bool
) -> dict[str, Any]:
    """Write a full checkpoint, read it back, compare logits; returns their relative difference, among others.

    Merging into a quantised base takes the weights that the adapter was trained on, dequantised: the result computes
    what the run did, while merging into the stored ones would put the adapter on weights it has never seen.

    Args:
      cost: whether the loss is measured, too, with both models whole on the first device.

    Raises:
      MemoryExceeded, ConfigError: see `require_room`.
      ModelError: another base, or a checkpoint that does not compute what the run does.
    """
    source, model = opened.source, opened.model
    require_room(out, cfg, model, dtype)
    host = host_mesh()
    with jax.default_device(host.devices.flat[0]):
        adapter, _, weights = restore_weights(cfg, opened, run_dir, step, host)
        shape, config = untied(model, source.config, adapter)
        save_checkpoint(
            out, shape, Merged(weights, adapter), config, dtype, lambda folder: add_tokenizer(opened, folder)
        )
        expected = verify.streamed_logits(shape, weights, adapter)
        written = open_source(out)  # as any base is
        check_names(written.model, written.shapes, str(out))
        tokens = verify.probe_tokens(shape.vocab_size, adapter)
        found = verify.streamed_logits(written.model, Stored(written), {}, tokens)
        difference = verify.require_equal(out, expected, found, TOLERANCE[dtype])
    result: dict[str, Any] = {"step": step, "out": str(out), "kind": "full", "dtype": dtype}
    result["logits_relative_difference"] = difference
    if cfg.model.quantization is not None:
        result["merged_into"] = f"dequantised {cfg.model.quantization}"
    return result | (merging_cost(cfg, opened, out, adapter) if cost else {})


def cost_evaluator(cfg: Config, opened: Opened, dtype: jnp.dtype, mesh: jax.sharding.Mesh) -> Evaluator | None:
    """Mean cross-entropy of trained tokens, on the run's first held-out rows, or training rows where it has none.

    Of a run on pairs, too, whose loss compares with the base that is no longer there once merged. None where the rows
    are gone.
    """
    try:
        train_data, eval_data = read_data(cfg, opened.tokenizer)
    except DataError:
        return None
    rows = eval_data or train_data
    rows = replace(rows, examples=rows.examples[:COST_ROWS])
    return Evaluator(rows, cfg.data, 1, Forward(attention.reference, "none", dtype), mesh)


def merging_cost(cfg: Config, opened: Opened, out: Path, adapter: Adapter) -> dict[str, float | None]:
    """Mean cross-entropy before and after merging, by `cost_evaluator`; null where the rows are gone."""
    found: dict[str, float | None] = {"cross_entropy_before_merging": None, "cross_entropy_merged": None}
    mesh, float32 = one_device_mesh(), jnp.dtype("float32")
    with jax.set_mesh(mesh):
        evaluator = cost_evaluator(cfg, opened, float32, mesh)
        if evaluator is None:
            return found
        base = load_pretrained(opened, float32, mesh, cfg.model.quantization).base
        placed = place_adapter(adapter, base.cfg, mesh)
        found["cross_entropy_before_merging"] = evaluator.mean_loss(base, placed)[0]
        del base  # before the second model comes
        merged, _ = load_base(open_source(out), str(out), float32, mesh)
        found["cross_entropy_merged"] = evaluator.mean_loss(merged, {})[0]
    return found


def add_tokenizer(opened: Opened, folder: Path) -> None:
    """The tokenizer's own files, and the generation config, beside the weights."""
    source = opened.source.base if isinstance(opened.source, Grown) else opened.source
    if isinstance(source, GGUFFile) and not opened.tokenizer.files:
        source.tokenizer().save_pretrained(folder)
    files = list(opened.tokenizer.files)
    if opened.path.is_dir():
        files.append(inside(opened.path, "generation_config.json"))
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
