"""Every option of an adapter, with PEFT as the judge: logits both ways, merging, and what is refused."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapter_options import (
    COMMON,
    OPTIONS,
    SPREAD,
    SPREAD_A,
    fresh,
    grown,
    needed,
    peft_config,
    section_of,
    torch_model,
)
from parity import assert_close, logits, random_tokens, torch_logits
from peft import LoraConfig, PeftModel, get_peft_model

from jlora.config import LoraSection
from jlora.errors import ConfigError, ModelError
from jlora.hf import verify, weights
from jlora.hf.adapter_config import CONFIG
from jlora.hf.peft import load_adapter, save_adapter
from jlora.hf.source import open_source
from jlora.hf.weights import Merged, Stored, save_checkpoint, untied
from jlora.model import attention
from jlora.model.adapter import Lora, project, weight_norm
from jlora.model.adapter_init import check_options
from jlora.model.quant import dequantize, quantize
from jlora.training.step import Forward

# What every run of the suite tests; all other pairs of an option and a base are left to the slow campaign.
QUICK = {
    *(("pissa_patterns", "gqa"), ("saved", "gqa"), ("bias_all", "biased")),
    *(("dora_rslora_some_layers", "stories260K"), ("olora", "stories260K"), ("patterns", "stories260K")),
}
PAIRS = [
    (name, base) for name in OPTIONS for base in (["biased"] if "bias" in OPTIONS[name] else ["gqa", "stories260K"])
]
CASES = [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PAIRS]
# What PEFT cannot convert to an adapter that leaves the base as it is.
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


# Logits, both ways


@pytest.mark.long
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


@pytest.mark.long
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
