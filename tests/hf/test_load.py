"""Bases on the way to the devices: the same model over any mesh and processes, in bounded memory, by what it says."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import GPT2
from gguf_files import write as write_gguf
from parity import open_base
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from synthetic import MEASURE, write_llama
from tiny import copy_folder, make_llama

from jlora.errors import ModelError
from jlora.hf import source as bases
from jlora.hf.architecture import parse_config
from jlora.hf.load import load_base
from jlora.hf.names import name_table
from jlora.hf.source import base_fingerprint, open_source
from jlora.model.sharding import one_device_mesh

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"
KEY = "model.layers.1.mlp.up_proj.weight"

# What the two scripts share: the leaves as they must be, made from whole tensors without the loader.
EXPECTED = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jlora.config import MeshSection
from jlora.errors import UserError
from jlora.hf import share
from jlora.hf.architecture import parse_config
from jlora.hf.source import open_source
from jlora.hf.load import load_base
from jlora.hf.names import name_table
from jlora.model.sharding import make_mesh, named_sharding

def expected(folder, dtype):
    source = open_source(Path(folder))
    leaves = {}
    for name, entry in name_table(parse_config(source.config, folder)).items():
        array = source.read(name)
        leaf = (array.T if entry.transposed else array).reshape(entry.shape).astype(dtype)
        leaves.setdefault(entry.leaf, []).append(leaf if entry.layer is None else leaf[None])
    return {leaf: np.concatenate(parts) for leaf, parts in leaves.items()}

def param(decoder, leaf):
    return getattr(decoder.layers if hasattr(decoder.layers, leaf) else decoder, leaf)

def compare(decoder, right, mesh):
    for leaf, array in right.items():
        found = param(decoder, leaf).get_raw_value()
        assert found.sharding == named_sharding(mesh, param(decoder, leaf).axes), leaf
        assert found.shape == array.shape and found.dtype == array.dtype, leaf
        for shard in found.addressable_shards:
            wanted = np.ascontiguousarray(array[shard.index])
            assert np.asarray(shard.data).tobytes() == wanted.tobytes(), (leaf, shard.index)
"""

MESHES = """
folders, mesh_sizes = json.loads(sys.argv[1]), json.loads(sys.argv[2])
share.BLOCK_WEIGHTS = 3000  # blocks of a few rows, of which the last overlaps the one before it
hashes = {}
for folder, dtype in folders.items():
    right = expected(folder, jnp.dtype(dtype))
    for sizes in mesh_sizes:
        mesh = make_mesh(MeshSection(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])
        decoder, digest = load_base(open_source(Path(folder)), folder, jnp.dtype(dtype), mesh)
        compare(decoder, right, mesh)
        hashes.setdefault(folder, set()).add(digest)
try:
    mesh = make_mesh(MeshSection(fsdp=1, tensor=8), jax.devices())
    load_base(open_source(Path(folder)), folder, jnp.dtype(dtype), mesh)
except UserError as error:
    refusal = str(error)
print(json.dumps({"hashes": {k: list(v) for k, v in hashes.items()}, "refusal": refusal}))
"""

PROCESSES = """
port, rank, folder, sizes, damaged = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), sys.argv[5]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
mesh = make_mesh(MeshSection(**sizes), jax.devices())

class Counted:
    def __init__(self, folder):
        self.source, self.parts, self.bytes = open_source(Path(folder)), 0, 0
        self.config, self.model, self.shapes = self.source.config, self.source.model, self.source.shapes
        self.dtypes, self.sizes = self.source.dtypes, self.source.sizes
        self.stored_codes = self.source.stored_codes
    def part(self, name, rows, columns):
        found = self.source.part(name, rows, columns)
        self.parts += found.nbytes
        return found
    def stored(self, name, start, stop):
        self.bytes += stop - start
        return self.source.stored(name, start, stop)

source = Counted(folder)
decoder, digest = load_base(source, folder, jnp.dtype("bfloat16"), mesh)
right = expected(folder, jnp.dtype("bfloat16"))
compare(decoder, right, mesh)
held = {
    (leaf, str(shard.index)): shard.data.size
    for leaf in right for shard in param(decoder, leaf).get_raw_value().addressable_shards
}
try:
    load_base(open_source(Path(damaged)), damaged, jnp.dtype("bfloat16"), mesh)
except UserError as error:
    refusal = str(error)
print(json.dumps({
    "hash": digest, "parts": source.parts, "held": sum(held.values()), "hashed": source.bytes, "refusal": refusal,
}))
"""


def start(code: str, *args: str, devices: int = 8) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_NUM_CPU_DEVICES": str(devices)} if devices else {}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> dict:
    """The JSON that a process ends with."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.splitlines()[-1])


def stored_as(folder: Path, new: Path, dtype: torch.dtype) -> Path:
    copy_folder(folder, new)
    tensors = {name: tensor.to(dtype) for name, tensor in load_torch(folder / WEIGHTS).items()}
    save_torch(tensors, new / WEIGHTS, metadata={"format": "pt"})
    return new


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    make_llama(folder)
    return folder


# The same model, whoever reads it


@pytest.mark.long
def test_every_mesh_holds_the_same(single, tmp_path):
    make_llama(tmp_path / "tied", tie_word_embeddings=True)
    make_llama(tmp_path / "sharded", shard="100KB")
    even = {"tokens": [*GPT2["tokens"], "xyz"], "token_type": [*GPT2["token_type"], 1]}  # a vocabulary that divides
    write_gguf(tmp_path / "q4.gguf", GGMLQuantizationType.Q4_1, tied=False, tokenizer=even)
    folders = {
        stored_as(tmp_path / "tied", tmp_path / "tied_bf16", torch.bfloat16): "bfloat16",
        stored_as(single, tmp_path / "f16", torch.float16): "float32",
        tmp_path / "sharded": "bfloat16",
        tmp_path / "q4.gguf": "float32",
    }
    sizes = [(1, 1, 1), (1, 8, 1), (2, 2, 2)]
    meshes = [dict(zip(("data", "fsdp", "tensor"), size, strict=True)) for size in sizes]
    args = json.dumps({str(folder): dtype for folder, dtype in folders.items()}), json.dumps(meshes)
    found = finish(start(EXPECTED + MESHES, *args))
    assert [len(hashes) for hashes in found["hashes"].values()] == [1] * len(folders)
    assert len({hashes[0] for hashes in found["hashes"].values()}) == len(folders)
    assert "mesh.tensor=8 does not divide" in found["refusal"] and "\n" not in found["refusal"]


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes", [pytest.param({"fsdp": 4}, marks=pytest.mark.slow), {"fsdp": 2, "tensor": 2}], ids=str
)
def test_two_processes(sizes, single, tmp_path):
    """Each reads its devices' share and no more, and hashes its half; what one refuses, both do."""
    damaged = copy_folder(single, tmp_path / "damaged")
    tensors = load_torch(single / WEIGHTS)
    tensors["model.layers.0.self_attn.q_proj.weight"][-1, -1] = torch.nan  # of the second process alone
    save_torch(tensors, damaged / WEIGHTS, metadata={"format": "pt"})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    args = (str(single), json.dumps(sizes), str(damaged))
    started = [start(EXPECTED + PROCESSES, port, str(rank), *args, devices=0) for rank in range(2)]
    found = [finish(process) for process in started]
    assert {one["hash"] for one in found} == {open_base(single)[1]}
    source = open_source(single)
    assert sum(one["hashed"] for one in found) == sum(source.sizes.values())
    for rank, one in enumerate(found):
        assert one["parts"] == 4 * one["held"]  # float32 in the file
        assert one["hashed"] == sum(source.sizes[name] for name in list(name_table_of(source))[rank::2])
    assert "refused by another process" in found[0]["refusal"]
    assert "q_proj.weight holds NaN or infinity" in found[1]["refusal"]


QUANTIZED = """
import hashlib
port, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
share.BLOCK_WEIGHTS = 30_000
found = []
for kind, sizes in (("nf4", {"fsdp": 4}), ("int8", {"fsdp": 4}), ("nf4", {"fsdp": 2, "tensor": 2})):
    mesh = make_mesh(MeshSection(**sizes), jax.devices())
    decoder, digest = load_base(open_source(Path(folder)), folder, jnp.dtype("bfloat16"), mesh, kind)
    for number, leaf in enumerate(jax.tree.leaves(decoder)):
        for shard in leaf.addressable_shards:
            cut = [one.indices(dim)[:2] for one, dim in zip(shard.index, leaf.shape)]
            found.append((kind, number, cut, hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()))
print(json.dumps({"shards": found, "hash": digest}))
"""


@pytest.mark.slow
def test_two_processes_quantise_as_one_does(tmp_path):
    """Though neither has all blocks of a projection, nor, of a channel's inputs, those that the other keeps."""
    width = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    make_llama(tmp_path / "base", **width, head_dim=64, num_hidden_layers=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [start(EXPECTED + QUANTIZED, port, str(rank), str(tmp_path / "base"), devices=0) for rank in range(2)]
    found = [finish(process) for process in started]
    assert {one["hash"] for one in found} == {open_base(tmp_path / "base")[1]}
    source = open_source(tmp_path / "base")
    for kind in ("nf4", "int8"):
        base, _ = load_base(source, "base", np.dtype(ml_dtypes.bfloat16), one_device_mesh(), kind)
        whole = leaves(base)
        shards = [shard for one in found for shard in one["shards"] if shard[0] == kind]
        assert {number for _, number, _, _ in shards} == set(range(len(whole)))
        for _, number, cut, digest in shards:
            right = np.ascontiguousarray(whole[number][tuple(slice(*one) for one in cut)])
            assert hashlib.sha256(right.tobytes()).hexdigest() == digest, (kind, number, cut)


def name_table_of(source):
    return name_table(parse_config(source.config, "here"))


def test_hash_by_its_definition(single):
    tensors = load_file(single / WEIGHTS)
    digest = hashlib.sha256()
    for name in name_table_of(open_source(single)):
        digest.update(f"{name} F32 {tensors[name].shape} ".encode())
        digest.update(hashlib.sha256(tensors[name].tobytes()).digest())
    assert open_base(single)[1] == digest.hexdigest()


def test_parts_are_parts_of_the_whole(single, tmp_path):
    write_gguf(tmp_path / "q4.gguf", GGMLQuantizationType.Q4_1)
    for path, heads in ((single, 10), (tmp_path / "q4.gguf", 16)):
        source = open_source(path)
        for name, shape in source.shapes.items():
            whole = source.read(name).reshape(-1, shape[-1])
            last = len(whole) // heads * heads
            for rows in ((0, len(whole)), (heads if last > heads else 0, last)):
                for columns in ((0, shape[-1]), (1, 7), (31, 40)):
                    found = source.part(name, rows, columns)
                    np.testing.assert_array_equal(found, whole[slice(*rows), slice(*columns)], err_msg=name)


# Memory


def measured(folder: Path, small: Path, sizes: dict[str, int], largest: int, *kind: str) -> dict:
    """The peak that loading added to the process, against what the devices hold; they are host memory here."""
    found = finish(start(MEASURE, str(small), str(folder), json.dumps(sizes), *kind))
    over = found["peak"] - found["devices"]
    print(f"{sizes}: {found}, {over / 1e6:.0f} MB over the devices' bytes, 1.5 largest {1.5 * largest / 1e6:.0f} MB")
    assert over <= 1.5 * largest
    return found


SIZES = [{"fsdp": 1}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.long
def test_memory_is_bounded(tmp_path):
    write_llama(tmp_path / "small", 256, 2, 512)
    total, largest = write_llama(tmp_path / "base", 1024, 4)
    for sizes in SIZES:
        found = measured(tmp_path / "base", tmp_path / "small", sizes, largest)
        assert found["devices"] >= total


@pytest.mark.slow
def test_memory_is_bounded_at_two_gigabytes(tmp_path):
    """Llama-2-7B at half its width and half its depth."""
    write_llama(tmp_path / "small", 256, 2, 512)
    total, largest = write_llama(tmp_path / "base", 2048, 16)
    hashes = {measured(tmp_path / "base", tmp_path / "small", sizes, largest)["hash"] for sizes in SIZES}
    # Quantised on the way: what the devices hold and 1.5 tensors are less than half of the base whole.
    quantized = measured(tmp_path / "base", tmp_path / "small", SIZES[0], largest, "nf4")
    assert quantized["peak"] < total / 2 and hashes == {quantized["hash"]}


# Files that are not as they say


def with_header(folder: Path, new: Path, change, pad: int = 0) -> Path:
    """A copy whose safetensors header went through `change`, with `pad` spaces behind it."""
    copy_folder(folder, new)
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * ((8 - len(text)) % 8 + pad)
    (new / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    return new


@pytest.mark.parametrize("pad", [0, 1, 2, 7])
def test_header_of_any_length(pad, single, tmp_path):
    """Then the weights lie at addresses that are no multiple of their size."""
    folder = with_header(single, tmp_path / "odd", lambda header: None, pad)
    (one, one_hash), (odd, odd_hash) = open_base(single, "bfloat16"), open_base(folder, "bfloat16")
    assert one_hash == odd_hash
    for leaf, other in zip(*map(leaves, (one, odd)), strict=True):
        np.testing.assert_array_equal(leaf, other)


def leaves(decoder):
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(decoder)]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.update(data_offsets=[tensor["data_offsets"][0], tensor["data_offsets"][1] - 4]),
        lambda tensor: tensor.update(data_offsets=[x + 4 for x in tensor["data_offsets"]]),
        lambda tensor: tensor.update(data_offsets=[x + 10**9 for x in tensor["data_offsets"]]),
        lambda tensor: tensor.update(data_offsets=[-4, tensor["data_offsets"][1]]),
        lambda tensor: tensor.update(dtype="F16"),
        lambda tensor: tensor.update(dtype="F64"),
        lambda tensor: tensor.update(shape=[tensor["shape"][0] + 1, *tensor["shape"][1:]]),
    ],
)
def test_lying_header(change, single, tmp_path):
    folder = with_header(single, tmp_path / "bad", lambda header: change(header[KEY]))
    with pytest.raises(ModelError, match="cut short or damaged") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_file_cut_after_it_was_opened(single, tmp_path):
    folder = copy_folder(single, tmp_path / "cut")
    write_gguf(tmp_path / "cut.gguf")
    for path, file in ((folder, folder / WEIGHTS), (tmp_path / "cut.gguf", tmp_path / "cut.gguf")):
        source = open_source(path)
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(ModelError, match="changed while it was being read"):
            for name in source.shapes:
                source.read(name)


# The quick identity


def test_fingerprint(single, tmp_path):
    make_llama(tmp_path / "seed", seed=1)
    copy, changed = copy_folder(single, tmp_path / "copy"), copy_folder(single, tmp_path / "changed")
    tensors = load_torch(single / WEIGHTS)
    tensors["model.embed_tokens.weight"][150:] += 1
    save_torch(tensors, changed / WEIGHTS, metadata={"format": "pt"})
    config = copy_folder(single, tmp_path / "config")
    text = (config / "config.json").read_text()
    (config / "config.json").write_text(text.replace("523.0", "524.0"))
    stored = stored_as(single, tmp_path / "bf16", torch.bfloat16)
    write_gguf(tmp_path / "q4.gguf", GGMLQuantizationType.Q4_1)
    write_gguf(tmp_path / "q8.gguf", GGMLQuantizationType.Q8_0)
    others = [tmp_path / "seed", changed, config, stored, tmp_path / "q4.gguf", tmp_path / "q8.gguf"]
    found = [base_fingerprint(open_source(path)) for path in (single, *others)]
    assert base_fingerprint(open_source(copy)) == found[0]
    assert len(set(found)) == len(found) and all(len(one) == 64 for one in found)


def test_fingerprint_reads_little(single, monkeypatch):
    source, read = open_source(single), []

    def stored(name, start, stop, inner=source.stored):
        read.append((name, start, stop))
        return inner(name, start, stop)

    monkeypatch.setattr(source, "stored", stored)
    monkeypatch.setattr(source, "part", Mock(side_effect=AssertionError))
    monkeypatch.setattr(bases, "SAMPLE_BYTES", 64)
    base_fingerprint(source)
    assert len(read) <= 8 * len(source.shapes) and all(0 < stop - start <= 64 for _, start, stop in read)
    spread = [start for name, start, _ in read if name == KEY]
    assert len(spread) == 8 and spread[0] == 0 and spread[-1] == source.sizes[KEY] - 64


def test_bfloat16_is_read_as_it_is(single, tmp_path):
    folder = stored_as(single, tmp_path / "bf16", torch.bfloat16)
    found = open_source(folder).read(KEY)
    assert found.dtype == ml_dtypes.bfloat16 and found.flags.writeable
    np.testing.assert_array_equal(found.astype(np.float32), load_torch(folder / WEIGHTS)[KEY].float().numpy())
