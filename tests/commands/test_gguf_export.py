"""`jlora export --gguf`: one file of base and adapter, what it keeps of the gain, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import one_sentence, shell
from hub_server import hub_server, pushed
from tiny import copy_folder, make_llama, make_rows, make_tokenizer, write_config

from jlora.hf.gguf import GGUFFile
from jlora.hf.gguf_vocabulary import vocabulary_of
from jlora.hf.gguf_writer import write_gguf
from jlora.hf.names import name_table
from jlora.hf.pretrained import open_tokenizer
from jlora.hf.source import open_source
from jlora.hf.weights import Stored


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run over a base whose tokenizer has merges, as llama.cpp wants it."""
    folder = tmp_path_factory.mktemp("world")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}  # in whole blocks
    make_llama(folder / "base", max_position_embeddings=512, **sizes)
    make_rows(folder / "rows.jsonl")
    make_rows(folder / "eval.jsonl", 6, first=100)
    make_tokenizer(folder / "base", merges=(("l", "u"), ("b", "lu"), ("blu", "e")))
    paths = (folder / name for name in ("config.yaml", "base", "rows.jsonl", "run"))
    data = {"max_length": 320, "eval": str(folder / "eval.jsonl")}
    write_config(*paths, data=data, training={"save_every": 2, "eval_every": 2})
    done = shell("train", "--config", folder / "config.yaml", "-q")
    assert done.returncode == 0, done.stderr
    return folder


def test_file_computes_what_the_run_does(world, here, tmp_path):
    """Read by jlora, and by transformers, beside PEFT's merged model; the loss is the run's own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    file = tmp_path / "m.gguf"
    arguments = ("export", "--adapter", world / "run", "--gguf", file, "--quantize", "f32", "--json", "-q")
    code, out, err = here(*arguments)
    assert (code, err) == (0, "")
    result, summary = json.loads(out), json.loads((world / "run" / "summary.json").read_text())
    assert (result["step"], result["quantize"], result["bytes"]) == (4, "F32", file.stat().st_size)
    assert result["cross_entropy_base"] == pytest.approx(summary["eval_loss_before"], rel=1e-5)
    assert result["cross_entropy_trained"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert result["cross_entropy_file"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert result["gain_kept"] == pytest.approx(1.0, abs=1e-3) and result["logits_relative_difference"] < 1e-5

    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, world / "run" / "adapter").merge_and_unload().eval()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        np.testing.assert_allclose(read(tokens).logits, merged(tokens).logits, rtol=0, atol=1e-4)
    rows = ("--data", world / "eval.jsonl", "--format", "alpaca", "--max-length", 320, "--dtype", "float32", "--json")
    code, out, err = here("evaluate", "--base", file, *rows)
    assert (code, err) == (0, "")
    assert json.loads(out)["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)


def test_file_that_keeps_too_little_is_not_written(world, here, tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    arguments = ("export", "--adapter", world / "run", "--gguf", file, "--quantize", "Q4_0")
    names = ("cross_entropy_base", "cross_entropy_trained", "cross_entropy_file", "gain_kept")
    kept = {"Q4_0": 0.75, "Q4_1": 0.5, "Q5_0": 0.9}

    def figures(gain, written):
        share = kept[written.dtypes["model.layers.0.self_attn.o_proj.weight"]]
        return dict(zip(names, (3.0, 2.0, 3.0 - share, share), strict=True))

    monkeypatch.setattr("jlora.training.gguf_export.figures", figures)
    code, _, err = here(*arguments)
    assert code == 4 and list(tmp_path.iterdir()) == []
    assert one_sentence(err).endswith(
        "m.gguf: in Q4_0 the model keeps 75% of what training gained (loss 3.0000 before, 2.0000 after, 2.2500 in the "
        "file), and --min-gain asks for 80%; write --quantize Q5_0, which keeps it"
    )
    code, out, err = here(*arguments, "--min-gain", "0.75")
    assert code == 0 and "it keeps 75% of what training gained" in out
    assert (tmp_path / "m.Modelfile").read_text().startswith("FROM ./m.gguf\nTEMPLATE")
    file.unlink()
    code, out, err = here(*arguments, "--min-gain", "0")  # somebody may have written in it
    assert code == 2 and "m.Modelfile is there already" in one_sentence(err) and not file.exists()
    (tmp_path / "m.Modelfile").unlink()
    code, out, err = here(*arguments, "--min-gain", "0")
    assert code == 0 and "in Q4_0" in out and "training gained" not in out
    assert set(GGUFFile(file).dtypes.values()) == {"Q4_0", "Q8_0", "F32"}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "m.Modelfile", file]


def test_adapter_alone_in_llama_cpp(world, here, tmp_path):
    """The base in GGUF with the adapter computes what the merged file does, and greedy answers are jlora's."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    code, out, err = here("export", "--adapter", world / "run", "--gguf-adapter", tmp_path / "a.gguf", "--json", "-q")
    assert (code, err) == (0, "") and json.loads(out)["kind"] == "gguf adapter"
    common = ("--quantize", "F32", "--min-gain", "0", "-q")
    assert here("export", "--adapter", world / "run", "--gguf", tmp_path / "m.gguf", *common)[0] == 0
    base = open_source(world / "base")
    vocabulary = vocabulary_of(open_tokenizer(str(world / "base"), None), None, 300, [], "m.gguf")
    write_gguf(tmp_path / "base.gguf", base.model, base.config, Stored(base), vocabulary, "F32")
    options = {"n_ctx": 512, "logits_all": True, "verbose": False, "n_threads": 1, "type_k": 0, "type_v": 0}
    bare, adapted, merged = (
        llama_cpp.Llama(str(tmp_path / name), **options, **more)
        for name, more in (
            *(("base.gguf", {}), ("base.gguf", {"lora_path": str(tmp_path / "a.gguf")})),
            ("m.gguf", {}),
        )
    )
    prompt = [1, *range(3, 60)]
    for model in (bare, adapted, merged):
        model.eval(prompt)
    scores = [np.array(model.scores[: len(prompt)]) for model in (bare, adapted, merged)]
    scale = np.sqrt((scores[2] ** 2).mean())
    assert np.sqrt(((scores[1] - scores[2]) ** 2).mean()) < 1e-5 * scale
    assert np.sqrt(((scores[0] - scores[2]) ** 2).mean()) > 1e-2 * scale
    asked = ("--prompt", "Say blue", "--format", "completion", "--max-new-tokens", "24", "--dtype", "float32", "-q")
    code, answer, _ = here("generate", "--adapter", world / "run", *asked)
    ids = merged.tokenize(b"Say blue", add_bos=True)
    grown = [token for token, _ in zip(merged.generate(ids, temp=0.0), range(24), strict=False)]
    ended = grown.index(2) if 2 in grown else len(grown)
    assert code == 0 and merged.detokenize(grown[:ended]).decode(errors="replace") == answer.rstrip("\n")


@pytest.mark.long
def test_file_is_pushed_with_modelfile_and_card(world, tmp_path):
    file = tmp_path / "m.gguf"
    with hub_server() as (hub, url):
        done = pushed(url, "--adapter", world / "run", "--gguf", file, "--min-gain", "0", "--push", "me/mine", "--json")
    assert done.returncode == 0, done.stderr
    there = hub.files["me/mine"]
    assert there["m.gguf"] == file.read_bytes() and there["m.Modelfile"] == file.with_suffix(".Modelfile").read_bytes()
    assert there["README.md"] == file.with_suffix(".md").read_bytes() and b"ollama create m -f" in there["README.md"]


@pytest.mark.long
def test_kinds_of_llama_quantize(world, here, tmp_path):
    """By llama.cpp's own program, read back by ours: each weight within the rounding of 4 bits."""
    if shutil.which("llama-quantize") is None:
        pytest.skip("llama-quantize is not installed")
    weights = []
    for kind in ("F32", "IQ4_NL"):
        file = tmp_path / f"{kind}.gguf"
        code, out, err = here(
            "export", "--adapter", world / "run", "--gguf", file, "--min-gain", "0", "--quantize", kind, "--json", "-q"
        )
        assert (code, err) == (0, "") and json.loads(out)["logits_relative_difference"] < 1
        weights.append(GGUFFile(file))
    assert "IQ4_NL" in weights[1].dtypes.values()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("F32.Modelfile", "F32.gguf", "IQ4_NL.Modelfile", "IQ4_NL.gguf")
    ]
    table = name_table(weights[0].model)
    for name, entry in table.items():
        rows = entry.hf_shape[0] if len(entry.hf_shape) == 2 else 1
        whole, rounded = (Stored(file).rows(name, entry, 0, rows) for file in weights)
        assert np.sqrt(((whole - rounded) ** 2).mean()) < 0.12 * np.sqrt((whole**2).mean()), name


@pytest.mark.long
def test_adapter_that_llama_cpp_cannot_hold_is_refused(world, here, tmp_path):
    for key, value, says in (
        ("use_dora", True, "DoRA's magnitudes, which llama.cpp's adapters cannot hold"),
        ("modules_to_save", ["lm_head"], "lm_head itself, which llama.cpp's adapters cannot hold"),
    ):
        run = tmp_path / key
        write_config(tmp_path / "c.yaml", world / "base", world / "rows.jsonl", run, lora={key: value})
        assert here("train", "--config", tmp_path / "c.yaml", "-q")[0] == 0
        code, _, err = here("export", "--adapter", run, "--gguf-adapter", tmp_path / "a.gguf")
        assert code == 4 and says in one_sentence(err) and not list(tmp_path.glob("*.gguf"))


def test_rows_that_are_gone_are_said_to_be(world, here, tmp_path):
    run = copy_folder(world / "run", tmp_path / "run")
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("rows.jsonl", "gone.jsonl"), encoding="utf-8")
    (run / "starts.jsonl").unlink(missing_ok=True)
    code, out, _ = here("export", "--adapter", run, "--gguf", tmp_path / "m.gguf")
    assert code == 0 and "what it keeps was not measured, as the run's rows are gone" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--gguf", "m.bin"], 2, "--gguf m.bin: must end in .gguf"),
        (["--gguf", "none/m.gguf"], 2, "there is no folder none"),
        (["--gguf", "m.gguf", "--quantize", "Q4_K_M"], 2, "llama-quantize m.gguf OUT.gguf Q4_K_M"),
        (["--gguf", "m.gguf", "--min-gain", "2"], 2, "--min-gain is a share from 0 to 1"),
        (["--gguf", "m.gguf", "--merge"], 2, "leave --merge out"),
        (["--gguf", "m.gguf", "--out", "o"], 2, "leave --out out"),
        (["--gguf-adapter", "m.gguf", "--gguf", "n.gguf"], 2, "leave --gguf out"),
        (["--gguf-adapter", "m.bin"], 2, "--gguf-adapter m.bin: must end in .gguf"),
        (["--gguf", "m.gguf", "--step", "3"], 4, "no checkpoint of step 3"),
        (["--quantize", "Q8_0", "--out", "o"], 2, "are of --gguf FILE"),
        ([], 2, "name a new folder with --out, or a file with --gguf"),
    ],
)
def test_what_is_refused(world, here, tmp_path, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no llama-quantize
    found, _, err = here("export", "--adapter", world / "run", *arguments)
    assert found == code and says in one_sentence(err) and list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_stays(world, here, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    code, _, err = here("export", "--adapter", world / "run", "--gguf", tmp_path / "m.gguf")
    assert code == 2 and "is there already" in one_sentence(err) and (tmp_path / "m.gguf").read_text() == "mine"
