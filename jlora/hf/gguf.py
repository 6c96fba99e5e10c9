"""A model in a GGUF file, or in the pieces of one, presented as what a Hugging Face folder would give.

Names, shapes, config keys and layouts are Hugging Face's. llama.cpp's converter (convert_hf_to_gguf.py) says what
became of each tensor. What would change the numbers and is not understood is refused, never ignored. The `gguf` package
dequantises.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf.quants import dequantize
from gguf.tensor_mapping import get_tensor_name_map

from jlora.errors import ModelError
from jlora.files.theirs import open_theirs
from jlora.hf.architecture import parse_config
from jlora.hf.gguf_config import architecture_of, config_of
from jlora.hf.gguf_header import CONVERT, FOLDER, MAGIC, Header, first_piece, read_header, read_pieces
from jlora.hf.gguf_tokenizer import Vocabulary
from jlora.hf.names import name_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class GGUFFile:
    """One open GGUF file; of a model in pieces, all of them, by the path of any.

    The constructor raises `ModelError` for whatever is wrong with the configuration or the tensors, so
    that `read` cannot fail later; the vocabulary is checked by `tokenizer`.

    Attributes:
        path: the file, or the first piece.
        config: the equivalent of config.json. `torch_dtype` is the embedding's type in the file, and
            float32 if that is a quantised one.
        model: what `config` says: shape and numerics.
        shapes: Hugging Face tensor name -> shape; projections are (out, in), Conv1D's too. "lm_head.weight" is
            there only if the embeddings are not tied.
        dtypes: Hugging Face tensor name -> name of its type in the file, such as "Q4_1".
        sizes: Hugging Face tensor name -> bytes in the file.
        header: what stands before the tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = first_piece(path)
        self.header = self._open()
        self._tensors = self.header.tensors
        self._architecture = architecture_of(self.header)
        self.config, read = config_of(self.header)
        self.model = parse_config(self.config, str(self.path))
        self.shapes, self._gguf_names = self._map_tensors(read)
        tensors = {name: self._tensors[stored] for name, stored in self._gguf_names.items()}
        self.dtypes = {name: tensor.type.name for name, tensor in tensors.items()}
        self.sizes = {name: tensor.size for name, tensor in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` (a key of `shapes`; KeyError if not) as a new float32 array of that shape.

        It is what the converter was given: q_proj and k_proj of Llama come in transformers' layout (rotation of the
        two halves of a head, and not of neighbours), and weights of norms without the 1 that is added to Gemma's.
        """
        shape = self.shapes[name]
        weight = self.part(name, (0, shape[0] if len(shape) == 2 else 1), (0, shape[-1])).reshape(shape)
        # A float32 tensor is still a read-only view of the mapped file here.
        return weight if weight.flags.writeable else np.array(weight)

    def part(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Rows and columns, each [start, stop), of tensor `name` in float32; a vector is one row.

        Reads and dequantises only the quantisation blocks that they lie in. Rows of q_proj and k_proj must be
        whole heads. The file is mapped anew each time, so that what was read is let go with the array.
        """
        tensor = self._tensors[self._gguf_names[name]]
        per_block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        first, last = columns[0] // per_block, -(-columns[1] // per_block)
        start, stop = (row * tensor.row_bytes for row in rows)
        mapped = self.stored(name, start, stop).reshape(-1, tensor.row_bytes)
        weight = dequantize(mapped[:, first * block_bytes : last * block_bytes], tensor.type)
        if self._architecture.neighbours and name.endswith(("q_proj.weight", "k_proj.weight")):
            half = self.model.head_dim // 2
            weight = weight.reshape(-1, half, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        if self.model.norm_offset and name.endswith("norm.weight"):
            weight = weight - np.float32(1)
        return weight[:, columns[0] - first * per_block : columns[1] - first * per_block]

    def stored(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of tensor `name` as the file has them, uint8; a read-only view of the mapped file."""
        tensor = self._tensors[self._gguf_names[name]]
        offset = tensor.offset + start
        try:
            return np.memmap(tensor.file, np.uint8, "r", offset, (stop - start,))
        except (OSError, ValueError) as error:
            raise self._error(f"changed while it was being read ({error})", "run again") from None

    has_codes = False  # as safetensors have them

    def stored_codes(self, name: str, kind: str | None) -> None:
        """None: no kind of GGUF has the codes of one of ours."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """See `Vocabulary.tokenizer`."""
        positions = self.header.get(f"{self.header.get('general.architecture', str)}.context_length", int)
        return Vocabulary(self.header, self.model.vocab_size, positions).tokenizer()

    def _open(self) -> Header:
        try:
            with open_theirs(self.path) as file:
                magic = file.read(len(MAGIC))
        except OSError as error:
            raise self._error(f"cannot be opened ({error.strerror})", "check the path") from error
        if magic != MAGIC:
            raise self._error("is not a GGUF file", "give a GGUF file or a Hugging Face folder")
        try:
            header = read_header(self.path)
            return read_pieces(header) if header.get("split.count", int, 1) > 1 else header
        except (OSError, ValueError) as error:
            raise self._error(f"is truncated or damaged ({error})", "download or convert it again") from error

    def _map_tensors(self, read: set[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """`shapes`, and the GGUF name for each, after checking that the file has exactly these, and those of `read`."""
        shapes = {name: entry.hf_shape for name, entry in name_table(self.model).items()}
        table = get_tensor_name_map(self._architecture.arch, self.model.num_hidden_layers)
        names = {name: table.get_name(name, (".weight", ".bias")) or name for name in shapes}
        for name, shape in shapes.items():
            tensor = self._tensors.get(names[name])
            if tensor is None:
                raise self._error(f"has no tensor {names[name]}", CONVERT)
            if tensor.shape != shape:
                raise self._error(f"has {names[name]} of shape {tensor.shape}, not {shape}", CONVERT)
        # Biases, experts, scales of a new type.
        for name in sorted(self._tensors.keys() - names.values() - read):
            raise self._error(f"has the tensor {name}, which is not supported", FOLDER)
        for tensor in {t.type: t for t in self._tensors.values()}.values():
            try:
                dequantize(np.zeros(GGML_QUANT_SIZES[tensor.type][1], np.uint8), tensor.type)
            except NotImplementedError as error:
                what = f"has {tensor.name} in the type {tensor.type.name}, which cannot be dequantised"
                raise self._error(what, "use a file of another type, such as Q8_0 or F16") from error
        return shapes, names

    def _error(self, what: str, do: str) -> ModelError:
        return ModelError(f"{self.path} {what}; {do}.")
