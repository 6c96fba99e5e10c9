"""Folders that hold more than one model's weights are what transformers takes them for, or are refused by name."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from grown_adapters import grown, make_run
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from safetensors.torch import load_file, save_file
from tiny import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

from jlora.errors import ModelError
from jlora.files.atomic import new_folder
from jlora.hf import verify
from jlora.hf.load import hash_base
from jlora.hf.planned import model_shape
from jlora.hf.pretrained import load_pretrained, open_pretrained
from jlora.hf.source import SafetensorsFolder, base_fingerprint, open_source
from jlora.hf.weights import Stored
from jlora.model.sharding import one_device_mesh
from jlora.training.export import export

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "base"
    make_llama(folder, tie_word_embeddings=True)
    make_tokenizer(folder)
    return folder


def with_head(tied: Path, folder: Path, head, table=None) -> Path:
    """A copy whose file has a head, too, made of the embedding."""
    shutil.copytree(tied, folder)
    tensors = load_file(folder / WEIGHTS)
    tensors[TABLE] = tensors[TABLE] if table is None else table(tensors[TABLE])
    tensors[HEAD] = head(tensors[TABLE]).clone().contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def one_step(weight: torch.Tensor) -> torch.Tensor:
    """One number of it is the next float32."""
    weight = weight.clone()
    weight[7, 3] = torch.nextafter(weight[7, 3], torch.tensor(9.0))
    return weight


def other(weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2


def one_row(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight[:-1], -weight[-1:]])


# As transformers has them: tied where the numbers are the same as float32, whatever they are stored as.
HEADS = {
    "equal": (lambda e: e, None, True),
    "equal, wider": (lambda e: e.double(), None, True),
    "bfloat16 of bfloat16": (lambda e: e.float(), lambda e: e.bfloat16(), True),
    "bfloat16 copy": (lambda e: e.bfloat16(), None, False),
    "one number": (one_step, None, False),
    "one row": (one_row, None, False),
    "other": (other, None, False),
}


@pytest.mark.long
@pytest.mark.parametrize("name", HEADS)
def test_a_tied_head_of_other_values_is_a_head_of_its_own(name, tied, tmp_path, capsys):
    head, table, stays = HEADS[name]
    folder = with_head(tied, tmp_path / "base", head, table)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == stays
    capsys.readouterr()
    (base, base_hash), tokens = open_base(folder), random_tokens(300)
    warning = capsys.readouterr().err
    assert base.cfg.tie_word_embeddings == stays == (warning == "")
    assert stays or ("warning: " in warning and "not tied" in warning and warning.count("\n") == 1)
    assert_close(logits(base, {}, tokens), torch_logits(model, tokens), 1e-4)
    # Who plans and who merges sees the same model, and the hash is of the weights that are used.
    assert model_shape(str(folder)) == base.cfg and hash_base(open_source(folder), "base") == base_hash
    if table is None:
        assert (base_hash == open_base(tied)[1]) == stays


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (lambda e: torch.cat([e, e[:4]]), "1 misshapen (lm_head.weight [304, 48] instead of [300, 48])"),
        (lambda e: e[:-1], "1 misshapen (lm_head.weight [299, 48] instead of [300, 48])"),
        (lambda e: torch.full_like(e, float("nan")), "lm_head.weight holds NaN"),
        (
            lambda e: torch.where(torch.arange(300)[:, None] == 3, float("inf"), e),
            "lm_head.weight holds NaN or infinity",
        ),
    ],
)
def test_a_tied_head_that_transformers_cannot_use_is_refused(head, words, tied, tmp_path):
    folder = with_head(tied, tmp_path / "base", head)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert not np.isfinite(torch_logits(model, random_tokens(300))).all()
    except RuntimeError as error:
        assert "ignore_mismatched_sizes" in str(error)
    with pytest.raises(ModelError) as refused:
        open_base(folder)
    assert words in str(refused.value)


def test_a_run_on_another_head_is_exported_and_merged_with_it(tied, tmp_path):
    folder = with_head(tied, tmp_path / "base", other)
    make_run(tmp_path / "run", folder)
    result = export(tmp_path / "run", tmp_path / "adapter", None, False, None, True)
    assert result["peft_relative_difference"] < 1e-4 and result["base_read_by"] == "transformers"
    export(tmp_path / "run", tmp_path / "merged", None, True, "float32", False)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    held, given = load_file(tmp_path / "merged" / WEIGHTS), load_file(folder / WEIGHTS)
    assert torch.equal(held[HEAD], given[HEAD]) and torch.equal(held[TABLE], given[TABLE])


def misread(monkeypatch, how: str) -> None:
    """jlora as it would be with a fault in its reading of a base."""
    if how == "drops a head":
        monkeypatch.setattr(SafetensorsFolder, "_has_other_head", lambda self: False)
    else:
        honest = SafetensorsFolder.part

        def part(self, name, rows, columns):
            return honest(self, name.replace("layers.1.mlp.up", "layers.1.mlp.gate"), rows, columns)

        monkeypatch.setattr(SafetensorsFolder, "part", part)


@pytest.mark.parametrize("how", ["drops a head", "mistakes a tensor"])
def test_verify_sees_a_base_that_was_misread(how, tied, tmp_path, monkeypatch):
    folder = with_head(tied, tmp_path / "base", other)
    misread(monkeypatch, how)
    float32, mesh = jnp.dtype("float32"), one_device_mesh()
    pretrained = load_pretrained(open_pretrained(str(folder), None, None), float32, mesh)
    section, adapter = grown(pretrained)
    with pytest.raises(ModelError, match="logits that differ") as refused, new_folder(tmp_path / "out") as made:
        verify.write_adapter(made, adapter, section, pretrained, float32, mesh)
        verify.compare_with_peft(made, adapter, pretrained)
    assert refused.value.exit_code == 4 and not (tmp_path / "out").exists()


# Two models in one folder


def add_shards(folder: Path, seed: int, twice: bool = False) -> None:
    """Another model in two shards with an index; `twice`: a tensor of the first lies in the second, too, as another."""
    tensors = {name: one * (1 + seed / 10) for name, one in load_file(folder / WEIGHTS).items()}
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = sorted(tensors)
    parts = names[::2], names[1::2]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    if twice:
        more = load_file(folder / files[1]) | {names[0]: tensors[names[0]] * 1.5}
        save_file(more, folder / files[1], {"format": "pt"})
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stale_shards(folder: Path) -> None:
    add_shards(folder, 1)


def index_without_shards(folder: Path) -> None:
    add_shards(folder, 1)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()


def damaged_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map')


def shards_alone(folder: Path) -> None:
    add_shards(folder, 1)
    (folder / WEIGHTS).unlink()


def a_tensor_in_two_shards(folder: Path) -> None:
    add_shards(folder, 1, twice=True)
    (folder / WEIGHTS).unlink()


def two_indexes(folder: Path) -> None:
    shards_alone(folder)
    torch.save(load_file(folder / "model-00001-of-00002.safetensors"), folder / "pytorch_model-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')


def pickle_beside(folder: Path) -> None:
    torch.save({name: one * 2 for name, one in load_file(folder / WEIGHTS).items()}, folder / "pytorch_model.bin")


def consolidated_beside(folder: Path) -> None:
    others = {name: one * 2 for name, one in load_file(folder / WEIGHTS).items()}
    save_file(others, folder / "consolidated.safetensors", {"format": "pt"})


FOLDERS = (
    *(stale_shards, index_without_shards, damaged_index, shards_alone, a_tensor_in_two_shards, two_indexes),
    *(pickle_beside, consolidated_beside),
)


@pytest.mark.long
@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
def test_of_two_models_the_one_that_transformers_takes(change, tied, tmp_path):
    folder = shutil.copytree(tied, tmp_path / "base")
    change(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (base, base_hash), tokens = open_base(folder), random_tokens(300)
    assert_close(logits(base, {}, tokens), torch_logits(model, tokens), 1e-4)
    # Fingerprint, hash and merge look at what is read.
    alone = shutil.copytree(folder, tmp_path / "alone")
    others = {"pytorch_model*", "consolidated*"} | ({INDEX, "model-*"} if (alone / WEIGHTS).is_file() else set())
    for file in (file for pattern in others for file in alone.glob(pattern)):
        file.unlink()
    source, clean = open_source(folder), open_source(alone)
    assert base_fingerprint(source) == base_fingerprint(clean) and base_hash == open_base(alone)[1]
    assert_close(
        verify.streamed_logits(base.cfg, Stored(source), {}), verify.probe_logits(base, {}, jnp.dtype("float32")), 1e-4
    )


def test_what_makes_transformers_load_another_model_is_refused(tied, tmp_path):
    folder = shutil.copytree(tied, tmp_path / "base")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_weights": "new.safetensors"}))
    with pytest.raises(ModelError, match="transformers_weights='new.safetensors'.*rename the file"):
        open_source(folder)
    shutil.copyfile(tied / "config.json", config)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter_config.json, an adapter that transformers would add.*move"):
        open_source(folder)


@pytest.mark.long
def test_pickled_weights_are_refused_with_the_command_that_converts_them(tmp_path):
    folder = tmp_path / "it's a base"
    model = make_llama(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"its .bin files are pickled, so convert them to safetensors once") as refused:
        open_source(folder)
    program, *arguments = shlex.split(str(refused.value).rpartition("is installed: ")[2])
    assert program == "python"
    subprocess.run([sys.executable, *arguments], check=True, timeout=300)
    source = open_source(folder)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(source.read(name), tensor.numpy())
