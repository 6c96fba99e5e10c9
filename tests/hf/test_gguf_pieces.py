"""Models in several GGUF files, and the kinds of tensors that only others can write."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from gguf_files import GPT2, LLAMA, permute, write

from jlora.errors import ModelError
from jlora.hf.gguf import GGUFFile
from jlora.hf.load import hash_base
from jlora.hf.pretrained import open_pretrained
from jlora.hf.source import base_fingerprint, open_source

SPLIT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import gguf_files
class Splitting(gguf_files.GGUFWriter):
    def __init__(self, path, arch):
        super().__init__(path, arch, split_max_tensors=7)
gguf_files.GGUFWriter = Splitting
gguf_files.write(Path(sys.argv[1]), gguf_files.Type.Q8_0, tied=False)
"""


@pytest.fixture
def pieces(tmp_path: Path) -> list[Path]:
    """A model in three files, as the writer of the gguf package parts it."""
    folder = tmp_path / "pieces"
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", SPLIT, folder / "m.gguf", Path(__file__).parent.parent], check=True, timeout=300
    )
    found = sorted(folder.iterdir())
    assert [file.name for file in found] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_a_model_in_pieces_is_the_model_in_one_file(pieces: list[Path], tmp_path: Path) -> None:
    expected = write(tmp_path / "whole.gguf", Type.Q8_0, tied=False)
    whole = open_source(tmp_path / "whole.gguf")
    for path in (*pieces, pieces[0].parent):
        opened = open_pretrained(str(path), None, None)
        assert opened.source.shapes == whole.shapes and opened.tokenizer.encode("ab a")
        for name, weight in expected.items():
            np.testing.assert_array_equal(opened.source.read(name), weight)
        assert hash_base(opened.source, "base") == hash_base(whole, "base")
        assert base_fingerprint(opened.source) == base_fingerprint(whole)


def test_a_piece_that_is_missing_or_another_is_named(pieces: list[Path]) -> None:
    one, two, three = pieces
    held = two.rename(two.with_name("away"))
    with pytest.raises(ModelError, match=r"m-00002-of-00003.gguf is missing or no GGUF file, piece 2 of 3"):
        GGUFFile(one)
    shutil.copyfile(three, two)
    with pytest.raises(ModelError, match=r"m-00002-of-00003.gguf is not piece 2 of 3 of m-00001-of-00003.gguf"):
        GGUFFile(three)
    two.write_bytes(held.read_bytes()[:-200])
    with pytest.raises(ModelError, match=r"truncated or damaged \(m-00002-of-00003.gguf: tensor .* ends beyond"):
        GGUFFile(one)
    held.rename(two)
    with pytest.raises(ModelError, match=r"other.gguf is one of 3 pieces, and is not called ...-0000N-of-00003.gguf"):
        GGUFFile(one.rename(one.with_name("other.gguf")))


def write_raw(path: Path, kind: Type) -> dict[str, tuple[np.ndarray, int]]:
    """A model of one layer of width 256 whose matrices are random bytes in a kind; those bytes, and their heads."""
    matrices = {
        **{"attn_q": 4, "attn_k": 2, "attn_v": 0, "attn_output": 0, "ffn_gate": 0, "ffn_up": 0, "ffn_down": 0},
    }
    rng = np.random.default_rng(int(kind))
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    writer = GGUFWriter(path, "llama")
    sizes = {"embedding_length": 256, "feed_forward_length": 256, "rope.dimension_count": 64, "block_count": 1}
    for name, value in (LLAMA | sizes).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"llama.{name}", value)
    vocab = len(GPT2["tokens"])
    writer.add_tensor("token_embd.weight", np.zeros((vocab, 256), np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    found = {}
    for name, heads in matrices.items():
        rows = 128 if name in ("attn_k", "attn_v") else 256
        raw = rng.integers(0, 256, (rows, 256 // per_block * block_bytes), np.uint8)
        writer.add_tensor(f"blk.0.{name}.weight", permute(raw, heads) if heads else raw, raw_dtype=kind)
        found[name] = raw
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


KINDS = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"]


@pytest.mark.parametrize("kind", [*KINDS, "MXFP4", "NVFP4"])
def test_kinds_without_a_quantiser_are_read_as_the_gguf_package_reads_them(kind: str, tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "m.gguf", Type[kind])
    file = GGUFFile(tmp_path / "m.gguf")
    names = dict(zip(raw, ("q", "k", "v", "o", "gate", "up", "down"), strict=True))
    with np.errstate(all="ignore"):  # random bytes are infinite scales, too
        for stored, name in names.items():
            module = "mlp" if stored.startswith("ffn") else "self_attn"
            found = file.read(f"model.layers.0.{module}.{name}_proj.weight")
            np.testing.assert_array_equal(found, dequantize(raw[stored], Type[kind]))
            assert np.isfinite(found).mean() > 0.5 and found.any()


@pytest.mark.parametrize("kind", ["Q8_K", "Q8_1", "Q1_0"])
def test_a_kind_that_cannot_be_dequantised_is_named(kind: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "m.gguf", Type[kind])
    with pytest.raises(ModelError, match=rf"in the type {kind}, which cannot be dequantised; use a file of another"):
        GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(("number", "named"), [(31, "Q4_0_4_4, .*F16.$"), (977, "with the number 977, .* -U gguf.$")])
def test_a_kind_that_is_not_known_is_named(number: int, named: str, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Type.Q8_0)
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    name = b"blk.0.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert int.from_bytes(data[at : at + 4], "little") == Type.Q8_0
    data[at : at + 4] = number.to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=f"has blk.0.attn_v.weight in the type {named}"):
        GGUFFile(tmp_path / "m.gguf")
