"""Families beside Llama against transformers and PEFT: logits, each layer alone, gradients, decoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import FAMILIES, ONE_EACH, make_family
from grown_adapters import random_adapter
from parity import assert_close, hidden, logits, open_base, random_tokens, torch_logits
from peft import PeftModel
from tiny import make_tokenizer

from jlora.config import LoraSection
from jlora.hf.peft import exported_tensors, save_adapter
from jlora.hf.pretrained import load_pretrained, open_pretrained
from jlora.inference.generate import GREEDY, generate
from jlora.inference.model import Adapted
from jlora.model import attention
from jlora.model.llama import attend, rotary_by_layer
from jlora.model.remat import LADDER
from jlora.model.sharding import one_device_mesh

TOKENS = random_tokens(300)
POSITIONS = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
ONES = np.ones_like(TOKENS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """name -> folder, transformers' model and ours; made once."""
    known = {}

    def open_family(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            model = make_family(folder, name)
            make_tokenizer(folder)
            known[name] = folder, model, open_base(folder)[0]
        return known[name]

    return open_family


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name, opened):
    _, model, base = opened(name)
    assert_close(logits(base, {}, TOKENS), torch_logits(model, TOKENS), 1e-4)
    biases = {leaf for leaf in vars(base.layers) if leaf.endswith("_bias")}
    assert len(biases) == sum(path.endswith("bias") for path in model.state_dict()) // base.cfg.num_hidden_layers


def test_longrope_turns_each_segment_by_its_own_length(opened):
    """A long sequence as transformers has it, and a short one in the same row as it is alone."""
    _, model, base = opened("phi3_longrope")
    tokens = random_tokens(300, rows=1, length=84)
    places = np.concatenate([np.arange(60), np.arange(24)])[None].astype(np.int32)
    segments = np.repeat([1, 2], [60, 24])[None].astype(np.int32)
    found = base.logits(hidden(base, {}, tokens, places, segments, "none"), {})
    for part in slice(0, 60), slice(60, 84):
        assert_close(found[:, part], torch_logits(model, tokens[:, part]), 1e-4)


@pytest.mark.parametrize("name", ONE_EACH)
def test_each_layer_equals_transformers(name, opened):
    """On the very states that transformers' layer was given, so that no error is hidden by one before it."""
    _, model, base = opened(name)
    taken, given = [], []

    def keep(_, args, kwargs, out):
        taken.append(args[0] if args else kwargs["hidden_states"])
        given.append(out[0] if isinstance(out, tuple) else out)

    blocks = [module for path, module in model.named_modules() if path.rpartition(".")[0].endswith((".layers", ".h"))]
    handles = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    torch_logits(model, TOKENS)
    for handle in handles:
        handle.remove()
    places = attention.Places(ONES, ONES, POSITIONS, POSITIONS)

    @jax.jit
    def ours(stacked, x, layer):
        rotary = rotary_by_layer(base.cfg, jnp.asarray(POSITIONS), jnp.asarray(ONES))(layer)
        seeing = partial(attend, base.cfg, attention.reference, layer, places=jax.tree.map(jnp.asarray, places))
        return jax.tree.map(lambda leaf: leaf[layer], stacked)(x, rotary, seeing, {}, None)

    assert len(taken) == base.cfg.num_hidden_layers == 3
    for layer, (x, expected) in enumerate(zip(taken, given, strict=True)):
        assert_close(ours(base.layers, x.numpy(), jnp.int32(layer)), expected.numpy(), 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ONE_EACH)
def test_lora_gradients_equal_peft(name, opened, tmp_path):
    """Of every factor, by each remat policy; and PEFT loads what is exported."""
    folder, model, base = opened(name)
    adapter = random_adapter(base)
    section = LoraSection(rank=4, alpha=8, target_modules="all-linear")
    save_adapter(tmp_path, adapter, section, str(folder), "0" * 64, base.cfg.names)
    adapted = PeftModel.from_pretrained(make_family(tmp_path / "again", name), str(tmp_path), is_trainable=True)
    adapted.eval()
    assert_close(logits(base, adapter, TOKENS), torch_logits(adapted, TOKENS), 1e-4)
    assert np.abs(torch_logits(adapted, TOKENS) - torch_logits(model, TOKENS)).max() > 1e-2

    labels = torch.from_numpy(TOKENS[:, 1:]).long().flatten()
    torch.nn.functional.cross_entropy(
        adapted(torch.from_numpy(TOKENS).long()).logits[:, :-1].flatten(0, 1), labels
    ).backward()
    expected = {
        path.replace(".default", ""): parameter.grad.numpy()
        for path, parameter in adapted.named_parameters()
        if parameter.grad is not None
    }

    def loss(adapter, remat):
        states = hidden(base, adapter, TOKENS, POSITIONS, ONES, remat)
        picked = jax.nn.log_softmax(base.logits(states, adapter))[:, :-1]
        return -jnp.mean(jnp.take_along_axis(picked, jnp.asarray(TOKENS)[:, 1:, None], axis=-1))

    for remat in LADDER:
        found = exported_tensors(tmp_path, jax.grad(loss)(adapter, remat), base.cfg.names)
        assert found.keys() == expected.keys()
        for path, gradient in expected.items():
            assert np.abs(gradient).max() > 1e-4, path
            np.testing.assert_allclose(found[path], gradient, rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.long
@pytest.mark.parametrize("name", [*ONE_EACH, "phi3_longrope"])
def test_decoding_equals_transformers(name, opened):
    """64 tokens with a cache, farther than any window reaches."""
    folder, model, _ = opened(name)
    pretrained = load_pretrained(open_pretrained(str(folder), None, None), jnp.dtype("float32"), one_device_mesh())
    prompts = [[1, 17, 230, 44, 5], [1, 9], [1, *range(40, 59)]]
    *_, found = generate(
        Adapted(pretrained, {}, jnp.dtype("float32")), prompts, max_new_tokens=64, sampling=GREEDY, seed=0
    )
    for prompt, ours in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "eos_token_id": 2, "pad_token_id": 0}
        theirs = model.generate(ids, do_sample=False, max_new_tokens=64, **options)[0, len(prompt) :].tolist()
        assert ours == (theirs[:-1] if theirs[-1] == 2 else theirs)
    assert max(map(len, found)) == 64
