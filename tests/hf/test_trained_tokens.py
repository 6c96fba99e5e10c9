"""Rows of some tokens that are trained beside an adapter, as PEFT's `trainable_token_indices`."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from command_line import sentence_of
from families import make_family
from grown_bases import ADDED, GROWN, VOCAB, grown_config, resized
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jlora.config import LoraSection, ObjectiveSection
from jlora.errors import ConfigError, ModelError
from jlora.hf.adapters import embedding_rows
from jlora.hf.peft import load_adapter, save_adapter
from jlora.hf.planned import to_plan
from jlora.hf.pretrained import open_pretrained, with_ids
from jlora.inference.model import open_adapted
from jlora.model import attention
from jlora.model.adapter import Rows, place_adapter
from jlora.model.adapter_init import new_adapter
from jlora.model.sharding import one_device_mesh
from jlora.planning.compiled import plan
from jlora.planning.topology import Target
from jlora.training import optim
from jlora.training.export import export
from jlora.training.run import train
from jlora.training.step import Forward
from jlora.training.sweep import train_together

FLOAT32 = jnp.dtype("float32")
IDS = [3, 77, 299]
SECTION = LoraSection(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"], trainable_tokens=IDS)


def peft_model(folder: Path, tied: bool):
    """PEFT's model with the same options; on a head of its own too, unless that is tied."""
    indices = IDS if tied else {"embed_tokens": IDS, "lm_head": IDS}
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=indices, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
            if "trainable_tokens_delta" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
    rows, length = tokens.shape
    targets = np.roll(tokens, -1, axis=1)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0.0
    weights[0, :5] = 0.0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "targets": targets, "weights": weights, "positions": positions,
            "segments": np.ones_like(tokens)}  # fmt: skip


def torch_loss(model, batch):
    found = model(torch.from_numpy(batch["tokens"]).long()).logits
    losses = torch.nn.functional.cross_entropy(
        found.reshape(-1, found.shape[-1]), torch.from_numpy(batch["targets"]).long().reshape(-1), reduction="none"
    )
    weights = torch.from_numpy(batch["weights"]).reshape(-1)
    return (losses * weights).sum() / weights.sum()


def with_tokens(vocab_size: int = VOCAB) -> np.ndarray:
    """Tokens among which the trained ones stand, as inputs and as targets."""
    tokens = random_tokens(vocab_size)
    tokens[:, 2:20:3] = np.resize(IDS, (2, 6))
    return tokens


@pytest.mark.long
def test_gradients_and_steps_are_pefts(base, tmp_path):
    """LoRA and rows together: the gradients of all leaves, and five steps of AdamW; no other row has either."""
    decoder, digest = open_base(base)
    tied = decoder.cfg.tie_word_embeddings
    model = peft_model(base, tied)
    model.save_pretrained(tmp_path / "start")
    start = load_adapter(tmp_path / "start", decoder.cfg, digest, 0.0)
    rows = {name: part for name, part in start.items() if isinstance(part, Rows)}
    assert {name: part.weight.shape for name, part in rows.items()} == dict.fromkeys(
        ["embed_tokens"] if tied else ["embed_tokens", "lm_head"], (3, 48)
    )
    forward = Forward(attention.reference, "none", FLOAT32, ObjectiveSection())
    batch = batch_of(with_tokens())
    ours_of = {name: jnp.asarray(array) for name, array in batch.items()}

    def loss(trained, frozen):
        params = optim.join(trained, frozen)
        total, count, _ = forward.loss(params["base"], params["adapter"], ours_of, None)
        return total / count

    trained, frozen = optim.split({"adapter": start, "base": decoder}, "lora")
    step = jax.jit(jax.value_and_grad(loss))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)

    rule = optax.adamw(3e-3, weight_decay=0.0)
    state = rule.init(trained)
    sizes = {leaf.shape for leaf in jax.tree.leaves(state)} | {leaf.shape for leaf in jax.tree.leaves(trained)}
    assert (VOCAB, 48) not in sizes
    for number in range(5):
        ours, gradients = step(trained, frozen)
        optimizer.zero_grad()
        theirs = torch_loss(model, batch)
        theirs.backward()
        assert float(ours) == pytest.approx(theirs.item(), abs=1e-5)
        if number == 0:
            compare_gradients(gradients["adapter"], model)
        optimizer.step()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = rule.update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
    adapter = optim.join(trained, frozen)["adapter"]
    assert_close(logits(decoder, adapter, batch["tokens"]), torch_logits(model, batch["tokens"]), 1e-4)


def compare_gradients(ours, model) -> None:
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.requires_grad}
    seen = 0
    for name, gradient in theirs.items():
        if "trainable_tokens_delta" in name:
            found = ours["lm_head" if "lm_head" in name else "embed_tokens"].weight
            seen += 1
        else:
            layer, leaf = int(name.split(".layers.")[1].split(".")[0]), name.split(".lora_")[0].rpartition(".")[2]
            part = ours[leaf].lora_a if "lora_A" in name else ours[leaf].lora_b
            found = np.asarray(part[layer])
            found = found.reshape(-1, 4).T if "lora_A" in name else found.reshape(4, -1).T
        assert np.abs(gradient).max() > 1e-5, name
        np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-5, err_msg=name)
    assert seen == sum(isinstance(part, Rows) for part in ours.values()) > 0


def grown_rows(base: Path, section: LoraSection = SECTION):
    """An adapter whose B and rows are not as they began."""
    decoder, digest = open_base(base)
    rng = np.random.default_rng(0)

    def moved(leaf):
        return leaf + jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype) if leaf.ndim > 1 else leaf

    return decoder, digest, jax.tree.map(moved, new_adapter(section, decoder.cfg, 0, decoder))


def test_ours_in_peft_and_back(base, tmp_path):
    decoder, digest, adapter = grown_rows(base)
    save_adapter(tmp_path / "adapter", adapter, SECTION, str(base), digest)
    tied = decoder.cfg.tie_word_embeddings
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == (IDS if tied else {"embed_tokens": IDS, "lm_head": IDS})
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert held[name].shape == (3, 48)
    tokens = with_tokens()
    ours = logits(decoder, adapter, tokens)
    assert np.abs(ours - logits(decoder, {}, tokens)).max() > 0.1
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert_close(ours, torch_logits(PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), tokens), 1e-4)
    back = load_adapter(tmp_path / "adapter", decoder.cfg, digest, 0.0)
    assert_close(logits(decoder, back, tokens), ours, 1e-5)


@pytest.mark.parametrize("name", ["gpt2_tied", "gemma3"])
def test_other_families(name, tmp_path):
    """Whose embedding has another name, or is scaled."""
    make_family(tmp_path / "base", name)
    section = SECTION.model_copy(update={"target_modules": ["o_proj"]})
    decoder, digest, adapter = grown_rows(tmp_path / "base", section)
    save_adapter(tmp_path / "adapter", adapter, section, "base", digest, decoder.cfg.names)
    tokens = with_tokens()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = torch_logits(PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), tokens)
    assert_close(logits(decoder, adapter, tokens), theirs, 1e-4)


def test_indices_in_any_order_and_of_the_embedding_alone(base, tmp_path):
    """As a list, which PEFT takes for the embedding, and with it for a head that is tied to it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [299, 3, 77]}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    decoder, digest = open_base(base)
    adapter = load_adapter(tmp_path, decoder.cfg, digest, 0.0)
    assert adapter["embed_tokens"].ids == (3, 77, 299) and "lm_head" not in adapter
    assert_close(logits(decoder, adapter, with_tokens()), torch_logits(model, with_tokens()), 1e-4)


@pytest.mark.parametrize("both", [False, True], ids=["list", "dict"])
def test_what_peft_saves_of_a_resized_base(both, base, tmp_path):
    """It writes the resized tables beside, without the rows that are trained in them."""
    ids = [300, 2, 301]
    indices = {"embed_tokens": ids, "lm_head": ids} if both else ids
    options = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": indices}
    model = get_peft_model(resized(base), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    assert embedding_rows(tmp_path) == GROWN
    opened = open_adapted(str(base), str(tmp_path), dtype="float32")
    tokens = random_tokens(VOCAB)
    tokens[:, 2:20:3] = np.resize(range(VOCAB, GROWN), (2, 6))
    assert_close(logits(opened.pretrained.base, opened.adapter, tokens), torch_logits(model, tokens), 1e-4)


@pytest.fixture(scope="module")
def run(base, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    cfg = grown_config(folder, base, tokenizer, "lora.trainable_tokens=new", "training.save_every=2")
    summary = train(cfg, quiet=True)
    leaves = 1 if json.loads((base / "config.json").read_text())["tie_word_embeddings"] else 2
    plain = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(lora_of(cfg, base)))
    assert summary["trainable_params"] == plain + leaves * len(ADDED) * 48
    return folder / "run"


def lora_of(cfg, base):
    section = cfg.lora.model_copy(update={"trainable_tokens": []})
    return optim.split({"adapter": new_adapter(section, open_base(base)[0].cfg, 0), "base": {}}, "lora")[0]


@pytest.mark.long
def test_new_tokens_are_trained_exported_and_merged(base, run, tmp_path):
    adapted = open_adapted(str(base), str(run), dtype="float32")
    rows, mean = adapted.adapter["embed_tokens"], np.asarray(adapted.pretrained.base.embed_tokens[VOCAB])
    assert rows.ids == tuple(range(VOCAB, GROWN))
    changed = np.abs(np.asarray(rows.weight) - mean).max(axis=1)
    assert changed[0] > 1e-3 and changed[2] > 1e-3  # they stand in the rows
    found = export(run, tmp_path / "adapter", None, False, None, True)
    assert found["peft_relative_difference"] < 1e-5 and embedding_rows(tmp_path / "adapter") == GROWN
    tokens = random_tokens(GROWN)
    tokens[:, 2:20:3] = np.resize(range(VOCAB, GROWN), (2, 6))
    ours = logits(adapted.pretrained.base, adapted.adapter, tokens)
    # As its user loads it, whose new rows transformers draws.
    model = PeftModel.from_pretrained(resized(base), tmp_path / "adapter").eval()
    assert_close(ours, torch_logits(model, tokens), 1e-4)
    export(run, tmp_path / "merged", None, True, "float32", False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == GROWN
    assert_close(ours, torch_logits(model, tokens), 1e-4)


@pytest.mark.long
def test_a_run_resumes_to_the_same_rows(base, tokenizer, run, tmp_path):
    same = f"data.train={run.parent / 'rows.jsonl'}"
    cfg = grown_config(tmp_path, base, tokenizer, "lora.trainable_tokens=new", "training.save_every=2", same)
    shutil.copytree(run, tmp_path / "run")
    for left in ("checkpoints/4", "adapter"):
        shutil.rmtree(tmp_path / "run" / left)
    (tmp_path / "run" / "summary.json").unlink()
    assert train(cfg, quiet=True)["steps"] == 4
    whole, resumed = ((each / "adapter" / "adapter_model.safetensors").read_bytes() for each in (run, tmp_path / "run"))
    assert whole == resumed
    other = cfg.model_copy(update={"lora": cfg.lora.model_copy(update={"trainable_tokens": [VOCAB]})})
    assert "lora.trainable_tokens: 'new' -> " in sentence_of(ModelError, train, other, quiet=True)


@pytest.mark.long
def test_commands_and_a_start_from_it(base, tokenizer, run, here, tmp_path):
    code, out, err = here("generate", "--adapter", run, "--prompt", f"say {ADDED[0]}", "--max-new-tokens", 3, "--json")
    assert code == 0 and json.loads(out), err
    again = grown_config(tmp_path, base, tokenizer, "lora.trainable_tokens=new", f"lora.init_from={run}")
    assert train(again, quiet=True)["status"] == "finished"
    other = again.model_copy(update={"output_dir": str(tmp_path / "other")})
    other = other.model_copy(update={"lora": other.lora.model_copy(update={"trainable_tokens": [VOCAB]})})
    assert "trainable_tokens=[300, 301, 302, 303]" in sentence_of(ModelError, train, other, quiet=True)


@pytest.mark.long
def test_pairs_sweeps_and_plans(base, tokenizer, tmp_path):
    """DPO begins where its reference is; a sweep's runs may train other tokens; a plan counts what a run trains."""
    pairs = tmp_path / "pairs.jsonl"
    pair = {"prompt": f"say {ADDED[0]}", "chosen": ADDED[2], "rejected": "blue"}
    pairs.write_text("".join(json.dumps(pair | {"prompt": f"{ADDED[0]} {i}"}) + "\n" for i in range(8)))
    cfg = grown_config(
        tmp_path, base, tokenizer, "lora.trainable_tokens=new", f"data.train={pairs}", "objective.name=dpo",
        "data.format=preference",
    )  # fmt: skip
    summary = train(cfg, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert found[0] == pytest.approx(np.log(2), abs=1e-5) and found[-1] < found[0]
    planned = plan(to_plan(cfg), Target("cpu:1", "cpu", jax.devices()[:1], 2**40))
    assert planned.trainable_params == summary["trainable_params"]
    assert planned.frozen_params == summary["frozen_params"]
    entries = [{"name": "one", "lora.trainable_tokens": [5]}, {"name": "two", "lora.trainable_tokens": [ADDED[2]]}]
    folder = tmp_path / "sweep"
    folder.mkdir()
    cfg = grown_config(folder, base, tokenizer, f"sweep={json.dumps(entries)}", "training.max_steps=1")
    summary = train_together(cfg, quiet=True)
    held = [load_adapter_ids(folder / "run" / name / "adapter") for name in ("one", "two")]
    assert summary["status"] == "finished" and held == [[5], [VOCAB + 2]]
    entries[0]["model.resize_embeddings"] = False
    assert "model.resize_embeddings" in sentence_of(
        ConfigError, grown_config, folder, base, tokenizer, f"sweep={json.dumps(entries)}"
    )


def load_adapter_ids(folder: Path) -> list[int]:
    found = json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]
    return found["embed_tokens"] if isinstance(found, dict) else found


WRONG = {
    "lora.trainable_tokens=['<|cal|>']": "'<|cal|>', which is no token of the tokenizer; did you mean '<|call|>'?",
    "lora.trainable_tokens=[304]": "holds 304, whose id 304 has no row in the embedding of 304",
    "lora.trainable_tokens=[-1]": None,
    "lora.trainable_tokens=oldest": None,
}


@pytest.mark.parametrize("key", WRONG)
def test_what_is_no_token_is_named(key, base, tokenizer, tmp_path):
    if WRONG[key] is None:
        sentence_of(ConfigError, grown_config, tmp_path, base, tokenizer, key)
        return
    cfg = grown_config(tmp_path, base, tokenizer, key)
    assert WRONG[key] in sentence_of(ConfigError, train, cfg, quiet=True)


def test_what_does_not_go_together(base, tokenizer, tmp_path):
    both = "lora.trainable_tokens=[5]", "lora.modules_to_save=[embed_tokens]"
    assert "leave one of them out" in sentence_of(ConfigError, grown_config, tmp_path, base, tokenizer, *both)
    cfg = grown_config(tmp_path, base, base, "lora.trainable_tokens=new")
    assert "has no new rows" in sentence_of(ConfigError, train, cfg, quiet=True)
    outside = grown_config(
        tmp_path, base, tokenizer, "model.resize_embeddings=false", f"lora.trainable_tokens=['{ADDED[1]}']"
    )
    assert "set model.resize_embeddings=true" in sentence_of(ConfigError, train, outside, quiet=True)
    cfg = grown_config(tmp_path, base, tokenizer, f"lora.trainable_tokens=['{ADDED[1]}', 7, a]")
    opened = open_pretrained(str(base), str(tokenizer), None, True)
    assert with_ids(cfg, opened).lora.trainable_tokens == sorted([301, 7, opened.tokenizer.encode("a")[0]])


INDICES = {
    "a module": ({"q_proj": [1]}, "names 'q_proj'"),
    "no list": ("all", "is no list of ids"),
    "twice": ([1, 1], "is no list of ids"),
    "no number": ([True], "is no list of ids"),
    "outside": ([300], "holds 300, but the base's embedding has 300 rows"),
    "below": ([-1], "holds -1"),
    "the table too": ([5], "modules_to_save trains what trainable_token_indices trains rows of, embed_tokens"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", INDICES)
def test_indices_that_are_wrong_are_refused(name, base, tmp_path):
    decoder, digest, adapter = grown_rows(base)
    save_adapter(tmp_path, adapter, SECTION, str(base), digest)
    given, said = INDICES[name]
    path = tmp_path / "adapter_config.json"
    saved = ["embed_tokens"] if name == "the table too" else None
    config = json.loads(path.read_text()) | {"trainable_token_indices": given, "modules_to_save": saved}
    path.write_text(json.dumps(config))
    assert said in sentence_of(ModelError, load_adapter, tmp_path, decoder.cfg, digest, 0.0)


def test_rows_that_do_not_fit_are_refused(base, tmp_path):
    decoder, _, adapter = grown_rows(base)
    section = SECTION.model_copy(update={"trainable_tokens": [VOCAB]})
    with pytest.raises(ModelError, match="embed_tokens does not fit this base"):
        place_adapter(new_adapter(section, decoder.cfg, 0), decoder.cfg, one_device_mesh())
