"""Reads a base model (Hugging Face safetensors folder or GGUF file) into a `Decoder`.

Tensor by tensor: each is read, written into its place of the stacked leaf on the devices and let
go, so the host never holds a second copy of the model. Reads safetensors, GGUF and JSON only: no
pickle, no remote code.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.errors import ModelError
from jlora.gguf import GGUFFile
from jlora.hf.names import Entry, name_table
from jlora.layers import RopeScaling
from jlora.model import Decoder, LlamaConfig, abstract_decoder, check_blocks
from jlora.quant import Leaf, encode, map_axes
from jlora.sharding import named_sharding

# Fields of a Llama config that change the numerics, with the values that jlora computes. What
# LlamaForCausalLM of transformers does not read can not change its numerics and is not looked at.
ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}
ROPE_FIELDS = {
    *("rope_theta", "rope_type", "type", "factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class Source(Protocol):
    """A base on disk: Hugging Face tensor names, shapes and one reader, whatever the file format."""

    config: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsFolder:
    """A folder with config.json and safetensors, single or sharded with an index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise ModelError(f"{index}: holds no weight_map from tensor to file; download it again")
            files = sorted(set(weight_map.values()))
        elif (folder / "model.safetensors").is_file():
            files = ["model.safetensors"]
        else:
            hint = "convert it to safetensors" if any(folder.glob("*.bin")) else "download the model again"
            raise ModelError(f"{folder}: holds no model.safetensors and no index of shards; {hint}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            if Path(file).name != file:
                raise ModelError(f"{index}: names '{file}', which lies outside the folder; it is refused")
            with open_safetensors(folder / file) as tensors:
                for name in tensors.keys():
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
                    self._files[name] = folder / file

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored; bfloat16 comes as ml_dtypes.bfloat16."""
        path = self._files[name]
        with open_safetensors(path) as tensors:
            return read_floats(tensors, name, path)


def read_floats(tensors: Any, name: str, path: Path) -> np.ndarray:
    """One tensor of an open safetensors file, which must hold floats; NumPy has no narrower ones."""
    stored = tensors.get_slice(name).get_dtype()
    if stored not in ("F16", "BF16", "F32", "F64"):
        raise ModelError(f"{path}: tensor {name} is {stored}; only 16, 32 and 64-bit floats are read")
    return tensors.get_tensor(name)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """`safe_open` with errors that name the file."""
    try:
        with safe_open(str(path), framework="np") as tensors:
            yield tensors
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; is {path.parent} whole? Get the file again") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a whole safetensors file ({error}); it was cut short or damaged, get it again"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ModelError: missing, unreadable, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; is {path.parent} the right folder?") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: can not be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def resolve(path: str) -> Path:
    """The local path of a base; a hub name is downloaded (safetensors, JSON and tokenizer files only)."""
    local = Path(path)
    if local.exists():
        return local
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ModelError(f"{path}: no such folder or GGUF file, and not a hub name (OWNER/NAME); check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
    try:
        return Path(snapshot_download(path, allow_patterns=wanted))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path}: no such folder, and the hub did not deliver it ({reason})") from None


def open_source(path: Path) -> Source:
    """The base at `path`, a folder or a .gguf file; reads headers, no weights."""
    return GGUFFile(path) if path.is_file() else SafetensorsFolder(path)


def parse_config(raw: dict[str, Any], where: str) -> LlamaConfig:
    """Shape and numerics from a Hugging Face config.json.

    Accepts both spellings of rotary settings: `rope_theta` with `rope_scaling` (transformers 4) and
    `rope_parameters` (transformers 5).

    Raises:
      ModelError: an architecture or a field that changes the numerics and is not supported, by name.
    """
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else repr(architectures)
        raise ModelError(f"{where}: architecture {named} is not supported, only LlamaForCausalLM")
    for field, allowed in ONLY_SUPPORTED.items():
        if raw.get(field) not in allowed and (field in raw or None not in allowed):
            raise ModelError(f"{where}: {field}={raw.get(field)!r} changes the numerics and is not supported")

    def integer(field: str, fallback: int | None = None) -> int:
        value = raw.get(field)
        value = fallback if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{where}: {field} must be a positive integer, not {value!r}")
        return value

    def real(value: Any, field: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(f"{where}: {field} must be a positive number, not {value!r}")
        return float(value)

    heads, hidden = integer("num_attention_heads"), integer("hidden_size")
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"{where}: rope_scaling must be a JSON object, not {scaling!r}")
    # The settings' own theta goes first, then the config's, then LlamaConfig's default.
    thetas = (scaling.get("rope_theta"), raw.get("rope_theta"), 10000.0)
    theta = next(value for value in thetas if value is not None)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    kv_heads, head_dim = integer("num_key_value_heads", heads), integer("head_dim", max(1, hidden // heads))
    if heads % kv_heads or head_dim % 2:
        raise ModelError(f"{where}: {heads} heads of {head_dim} with {kv_heads} key/value heads do not divide")
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(f"{where}: rope_scaling of type '{kind}' is not supported; linear and llama3 are")
    if unknown := sorted(set(scaling) - ROPE_FIELDS):
        raise ModelError(f"{where}: rope_scaling.{unknown[0]} changes the numerics and is not supported")
    rescaled = None
    if kind != "default":
        # Only llama3 reads what stands behind `factor`, and then it has no default but the context length.
        rest = scaling if kind == "llama3" else {"low_freq_factor": 1.0, "high_freq_factor": 1.0}
        context = rest.get("original_max_position_embeddings") or raw.get("max_position_embeddings") or 2048
        rescaled = RopeScaling(
            kind=kind,
            factor=real(scaling.get("factor"), "rope_scaling.factor"),
            low_freq_factor=real(rest.get("low_freq_factor"), "rope_scaling.low_freq_factor"),
            high_freq_factor=real(rest.get("high_freq_factor"), "rope_scaling.high_freq_factor"),
            original_max_position_embeddings=int(real(context, "rope_scaling.original_max_position_embeddings")),
        )
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ModelError(f"{where}: tie_word_embeddings must be true or false, not {tied!r}")
    return LlamaConfig(
        vocab_size=integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size"),
        num_hidden_layers=integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=real(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_theta=real(theta, "rope_theta"),
        rope_scaling=rescaled,
        tie_word_embeddings=tied,
    )


def check_names(cfg: LlamaConfig, shapes: dict[str, tuple[int, ...]], where: str) -> dict[str, Entry]:
    """The name table, once every tensor of the model is there with its shape and nothing else is.

    Raises:
      ModelError: missing, extra or misshapen tensors, all in one sentence.
    """
    table = name_table(cfg)
    ignored = {"lm_head.weight"} if cfg.tie_word_embeddings else set()  # a tied head may be stored too
    missing = [name for name in table if name not in shapes]
    extra = [
        name
        for name in shapes
        if name not in table and name not in ignored and not name.endswith("rotary_emb.inv_freq")
    ]
    wrong = [
        f"{name} {list(shapes[name])} instead of {list(entry.hf_shape)}"
        for name, entry in table.items()
        if name in shapes and shapes[name] != entry.hf_shape
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", extra), ("misshapen", wrong))
        if names
    ]
    if problems:
        raise ModelError(f"{where}: tensors do not match its config: {'; '.join(problems)}")
    return table


@partial(jax.jit, static_argnames=("shape", "transposed"), donate_argnums=0)
def _write(buffer: Leaf, array: jax.Array, layer: jax.Array | None, shape: tuple[int, ...], transposed: bool) -> Leaf:
    leaf = encode((array.T if transposed else array).reshape(shape), buffer)
    if layer is None:
        return leaf
    update = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return jax.tree.map(update, buffer, leaf)


def _zeros(param: Any, mesh: jax.sharding.Mesh) -> Leaf:
    def zeros(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.Array:
        return jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=named_sharding(mesh, axes))()

    return map_axes(zeros, param.get_raw_value(), param.axes)


def load_base(
    source: Source, where: str, dtype: jnp.dtype, mesh: jax.sharding.Mesh, quantization: str | None = None
) -> tuple[Decoder, str]:
    """The model in `dtype`, laid out over `mesh`, and the SHA-256 of its tensors as stored.

    Args:
      quantization: as what the projections are held, from their stored values on, one on the devices at a time.

    Raises:
      ConfigError: see `jlora.model.check_blocks`.
      ModelError: what `parse_config` and `check_names` refuse, a damaged file, a non-finite weight.
    """
    cfg = parse_config(source.config, where)
    table = check_names(cfg, source.shapes, where)
    check_blocks(cfg, quantization, mesh)
    decoder = abstract_decoder(cfg, dtype, quantization)
    digest = hashlib.sha256()
    for name, entry in table.items():
        owner = decoder if entry.layer is None else decoder.layers
        param = getattr(owner, entry.leaf)
        if not entry.layer:
            param.set_raw_value(_zeros(param, mesh))
        array = source.read(name)
        if not np.isfinite(array).all():
            raise ModelError(f"{where}: tensor {name} holds NaN or infinity; the file is damaged")
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        layer = None if entry.layer is None else jnp.asarray(entry.layer)
        param.set_raw_value(_write(param.get_raw_value(), array, layer, entry.shape, entry.transposed))
    return decoder, digest.hexdigest()


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a folder that was written whole in place of `final`, which may exist."""
    umask = os.umask(0)
    os.umask(umask)
    for file in temporary.iterdir():
        file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)  # left by a process that died between the two renames
        os.replace(final, old)
        os.replace(temporary, final)
        shutil.rmtree(old)
    else:
        os.replace(temporary, final)
