"""A run's checkpoint as a GGUF file, read back, and how much it keeps of what training gained.

Weights are read, merged, quantised and written a tensor at a time, on the host. Losses are measured on the first
device, one model after the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.config import Config
from jlora.data.tokens import Tokenizer
from jlora.errors import ConfigError, ModelError
from jlora.files.atomic import new_file, write_text
from jlora.hf import llama_quantize, verify
from jlora.hf.gguf import GGUFFile
from jlora.hf.gguf_adapter import write_gguf_adapter
from jlora.hf.gguf_vocabulary import vocabulary_of
from jlora.hf.gguf_writer import KINDS, Rounded, write_gguf
from jlora.hf.grown import Grown
from jlora.hf.license import made_of
from jlora.hf.load import hash_base, load_base
from jlora.hf.ollama import COMPLETION, LEAST_CONTEXT, STANFORD, modelfile, pieces_of
from jlora.hf.pretrained import Opened, load_pretrained, stop_tokens, with_ids, with_stops
from jlora.hf.source import check_names
from jlora.hf.weights import Merged, Stored, untied
from jlora.model.adapter import Adapter, place_adapter
from jlora.model.llama import Decoder
from jlora.model.sharding import named_sharding, one_device_mesh
from jlora.training.evaluator import Evaluator
from jlora.training.export import (
    Step,
    cost_evaluator,
    find_step,
    host_mesh,
    open_trained,
    restore,
    restore_weights,
    trained_config,
)

# Of the sizes of logits, between the model whose weights are rounded here and what is read from the file.
TOLERANCE = 1e-5


def require_kind(kind: str, file: Path) -> None:
    """A kind that can be written here.

    Raises:
      ConfigError: naming those that can.
    """
    if kind in llama_quantize.KINDS:
        return llama_quantize.require_program(kind, file)
    if kind not in KINDS:
        raise ConfigError(f"--quantize {kind}: is none of {', '.join(KINDS + llama_quantize.KINDS)}")


def export_gguf(
    run_dir: Path, file: Path, step: Step, kind: str, base: str | None, least_gain: float
) -> dict[str, Any]:
    """Write a run's model, base and adapter as one; returns the figures of its proof, and the losses.

    Args:
      kind: of `KINDS`, or of those of `jlora.hf.llama_quantize`.
      base: where the base lies now, if not where the run had it.
      least_gain: how much of what training took off the loss the file has to keep; 0 measures no loss.

    Raises:
      ModelError: no such checkpoint, another base, a model that GGUF has no words for, or a file that does not compute
        what was written, or keeps too little.
      ConfigError: `file` is there, or its folder is not, or a kind that we cannot write.
    """
    cfg = trained_config(run_dir, base)
    require_kind(kind, file)
    require_new_file(file)
    found = find_step(cfg, run_dir, step)
    opened = open_trained(cfg, moved=base is None)
    cfg = with_ids(cfg, opened)
    source = opened.source
    host = host_mesh()
    with jax.default_device(host.devices.flat[0]):
        adapter, trained, weights = restore_weights(cfg, opened, run_dir, found, host)
        shape, config = untied(opened.model, source.config, adapter)
        merged = Merged(weights, adapter)
        stops = stop_tokens(opened.tokenizer, with_stops(source.config, opened.path))
        plain = source.base if isinstance(source, Grown) else source
        header = plain.header if isinstance(plain, GGUFFile) and not opened.tokenizer.files else None
        vocabulary = vocabulary_of(opened.tokenizer, header, shape.vocab_size, stops, str(file))
        keys = vocabulary | {"general.name": file.stem}
        template, warnings = ollama_template(cfg, opened.tokenizer, str(file))
        if shape.fused and (window := next(filter(None, shape.windows), None)):
            seen = f"llama.cpp sees all tokens where this model sees {window} before each"
            warnings.append(f"{seen}: longer texts are answered otherwise")
        with new_file(file) as partial:

            def write(kind: str) -> GGUFFile:
                if kind in KINDS:
                    write_gguf(partial, shape, config, merged, keys, kind)
                    return GGUFFile(partial)
                first = partial.with_name(f"{partial.name}.f16")
                try:
                    write_gguf(first, shape, config, merged, keys, "F16")
                    llama_quantize.quantize_file(first, partial, kind)
                finally:
                    first.unlink(missing_ok=True)
                return GGUFFile(partial)

            written = write(kind)
            check_names(written.model, written.shapes, str(file))
            tokens = verify.probe_tokens(shape.vocab_size, adapter)
            ours = kind in KINDS  # how another program rounds is not known here, so what it changes is measured alone
            expected = verify.streamed_logits(shape, Rounded(merged, kind if ours else "F16"), {}, tokens)
            read = verify.streamed_logits(written.model, Stored(written), {}, tokens)
            difference = verify.require_equal(file, expected, read, TOLERANCE if ours else math.inf)
            result: dict[str, Any] = {"step": found, "out": str(file), "kind": "gguf", "quantize": kind}
            result["logits_relative_difference"] = difference
            result["bytes"] = partial.stat().st_size
            if least_gain:
                gain = measure_gain(cfg, opened, adapter, trained)
                result |= figures(gain, written)

                def kept(other: str) -> float | None:
                    return figures(gain, write(other))["gain_kept"]

                require_gain(result, least_gain, kept)
    names = [opened.tokenizer.backend.name(stop) for stop in stops]
    context = min(config.get("max_position_embeddings", cfg.data.max_length), max(LEAST_CONTEXT, cfg.data.max_length))
    write_text(modelfile_of(file), modelfile(file.name, template, names, context))
    return result | made_of(opened) | {"modelfile": str(modelfile_of(file)), "warnings": warnings}


def modelfile_of(file: Path) -> Path:
    """Where the Modelfile of a GGUF file lies."""
    return file.with_suffix(".Modelfile")


def ollama_template(cfg: Config, tokenizer: Tokenizer, where: str) -> tuple[str | None, list[str]]:
    """The prompts of the run in Ollama's words, None where it has none for them; and what is to be said of it."""
    if cfg.data.format == "alpaca" and cfg.data.prompt == "stanford":
        return STANFORD, []
    if cfg.data.format in ("completion", "text") or (cfg.data.format == "preference" and not tokenizer.chat_template):
        return COMPLETION, []
    if (pieces := pieces_of(tokenizer)) is None:
        said = (
            f"the chat template is not one that Ollama's can say, so {modelfile_of(Path(where))} has none and Ollama "
            "guesses: compare with jlora verify"
        )
        return None, [said]
    said = "the chat template takes no system prompt, so Ollama leaves one out"
    return pieces.template(), [] if pieces.system else [said]


def export_gguf_adapter(run_dir: Path, file: Path, step: Step, base: str | None) -> dict[str, Any]:
    """Write a run's adapter for llama.cpp, to be added to its base in GGUF; returns what was written.

    Raises:
      ModelError: as `export_gguf`, and `jlora.hf.gguf_adapter`. ConfigError: see `require_new_file`.
    """
    cfg = trained_config(run_dir, base)
    require_new_file(file, "--gguf-adapter")
    if cfg.method == "full":
        raise ConfigError("--gguf-adapter: the run trained every weight and has no adapter; write --gguf")
    found = find_step(cfg, run_dir, step)
    opened = open_trained(cfg, moved=base is None)
    cfg = with_ids(cfg, opened)
    host = host_mesh()
    adapter, _ = restore(cfg, run_dir, found, opened.model, hash_base(opened.source, opened.name), host)
    with new_file(file) as partial:
        write_gguf_adapter(partial, opened.model, opened.source.config, adapter, cfg.lora)
        size = partial.stat().st_size
    return {"step": found, "out": str(file), "kind": "gguf adapter", "bytes": size, "base": opened.name}


def require_new_file(file: Path, flag: str = "--gguf") -> None:
    """A file that is not there, in a folder that is.

    Raises:
      ConfigError: naming it.
    """
    if file.suffix != ".gguf":
        raise ConfigError(f"{flag} {file}: must end in .gguf, by which it is known")
    for there in (file, *([modelfile_of(file)] if flag == "--gguf" else [])):
        if there.exists():
            raise ConfigError(
                f"{flag} {file}: {'' if there == file else f'{there} '}is there already; name another, or remove it"
            )
    if not file.parent.is_dir():
        raise ConfigError(f"{flag} {file}: there is no folder {file.parent}; make it first")


@dataclass(frozen=True)
class Gain:
    """What training took off the loss of some rows.

    Attributes:
      before, after: mean cross-entropy of the base, and of what was trained.
    """

    before: float
    after: float
    evaluator: Evaluator
    mesh: jax.sharding.Mesh
    dtype: jnp.dtype

    def loss_of(self, written: GGUFFile) -> float:
        """The same of a file."""
        with jax.default_device(self.mesh.devices.flat[0]), jax.set_mesh(self.mesh):
            read, _ = load_base(written, str(written.path), self.dtype, self.mesh)
            return self.evaluator.mean_loss(read, {})[0]


def measure_gain(cfg: Config, opened: Opened, adapter: Adapter, trained: Decoder | None) -> Gain | None:
    """By `cost_evaluator`, in the run's dtype; None where the rows are gone."""
    mesh, dtype = one_device_mesh(), jnp.dtype(cfg.model.dtype)

    with jax.default_device(mesh.devices.flat[0]), jax.set_mesh(mesh):
        evaluator = cost_evaluator(cfg, opened, dtype, mesh)
        if evaluator is None:
            return None
        base = load_pretrained(opened, dtype, mesh, cfg.model.quantization).base
        before = evaluator.mean_loss(base, {})[0]
        if trained is None:
            after = evaluator.mean_loss(base, place_adapter(adapter, base.cfg, mesh))[0]
        else:
            after = evaluator.mean_loss(jax.device_put(trained, named_sharding(mesh, ())), {})[0]
    return Gain(before, after, evaluator, mesh, dtype)


def figures(gain: Gain | None, written: GGUFFile) -> dict[str, float | None]:
    """The losses of base, trained model and file, and the share of the gain that the file keeps.

    Null where the rows are gone, and the share where training did not lower the loss.
    """
    names = ("cross_entropy_base", "cross_entropy_trained", "cross_entropy_file", "gain_kept")
    if gain is None:
        return dict.fromkeys(names)
    kept, gained = gain.loss_of(written), gain.before - gain.after
    share = (gain.before - kept) / gained if gained > 0 else None
    return dict(zip(names, (gain.before, gain.after, kept, share), strict=True))


def require_gain(result: dict[str, Any], least: float, kept_in: Callable[[str], float | None]) -> None:
    """A file that keeps enough of what training gained.

    More bits may keep less: where the base was published in the same kind, its weights are rounded back to themselves,
    without what training added. So the kind to take instead is one that was tried.

    Args:
      kept_in: what another kind keeps.

    Raises:
      ModelError: or the next larger kind that does.
    """
    kept, kind = result["gain_kept"], result["quantize"]
    if kept is None or kept >= least:
        return
    larger = KINDS[: KINDS.index(kind if kind in KINDS else "Q5_1")]  # llama-quantize's kinds are below Q8_0
    better = next((other for other in reversed(larger) if (kept_in(other) or 0.0) >= least), None)
    instead = (
        f"write --quantize {better}, which keeps it" if better else "lower --min-gain, or serve the adapter itself"
    )
    before, after, now = (result[f"cross_entropy_{name}"] for name in ("base", "trained", "file"))
    raise ModelError(
        f"{result['out']}: in {kind} the model keeps {kept:.0%} of what training gained (loss {before:.4f} before, "
        f"{after:.4f} after, {now:.4f} in the file), and --min-gain asks for {least:.0%}; {instead}"
    )
