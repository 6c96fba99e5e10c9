"""A base model on disk: a Hugging Face safetensors folder, or a GGUF file, and what its config says.

Reads headers, and of the weights only what it is asked for; `load.py` brings them to the devices. Reads
safetensors, GGUF and JSON only: no pickle, no remote code.
"""

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.config import ALL_PROJECTIONS
from jlora.errors import ModelError
from jlora.files import hub
from jlora.files.paths import inside
from jlora.files.theirs import MAX_JSON, open_theirs, read_theirs
from jlora.hf.architecture import module_names, parse_config
from jlora.hf.families import WRAPPED_IN, tensor_in, text_of
from jlora.hf.gguf import GGUFFile
from jlora.hf.gguf_header import gguf_in
from jlora.hf.grown import Grown
from jlora.hf.names import Entry, name_table, tensor_name
from jlora.hf.packed import Packed, Stored, map_file
from jlora.hf.published import find_packed, other_tensors, said_beside
from jlora.model.config import ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# The stored types that are read, by safetensors' names.
FLOATS: dict[str, np.dtype] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

# The largest that is read: of real models a safetensors header is below 1 MB.
MAX_HEADER_BYTES = 16 * 2**20

# Weights of two tables that are compared at once.
COMPARED_WEIGHTS = 2**20

# How the names of what earlier versions stored beside the weights end: it is computed, and not read.
BUFFERS = (
    *("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "rope.freqs"),
    *("attn.masked_bias", "self_attn.bias", ".attn.bias"),
)
# Of a base on the hub, all but its weights.
SMALL_FILES = ["*.json", "tokenizer.model", "*.jinja", "README.md"]

# How much of each tensor `base_fingerprint` looks at.
NUM_SAMPLES, SAMPLE_BYTES = 8, 4096


class SafetensorsFolder:
    """A folder with config.json and safetensors, single or sharded with an index.

    Read as transformers reads it: `model.safetensors` goes before an index, and a tied head that is stored with
    values of its own is not tied; `config` says so.

    The safetensors library opens and validates each file. The weights do not come through it: it maps the
    file and copies out of the map, which is two copies of a tensor in memory at once. Here the rows that are
    asked for are mapped, and unmapped when the caller lets the array go.

    Attributes:
      config: as config.json has it. model: what it says.
      shapes, dtypes, sizes: Hugging Face tensor name -> shape, the stored type's name in the format, stored bytes.
    """

    def __init__(self, folder: Path, name: str):
        """Read the headers of a folder.

        Args:
          name: what messages about its config call it.
        """
        self.folder, self._name = folder, name
        self.config = text_of(said_beside(folder) | read_json(inside(folder, "config.json")), name)
        names = module_names(self.config)
        self._table, self._head = (tensor_name(names, leaf, None) for leaf in ("embed_tokens", "lm_head"))
        self._input_first = tuple(
            f".{module}.weight" for leaf, module in names.renamed if names.input_first and leaf in ALL_PROJECTIONS
        )
        self._require_one_model()
        index = inside(folder, INDEX)
        if inside(folder, SINGLE).is_file():
            files = [SINGLE]
        elif index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
                raise ModelError(f"{index}: holds no weight_map from tensor to file; download it again")
            files = sorted(set(weight_map.values()))
        else:
            hint = to_safetensors(folder) if any(folder.glob("*.bin")) else "download the model again"
            raise ModelError(f"{folder}: holds no model.safetensors and no index of shards; {hint}")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file in files:
            self._read_header(inside(folder, file))
        if WRAPPED_IN in self.config:
            self._rename({name: tensor_in(name) for name in self.shapes})
        else:
            self._name_as_a_whole_model()
        self._take_packed()
        if self._has_other_head():
            self.config = self.config | {"tie_word_embeddings": False}
            print(
                f"warning: {folder}: config.json ties the embeddings, but {self._head} has other values than "
                f"{self._table}; both are taken, not tied, as transformers does",
                file=sys.stderr,
            )

    @cached_property
    def model(self) -> ModelConfig:
        """Shape and numerics."""
        return parse_config(self.config, self._name)

    def _require_one_model(self) -> None:
        """Refuse what makes transformers load more than, or other than, the folder's usual files."""
        if inside(self.folder, "adapter_config.json").is_file():
            raise ModelError(
                f"{self.folder}: holds a whole model and adapter_config.json, an adapter that transformers would add "
                "to it; move the adapter's files to a folder of their own"
            )
        if (file := self.config.get("transformers_weights")) is not None:
            raise ModelError(
                f"{self.folder}: config.json names its weights (transformers_weights={file!r}); rename the file to "
                "model.safetensors, and take the key out"
            )

    def _name_as_a_whole_model(self) -> None:
        """A decoder without its head, such as `LlamaModel` writes, lacks the first part of its tensors' names."""
        body, _, table = self._table.partition(".")
        if table in self.shapes and not any(name.startswith(f"{body}.") for name in self.shapes):
            self._rename({name: name if name == self._head else f"{body}.{name}" for name in self.shapes})

    def _rename(self, names: dict[str, str | None]) -> None:
        """Give tensors other names; without one, a tensor is none of this model's."""
        kept = [(old, new) for old, new in names.items() if new is not None]
        self.shapes = {new: self.shapes[old] for old, new in kept}
        self.dtypes = {new: self.dtypes[old] for old, new in kept}
        self.sizes = {new: self.sizes[old] for old, new in kept}
        self._places = {new: self._places[old] for old, new in kept}

    def _take_packed(self) -> None:
        """From here on a weight that is stored quantised is one tensor, and what makes it up is none."""
        stored = Stored(self.shapes, self.dtypes, self.sizes, self._places)
        self._packed = find_packed(self.config, stored, self._name)
        if self._packed:
            others = other_tensors(stored, self._packed, name_table(self.model))
            packed = self._packed.items()
            self.shapes = {name: self.shapes[name] for name in others} | {name: one.shape for name, one in packed}
            self.dtypes = {name: self.dtypes[name] for name in others} | {name: one.dtype for name, one in packed}
            self.sizes = {name: self.sizes[name] for name in others} | {name: one.size for name, one in packed}

    def _has_other_head(self) -> bool:
        """Whether a head is stored beside the embedding that it is said to be, in values that differ as float32."""
        names = self._head, self._table
        shapes = [self.shapes.get(name, ()) for name in names]
        if self.config.get("tie_word_embeddings") is not True or len(shapes[0]) != 2 or shapes[0] != shapes[1]:
            return False
        width = shapes[0][1]
        head, table = (lambda start, stop, name=name: self.part(name, (start, stop), (0, width)) for name in names)
        return not same_tables(shapes[0], head, table)

    def _read_header(self, path: Path) -> None:
        with open_safetensors(path), open_theirs(path) as file:  # the first refuses offsets that do not fit
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, tensor in header.items():
            if name != "__metadata__":
                start, stop = tensor["data_offsets"]
                shape = tuple(tensor["shape"])
                self.dtypes[name] = tensor["dtype"]
                self.shapes[name] = shape[::-1] if self._turned(name, len(shape)) else shape
                self.sizes[name] = stop - start
                self._places[name] = path, 8 + size + start

    def _turned(self, name: str, rank: int) -> bool:
        """Whether a projection is stored as [in, out]: it is given out as [out, in], like every other.

        One that is quantised is stored as [out, in].
        """
        return rank == 2 and self.dtypes[name] in FLOATS and f".{name}".endswith(self._input_first)

    @property
    def has_codes(self) -> bool:
        """Whether weights are stored quantised."""
        return bool(self._packed)

    def stored_codes(self, name: str, kind: str | None) -> Packed | None:
        """A tensor whose stored codes are those of `quant.Quantized` of `kind`; None where they are not."""
        packed = self._packed.get(name) if kind == "nf4" else None
        return packed if packed is not None and packed.layout.nf4_offset is not None else None

    def read(self, name: str) -> np.ndarray:
        """One tensor whole, a new array as it is stored, or turned; bfloat16 comes as ml_dtypes.bfloat16."""
        shape = self.shapes[name]
        rows, columns = shape if len(shape) == 2 else (1, math.prod(shape))
        return np.array(self.part(name, (0, rows), (0, columns))).reshape(shape)

    def part(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Rows and columns, each [start, stop), of one tensor; a vector is one row.

        A read-only view of the mapped file: only the pages that it is read on are loaded. Of a tensor that is stored
        quantised a new array, float32.
        """
        if name in self._packed:
            return self._packed[name].part(rows, columns)
        path, offset = self._places[name]
        dtype, shape = floats(self.dtypes[name], name, path), self.shapes[name]
        turned = self._turned(name, len(shape))
        rows, columns, width = (columns, rows, shape[0]) if turned else (rows, columns, shape[-1])
        mapped = map_file(path, dtype, offset + rows[0] * width * dtype.itemsize, (rows[1] - rows[0], width))
        part = mapped[:, slice(*columns)]
        return part.T if turned else part

    def stored(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of one tensor as they lie in the file, uint8; a read-only view of the mapped file.

        Of a quantised tensor they are those of all that makes it up, end to end.
        """
        if name in self._packed:
            return self._packed[name].raw(start, stop)
        path, offset = self._places[name]
        return map_file(path, np.dtype(np.uint8), offset + start, (stop - start,))


# A base on disk, whatever the file format.
Source = SafetensorsFolder | GGUFFile | Grown


def to_safetensors(folder: Path) -> str:
    """What to do with a folder of pickled weights, which can hold any program and are not read."""
    code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r})"
    command = shlex.join(["python", "-c", f"{code}.save_pretrained({str(folder)!r})"])
    return f"its .bin files are pickled, so convert them to safetensors once, where PyTorch is installed: {command}"


def floats(stored: str, name: str, path: Path) -> np.dtype:
    """The dtype of a stored type, which must be of floats; NumPy has no narrower ones."""
    if stored not in FLOATS:
        raise ModelError(f"{path}: tensor {name} is {stored}; only 16, 32 and 64-bit floats are read")
    return FLOATS[stored]


def read_floats(tensors: Any, name: str, path: Path) -> np.ndarray:
    """One tensor of an open safetensors file, which must hold floats."""
    floats(tensors.get_slice(name).get_dtype(), name, path)
    return tensors.get_tensor(name)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """`safe_open` with errors that name the file."""
    try:
        with open_theirs(path) as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise SafetensorError(f"a header of {size} bytes, more than the {MAX_HEADER_BYTES} that are read")
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
        value = json.loads(read_theirs(path, MAX_JSON).decode("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; is {path.parent} the right folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def resolve(path: str, weights: bool = True) -> Path:
    """The local path of a base; one of the hub is downloaded, its weights only once its config is of a kind we read.

    A folder without safetensors stands for the GGUF file in it.

    Args:
      weights: False leaves them where they are.

    Raises:
      ModelError: it is neither here nor on the hub, its config is refused, or the folder has several GGUF files.
    """
    local = Path(path)
    if local.is_dir() and not any((local / name).exists() for name in (SINGLE, INDEX)):
        return gguf_in(local) or local
    if local.exists():
        return local
    what = "folder or GGUF file"
    folder = hub.download(path, SMALL_FILES, what, ModelError)
    if weights:
        read_config(folder, path)
        folder = hub.download(path, ["*.safetensors"], what, ModelError, revision=folder.name)
    return folder


def read_config(path: Path, name: str) -> tuple[dict[str, Any], ModelConfig]:
    """What the config of a folder or GGUF file says, as config.json has it and as a model's shape; needs no weights."""
    if path.is_file():
        source = GGUFFile(path)
        return source.config, source.model
    config = text_of(said_beside(path) | read_json(inside(path, "config.json")), name)
    return config, parse_config(config, name)


def same_tables(
    shape: tuple[int, ...], first: Callable[[int, int], np.ndarray], second: Callable[[int, int], np.ndarray]
) -> bool:
    """Whether two tables [rows, width] hold the same numbers as float32; some rows of each are in memory at once.

    Args:
      first, second: (start, stop) -> those rows.
    """
    height, width = shape
    step = max(1, COMPARED_WEIGHTS // max(1, width))
    for start in range(0, height, step):
        ours, theirs = (read(start, min(start + step, height)).astype(np.float32) for read in (first, second))
        if not np.array_equal(ours, theirs):
            return False
    return True


def open_source(path: Path, name: str | None = None) -> Source:
    """The base at `path`, a folder or a GGUF file, by the name that the user has for it; reads headers, no weights."""
    return GGUFFile(path) if path.is_file() else SafetensorsFolder(path, name or str(path))


def check_names(cfg: ModelConfig, shapes: dict[str, tuple[int, ...]], where: str) -> dict[str, Entry]:
    """The name table, once every tensor of the model is there with its shape and nothing else is.

    Raises:
      ModelError: missing, extra or misshapen tensors, all in one sentence.
    """
    if cfg.num_hidden_layers > max(1000, len(shapes)):  # before a table of so many layers is made
        raise ModelError(f"{where}: its config says {cfg.num_hidden_layers} layers, but it holds {len(shapes)} tensors")
    table = name_table(cfg)
    # A tied head may be stored too; it is the embedding once more (see `SafetensorsFolder`), or misshapen.
    head, embedding = (tensor_name(cfg.names, leaf, None) for leaf in ("lm_head", "embed_tokens"))
    twice = {head: table[embedding]} if cfg.tie_word_embeddings else {}
    missing = [name for name in table if name not in shapes]
    extra = [name for name in shapes if name not in table and name not in twice and not name.endswith(BUFFERS)]
    wrong = [
        f"{name} {list(shapes[name])} instead of {list(entry.hf_shape)}"
        for name, entry in (table | twice).items()
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


def base_fingerprint(source: Source) -> str:
    """A quick identity of a base, by which hosts find out that they see the same one, as SHA-256 in hex.

    Covers the config and every tensor's name, stored type, shape and up to 8 evenly spaced blocks of 4 KiB:
    another seed, revision or type shows; a change of a few weights may not (`load_base` hashes them all).
    """
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True).encode())
    for name in sorted(source.shapes):
        digest.update(f"{name} {source.dtypes[name]} {source.shapes[name]} ".encode())
        size = source.sizes[name]
        last = max(0, size - SAMPLE_BYTES)
        for start in sorted({last * sample // (NUM_SAMPLES - 1) for sample in range(NUM_SAMPLES)}) if size else ():
            digest.update(source.stored(name, start, min(start + SAMPLE_BYTES, size)).data)
    return digest.hexdigest()
