"""Every option of an adapter, with PEFT as the judge: logits both ways, training, merging, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from shared_data import SHARED
from tiny import make_llama, make_qwen2, make_tokenizer
from transformers import AutoModelForCausalLM

from jlora.config import PROJECTIONS, Config, LoraSection
from jlora.errors import ConfigError, ModelError
from jlora.export import export_combined
from jlora.hf import verify, weights
from jlora.hf.merged import save_checkpoint, untied
from jlora.hf.peft import CONFIG, load_adapter, save_adapter
from jlora.hf.source import open_source
from jlora.hf.weights import Merged, Stored
from jlora.model import attention
from jlora.model.adapter import Adapter, Lora, Saved, layer_ranks, project, weight_norm
from jlora.model.adapter_init import check_options, complete, new_adapter
from jlora.model.quant import dequantize, quantize
from jlora.model.sharding import one_device_mesh
from jlora.training import optim
from jlora.training.step import Forward, init_state, make_train_step

RANKS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 7}}
ALPHAS = {"alpha_pattern": {"layers.0.self_attn.v_proj": 3.5, "down_proj": 16.0}}
BASES = ("gqa", "stories260K", "biased")

# Options by our names; PEFT's are the same but for these.
PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
COMMON: dict[str, Any] = {"rank": 4, "alpha": 6.0, "target_modules": list(PROJECTIONS)}
OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora_rslora_some_layers": {"use_dora": True, "use_rslora": True, "layers_to_transform": [0, 2]},
    "patterns": RANKS | ALPHAS,
    "patterns_rslora_dora": RANKS | ALPHAS | {"use_rslora": True, "use_dora": True},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_patterns": {"init_lora_weights": "pissa"} | RANKS | ALPHAS,
    "pissa_rslora_dora": {"init_lora_weights": "pissa", "use_rslora": True, "use_dora": True},
    "olora": {"init_lora_weights": "olora"},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj", "v_proj"]},
    "saved_head": {"modules_to_save": ["lm_head"], "layers_to_transform": [0, 1]},
    "bias_all": {"bias": "all", "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2]},
    "bias_lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
}
WITH_BIAS = ("bias_all", "bias_lora_only")
# What every run of the suite tests; all other pairs of an option and a base are left to the slow campaign.
QUICK = {
    *(("pissa_patterns", "gqa"), ("saved", "gqa"), ("bias_all", "biased")),
    *(("dora_rslora_some_layers", "stories260K"), ("olora", "stories260K"), ("patterns", "stories260K")),
}
PAIRS = [(name, base) for name in OPTIONS for base in (["biased"] if name in WITH_BIAS else BASES[:2])]
CASES = [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
# What PEFT can not convert to an adapter that leaves the base as it is.
UNCONVERTED = {"pissa_rslora_dora"}
QUICKLY_READ = {
    ("dora", "gqa"),
    ("pissa", "stories260K"),
    ("patterns", "stories260K"),
    ("saved", "gqa"),
    ("bias_all", "biased"),
}
READ = [
    pytest.param(*pair, marks=[] if pair in QUICKLY_READ else pytest.mark.slow)
    for pair in PAIRS
    if pair[0] not in UNCONVERTED
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Grouped queries and an untied head; the real model, whose head is tied; and one with biases."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("gqa", "biased")}
    make_llama(folders["gqa"], num_hidden_layers=3)
    make_qwen2(folders["biased"], tie_word_embeddings=True)
    return folders | {"stories260K": SHARED / "stories260K"}


@pytest.fixture(scope="module")
def opened(bases):
    return {name: open_base(folder) for name, folder in bases.items() if folder.is_dir()}


def needed(name: str, bases: dict[str, Path]) -> Path:
    if not bases[name].is_dir():
        pytest.skip("the test data are not here (JLORA_TEST_DATA)")
    return bases[name]


def section_of(name: str) -> LoraSection:
    return LoraSection(**(COMMON | OPTIONS[name]))


def peft_config(section: LoraSection) -> LoraConfig:
    keys = ("rank", "alpha", "dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern")
    keys += ("layers_to_transform", "bias")
    options = {PEFT_NAMES.get(key, key): getattr(section, key) for key in keys}
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=list(section.targets),
        modules_to_save=section.modules_to_save or None,
        **options,
    )


# How far training might move an entry; A is drawn smaller than B. With 0.05 for both, one draw in four of OLoRA's on
# stories260K is 1.3e-4 off on a CPU without AVX-512: PEFT's converted factors subtract what the start added, and both
# roundings add up on logits of 16. With these it is 4e-5 to 5e-5 on each of four draws.
SPREAD_A, SPREAD = 0.03, 0.05


def grown(adapter: Adapter, seed: int = 0) -> Adapter:
    """The adapter as training might leave it: every trained number moved, what is zero for good still zero."""
    draw = np.random.default_rng(seed)

    def moved(array: Any, spread: float) -> Any:
        return jnp.asarray(np.asarray(array) + draw.normal(0, spread, array.shape), jnp.float32)

    found: Adapter = {}
    for name, part in adapter.items():
        if isinstance(part, Saved):
            found[name] = Saved(moved(part.weight, SPREAD))
            continue
        ranks = np.array(part.ranks or (part.lora_b.shape[1],) * len(part.lora_b))
        held = np.arange(part.lora_b.shape[1])[None] < ranks[:, None]
        a, b = moved(part.lora_a, SPREAD_A), moved(part.lora_b, SPREAD)
        a *= held.reshape(len(held), *(1 for _ in a.shape[2:]), -1)
        b *= held.reshape(*held.shape, *(1 for _ in b.shape[2:]))
        magnitude = None if part.magnitude is None else moved(part.magnitude, 0.2)
        found[name] = dataclasses.replace(part, lora_a=a, lora_b=b, magnitude=magnitude)
    return found


def fresh(section: LoraSection, base) -> Adapter:
    return complete(new_adapter(section, base.cfg, 7), section, base, 7)


def torch_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# Logits, both ways


@pytest.mark.parametrize(("name", "base_name"), CASES)
def test_ours_in_peft_and_merged(name, base_name, bases, opened, tmp_path, monkeypatch):
    """What we export PEFT computes as we do; so do we on reading it, and transformers on the merged weights."""
    folder = needed(base_name, bases)
    (base, base_hash), section = opened[base_name], section_of(name)
    start = fresh(section, base)
    tokens = random_tokens(base.cfg.vocab_size)
    bare = logits(base, {}, tokens)
    assert_close(logits(base, start, tokens), bare, 1e-4)
    adapter = grown(start)
    ours = logits(base, adapter, tokens)
    assert np.abs(ours - bare).max() > 1e-2
    save_adapter(tmp_path / "adapter", adapter, section, str(folder), base_hash)
    model = PeftModel.from_pretrained(torch_model(folder), tmp_path / "adapter").eval()
    assert_close(ours, torch_logits(model, tokens), 1e-4)
    back = load_adapter(tmp_path / "adapter", base.cfg, base_hash, dropout=0.0)
    assert_close(logits(base, back, tokens), ours, 1e-4)

    source = open_source(folder)
    shape, config = untied(base.cfg, source.config, adapter)
    monkeypatch.setattr(weights, "BLOCK_WEIGHTS", 2**12)
    probed = verify.probe_logits(base, adapter, jnp.dtype("float32"))
    assert_close(verify.streamed_logits(shape, Stored(source), adapter), probed, 1e-4)
    save_checkpoint(
        tmp_path / "merged",
        shape,
        Merged(Stored(source), adapter),
        config,
        "float32",
        lambda _: None,
    )
    assert_close(torch_logits(torch_model(tmp_path / "merged"), tokens), ours, 1e-4)


@pytest.mark.parametrize(("name", "base_name"), READ)
def test_theirs_here(name, base_name, bases, opened, tmp_path):
    """What PEFT makes and saves we compute as it does."""
    folder = needed(base_name, bases)
    (base, base_hash), section = opened[base_name], section_of(name)
    torch.manual_seed(0)
    model = get_peft_model(torch_model(folder), peft_config(section)).eval()
    model.peft_config["default"].init_lora_weights = True  # else PEFT takes it anew from the base on reading it
    if section.takes_from_base:
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = section.init_lora_weights
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += (SPREAD_A if "lora_A" in key else SPREAD) * torch.randn_like(parameter)
    options = {"path_initial_model_for_weight_conversion": str(tmp_path / "start")} if section.takes_from_base else {}
    tokens = random_tokens(base.cfg.vocab_size)
    theirs = torch_logits(model, tokens)
    model.save_pretrained(tmp_path / "adapter", **options)
    adapter = load_adapter(tmp_path / "adapter", base.cfg, base_hash, dropout=0.0)
    assert_close(logits(base, adapter, tokens), theirs, 1e-4)
    assert np.abs(theirs - logits(base, {}, tokens)).max() > 1e-2


# Training

STEPS = 10
TRAINED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa_patterns": OPTIONS["pissa_patterns"],
    "olora_some_layers": {"init_lora_weights": "olora", "layers_to_transform": [0, 2]},
    "saved_biased": {"modules_to_save": ["embed_tokens", "lm_head"], "bias": "all"},
    "loraplus_dora_saved_biased": {
        "use_dora": True,
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "bias": "all",
    },
}
OPTIMIZER = {"learning_rate": 2e-3, "schedule": "constant", "max_grad_norm": 0.5}


def run_config(lora: dict[str, Any], **optimizer: Any) -> Config:
    return Config(
        model={"path": "base", "dtype": "float32", "remat": "none"},
        lora=lora,
        data={"train": "rows"},
        training={"batch_size": 2},
        optimizer=OPTIMIZER | optimizer,
        output_dir="run",
    )


def batches(vocab_size: int) -> list[np.ndarray]:
    return [random_tokens(vocab_size, seed=seed) for seed in range(STEPS)]


def our_curve(cfg: Config, base, adapter: Adapter, forward: Forward) -> tuple[list[float], Adapter]:
    """Losses of each step on whole rows, and the adapter after them."""
    mesh = one_device_mesh()
    params = {"adapter": adapter, "base": base}
    trained, frozen = optim.split(params, "lora")
    hyper = optim.hyperparameters(cfg.optimizer, STEPS)
    with jax.set_mesh(mesh):
        state = init_state(trained, cfg, mesh)
        step = jax.jit(make_train_step(cfg, forward))
        losses = []
        for tokens in batches(base.cfg.vocab_size):
            targets = np.roll(tokens, -1, axis=1)
            weights = np.ones(tokens.shape, np.float32)
            weights[:, -1] = 0.0
            positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
            batch = {"tokens": tokens, "targets": targets, "weights": weights, "positions": positions}
            batch |= {"segments": np.ones_like(tokens)}
            state, metrics = step(state, frozen, {key: value[None] for key, value in batch.items()}, hyper)
            losses.append(float(metrics["loss"]))
    return losses, optim.join(state.trained, frozen)["adapter"]


def torch_curve(model: torch.nn.Module, vocab_size: int, ratio: float | None) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, betas = OPTIMIZER["learning_rate"], {"betas": (0.9, 0.999), "eps": 1e-8}
    if ratio is None:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, **betas)
    else:
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, weight_decay=0.0, **betas
        )
    losses = []
    for tokens in batches(vocab_size):
        ids = torch.from_numpy(tokens).long()
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "loraplus_dora_saved_biased" else pytest.mark.slow) for name in TRAINED],
)
def test_ten_steps_are_those_of_peft(name, bases, opened, tmp_path):
    """From one start: PEFT's own for what it takes from the base, ours read by PEFT for the rest."""
    (base, base_hash), folder = opened["biased"], bases["biased"]
    lora = {"rank": 4, "alpha": 6.0, "target_modules": list(PROJECTIONS)} | TRAINED[name]
    ratio = 4.0 if name.startswith("loraplus") else None
    cfg = run_config(lora, **({"loraplus_lr_ratio": ratio} if ratio else {}))
    adapter = fresh(cfg.lora, base)
    if cfg.lora.takes_from_base:
        model = get_peft_model(torch_model(folder), peft_config(cfg.lora)).train()
    else:
        adapter = adapter | {key: part for key, part in grown(adapter).items() if isinstance(part, Lora)}
        save_adapter(tmp_path / "start", adapter, cfg.lora, str(folder), base_hash)
        model = PeftModel.from_pretrained(torch_model(folder), tmp_path / "start", is_trainable=True).train()
    before = logits(base, {}, random_tokens(300))
    forward = Forward(attention.reference, "none", jnp.dtype("float32"))
    ours, trained = our_curve(cfg, base, adapter, forward)
    theirs = torch_curve(model, 300, ratio)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert_close(logits(base, trained, random_tokens(300)), torch_logits(model.eval(), random_tokens(300)), 1e-3)
    np.testing.assert_array_equal(logits(base, {}, random_tokens(300)), before)
    for key, part in trained.items():
        if isinstance(part, Lora):
            start = adapter[key]
            jax.tree.map(np.testing.assert_array_equal, part.initial, start.initial)
            for layer, rank in enumerate(layer_ranks(cfg.lora, key, base.cfg.num_hidden_layers)):
                assert not np.asarray(part.lora_a[layer, ..., rank:]).any()
                assert not np.asarray(part.lora_b[layer, rank:]).any()
                assert (np.asarray(part.lora_b[layer]) != np.asarray(start.lora_b[layer])).any() == (rank > 0)


# What only we see


def test_dora_drops_inputs_as_peft_does(monkeypatch):
    """In training, the base's share of the rescaling sees the dropped input, its plain share the whole one."""
    draw = np.random.default_rng(0)
    weight, x = draw.normal(size=(16, 8)), draw.normal(size=(1, 5, 16))
    a, b, m = draw.normal(size=(16, 2)), draw.normal(size=(2, 8)), draw.uniform(1, 2, size=8)
    model = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    model[0].weight.data = torch.tensor(weight.T, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, lora_dropout=0.4, use_dora=True, target_modules=["0"]))
    layer = peft.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.tensor(a.T, dtype=torch.float32)
    layer.lora_B["default"].weight.data = torch.tensor(b.T, dtype=torch.float32)
    layer.lora_magnitude_vector["default"].weight.data = torch.tensor(m, dtype=torch.float32)
    keep = draw.uniform(size=x.shape) < 0.6
    layer.lora_dropout["default"].forward = lambda x: x * torch.tensor(keep) / 0.6
    monkeypatch.setattr("jlora.model.adapter.jax.random.bernoulli", lambda *_: jnp.asarray(keep))
    ours = Lora(*(jnp.asarray(v, jnp.float32) for v in (a, b, 1.5)), 0.4, magnitude=jnp.asarray(m, jnp.float32))
    found = project(
        "btd,df->btf", jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), ours, jax.random.key(0)
    )
    theirs = peft.train()(torch.tensor(x, dtype=torch.float32)).detach().numpy()
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_dora_on_a_quantised_weight(kind):
    """The norm is that of the weight that is multiplied."""
    draw = np.random.default_rng(0)
    leaf = quantize(jnp.asarray(draw.normal(size=(64, 3, 4)), jnp.float32), kind, 1)
    a, b = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((64, 2), (2, 3, 4)))
    dense = np.asarray(dequantize(leaf, jnp.dtype("float32"))) + 1.5 * np.einsum("dr,rnh->dnh", a, b)
    norm = np.linalg.norm(dense, axis=0)
    found = weight_norm(leaf, Lora(a, b, jnp.float32(1.5), 0.0), jnp.dtype("float32"))
    np.testing.assert_allclose(found, norm, rtol=1e-5)
    x = jnp.asarray(draw.normal(size=(1, 5, 64)), jnp.float32)
    lora = Lora(a, b, jnp.float32(1.5), 0.0, magnitude=jnp.ones((3, 4)))
    np.testing.assert_allclose(
        project("btd,dnh->btnh", x, leaf, lora, None), np.einsum("btd,dnh->btnh", x, dense / norm), rtol=1e-4, atol=1e-5
    )


def test_quick_pissa_finds_the_principal_part(opened):
    """With iterations enough, what the exact decomposition finds."""
    base, _ = opened["biased"]
    exact, quick = (
        fresh(LoraSection(**COMMON | {"init_lora_weights": init}), base)["up_proj"]
        for init in ("pissa", "pissa_niter_500")
    )
    products = [np.einsum("ldr,lrf->ldf", lora.lora_a, lora.lora_b) for lora in (exact, quick)]
    assert np.abs(products[0]).max() > 0.1
    np.testing.assert_allclose(products[1], products[0], atol=2e-3)


def test_gaussian_is_of_the_rank(opened):
    base, _ = opened["biased"]
    section = LoraSection(rank=8, init_lora_weights="gaussian", rank_pattern={"k_proj": 2})
    for name, lora in fresh(section, base).items():
        assert abs(np.asarray(lora.lora_a).std() * (2 if name == "k_proj" else 8) - 1) < 0.1
        assert not np.asarray(lora.lora_b).any()


def test_neftune_is_noise_of_the_paper_s_size_in_training_alone(opened):
    base, _ = opened["biased"]
    tokens = random_tokens(300)
    rows = {"positions": np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape), "segments": np.ones_like(tokens)}
    batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(tokens.shape, np.float32)} | rows
    plain = Forward(attention.reference, "none", jnp.dtype("float32"))
    noisy = dataclasses.replace(plain, neftune_noise_alpha=5.0)
    losses = [float(jax.jit(f.loss)(base, {}, batch, key)[0]) for f, key in ((plain, None), (noisy, None))]
    assert losses[0] == losses[1]
    first, again, other = (float(jax.jit(noisy.loss)(base, {}, batch, jax.random.key(k))[0]) for k in (0, 0, 1))
    assert first == again and len({first, other, losses[0]}) == 3

    from jlora.model.llama import embedding_noise

    x = jnp.zeros((2, 24, 48))
    noise = np.asarray(embedding_noise(jax.random.key(0), x, 5.0))
    bound = 5.0 / math.sqrt(24 * 48)  # alpha / sqrt(L d), which transformers' hook draws within
    assert 0.99 * bound < np.abs(noise).max() <= bound and abs(noise.std() * math.sqrt(3) / bound - 1) < 0.05


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"init_lora_weights": "pissa", "init_from": "folder"}, "init_from=folder"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"layers_to_transform": []}, "layers_to_transform is empty"),
        ({"layers_to_transform": [0], "bias": "lora_only"}, "bias=lora_only"),
        ({"rank_pattern": {"(": 2}}, "not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "greater than 0"),
        ({"modules_to_save": ["norm"]}, "embed_tokens"),
        ({"use_dore": True}, "use_dore"),
    ],
)
def test_options_that_exclude_each_other(options, says):
    with pytest.raises(ValueError, match=".") as caught:
        LoraSection(**options)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers_to_transform": [0, 3]}, "layer 3, but the model has 3, 0 to 2"),
        ({"rank_pattern": {"kproj": 2}}, "rank_pattern: 'kproj' matches no adapted module"),
        ({"alpha_pattern": {"up_proj": 2}}, "alpha_pattern: 'up_proj'"),
        ({"init_lora_weights": "olora", "rank": 21}, "has 20"),
        ({"bias": "lora_only", "target_modules": ["o_proj"]}, "no biases"),
    ],
)
def test_options_that_do_not_fit_the_model(options, says, opened):
    with pytest.raises(ConfigError) as caught:
        check_options(LoraSection(**options), opened["biased"][0].cfg)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("use_bdlora", {"nblocks": 2}),
        ("layers_pattern", "h"),
        ("modules_to_save", ["norm"]),
        ("bias", "some"),
        ("rank_pattern", {"q_proj": -1}),
        ("ensure_weight_tying", True),
        ("a_key_of_next_year", 3),
    ],
)
def test_an_adapter_is_never_half_loaded(key, value, opened, tmp_path):
    base, base_hash = opened["biased"]
    section = section_of("layers")
    save_adapter(tmp_path / "a", fresh(section, base), section, "base", base_hash)
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | {key: value}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=key):
        load_adapter(tmp_path / "a", base.cfg, base_hash, 0.0)


# Several as one


@pytest.fixture(scope="module")
def several(bases, opened, tmp_path_factory) -> dict[str, Path]:
    """Two of one rank on other modules, one of another rank, with rsLoRA, on some layers; and one with DoRA."""
    base, base_hash = opened["gqa"]
    folders = {}
    for seed, (name, options) in enumerate(
        {
            "first": {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "o_proj", "up_proj"]},
            "second": {"rank": 4, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]},
            "third": {"rank": 3, "alpha": 3.0, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]},
            "dora": {"use_dora": True},
        }.items()
    ):
        section = LoraSection(**options)
        folders[name] = tmp_path_factory.mktemp("several") / name
        save_adapter(folders[name], grown(fresh(section, base), seed), section, str(bases["gqa"]), base_hash)
    return folders


@pytest.mark.parametrize(
    ("how", "weights", "rank"),
    [
        ("linear", {"first": 0.7, "second": -0.3}, None),
        ("cat", {"first": 0.7, "second": -0.3, "third": 1.5}, None),
        ("svd", {"first": 0.7, "second": 0.3, "third": 1.5}, None),
        ("svd", {"first": 0.7, "third": -1.5}, 2),
    ],
)
def test_several_adapters_as_one(how, weights, rank, several, bases, opened, tmp_path):
    base, base_hash = opened["gqa"]
    make_tokenizer(bases["gqa"])
    named = [f"{several[name]}={weight}" for name, weight in weights.items()]
    result = export_combined(named, how, rank, str(bases["gqa"]), tmp_path / "out")
    first, *others = weights
    model = PeftModel.from_pretrained(torch_model(bases["gqa"]), several[first], adapter_name=first)
    for other in others:
        model.load_adapter(several[other], adapter_name=other)
    model.add_weighted_adapter(list(weights), list(weights.values()), "one", combination_type=how, svd_rank=rank)
    model.set_adapter("one")
    assert result["rank"] == model.peft_config["one"].r
    tokens = random_tokens(300)
    ours = logits(base, load_adapter(tmp_path / "out", base.cfg, base_hash, 0.0), tokens)
    assert_close(ours, torch_logits(model.eval(), tokens), 1e-4)
    assert np.abs(ours - logits(base, {}, tokens)).max() > 1e-2


@pytest.mark.parametrize(
    ("named", "how", "rank", "says"),
    [
        (["first=0.5", "third=0.5"], "linear", None, "one rank"),
        (["first=0.5", "dora=0.5"], "cat", None, "DoRA"),
        (["first=0.5", "second=half"], "cat", None, "FOLDER=WEIGHT"),
        (["first=0.5", "first=0.5"], "cat", None, "once"),
        (["first=nan"], "cat", None, "finite"),
        (["first=0.5"], "cat", 3, "--rank 3"),
    ],
)
def test_what_can_not_be_combined(named, how, rank, says, several, bases, tmp_path):
    make_tokenizer(bases["gqa"])
    paths = [str(several[one.partition("=")[0]]) + "=" + one.partition("=")[2] for one in named]
    with pytest.raises((ConfigError, ModelError), match=says) as caught:
        export_combined(paths, how, rank, str(bases["gqa"]), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
