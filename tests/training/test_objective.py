"""The chunked cross-entropy against PyTorch's, and that what is not trained costs and changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jlora.training import objective
from jlora.training.objective import chunked_cross_entropy, correct_tokens, token_cross_entropy

VOCAB, WIDTH = 37, 12


def inputs(rows: int, length: int, share: float, seed: int = 0):
    """hidden, head, targets, weights; of the weights about `share` are 1."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(rows, length, WIDTH)).astype(np.float32)
    head = draw.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    targets = draw.integers(0, VOCAB, (rows, length)).astype(np.int32)
    weights = (draw.random((rows, length)) < share).astype(np.float32)
    return hidden, head, targets, weights


def set_chunk(monkeypatch, tokens: int) -> None:
    monkeypatch.setattr(objective, "chunk_size", lambda num_tokens, vocab: min(num_tokens, tokens))


def by_torch(hidden, head, targets, weights, softcap=None):
    """Sum of the loss, and its gradients for hidden and head; untrained labels are ignored, as HF's -100."""
    hidden, head = (torch.tensor(x, requires_grad=True) for x in (hidden, head))
    labels = torch.tensor(np.where(weights > 0, targets, -100)).long()
    logits = (hidden @ head.T).flatten(0, 1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    loss.backward()
    return loss.detach().numpy(), (hidden.grad.numpy(), head.grad.numpy())


def by_us(*args, softcap=None):
    return jax.jit(jax.value_and_grad(lambda *a: chunked_cross_entropy(*a, softcap), argnums=(0, 1)))(*args)


def assert_equal(found, expected) -> None:
    """To 1e-5 of the largest element, for the value and each gradient."""
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(np.abs(theirs).max(), 1e-3))


@pytest.mark.long
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize(("length", "share"), [(21, 0.4), (16, 1.0), (3, 0.0)])
def test_equals_torch(chunk, length, share, monkeypatch):
    set_chunk(monkeypatch, chunk)
    args = inputs(3, length, share, seed=chunk)
    args[3][1] = 0.0  # one row has no trained token
    assert_equal(by_us(*args), by_torch(*args))
    loss = chunked_cross_entropy(*map(jnp.asarray, args))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, by_torch(*args)[0], rtol=1e-5)


@pytest.mark.parametrize("softcap", [0.8, 5.0])
def test_soft_caps_equal_torch(softcap, monkeypatch):
    """Of the summed loss, and of that by token, whose backward pass is another."""
    set_chunk(monkeypatch, 4)
    args = inputs(3, 21, 0.4)
    expected = by_torch(*args, softcap)
    assert_equal(by_us(*args, softcap=softcap), expected)
    summed = jax.value_and_grad(lambda *a: token_cross_entropy(*a, softcap).sum(), argnums=(0, 1))
    assert_equal(jax.jit(summed)(*args), expected)
    assert abs(float(expected[0]) - float(by_torch(*args)[0])) > 0.5


def test_correct_tokens_are_the_likeliest(monkeypatch):
    set_chunk(monkeypatch, 4)
    hidden, head, targets, weights = inputs(3, 21, 0.4)
    likeliest = torch.tensor(hidden @ head.T).argmax(-1).numpy()
    targets[:, ::2] = likeliest[:, ::2]  # about half of them right
    right = (likeliest == targets) * weights
    np.testing.assert_array_equal(jax.jit(correct_tokens)(hidden, head, targets, weights), right)
    assert 5 < right.sum() < weights.sum() - 5


def test_default_chunk_and_large_logits(monkeypatch):
    """Longer than a chunk; logits of some hundreds, where a softmax without care overflows."""
    monkeypatch.setattr(objective, "CHUNK_LOGITS", 64 * VOCAB)
    assert objective.chunk_size(10**6, VOCAB) == objective.MIN_CHUNK
    hidden, head, targets, weights = inputs(2, objective.MIN_CHUNK + 13, 0.7)
    args = (hidden * 40, head, targets, weights)
    assert np.abs(hidden * 40 @ head.T).max() > 200
    assert_equal(by_us(*args), by_torch(*args))


def test_weights_scale_each_token(monkeypatch):
    set_chunk(monkeypatch, 4)
    hidden, head, targets, _ = inputs(2, 9, 1.0)
    weights = np.random.default_rng(1).random((2, 9)).astype(np.float32) * 2
    logs = torch.log_softmax(torch.tensor(hidden @ head.T), dim=-1).numpy()
    each = -np.take_along_axis(logs, targets[:, :, None], 2)[:, :, 0]
    loss = chunked_cross_entropy(*map(jnp.asarray, (hidden, head, targets, weights)))
    np.testing.assert_allclose(loss, (each * weights).sum(), rtol=1e-5)


def test_bfloat16_hidden_gives_a_float32_loss():
    """Logits add up in float32: far closer to the exact loss of the rounded inputs than bfloat16 is fine."""
    hidden, head, targets, weights = inputs(2, 16, 0.7)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, head)]
    given = (jnp.asarray(hidden, jnp.bfloat16), *map(jnp.asarray, (head, targets, weights)))
    loss = chunked_cross_entropy(*given)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, by_torch(*rounded, targets, weights)[0], rtol=1e-5)


def test_chunks_without_trained_tokens_are_not_computed(monkeypatch):
    """The trained tokens of all rows move to the front, so 7 of 24 need two chunks of 4, not six.

    What lands in the others may be anything, even NaN, and neither loss nor gradient sees it. What fills
    up a chunk that is computed does pass through the head: there NaN would show.
    """
    set_chunk(monkeypatch, 4)
    hidden, head, targets, _ = inputs(2, 12, 1.0)
    weights = np.zeros((2, 12), np.float32)
    weights[0, [2, 7, 11]] = 1.0
    weights[1, [0, 1, 6, 8]] = 1.0
    expected = by_torch(hidden, head, targets, weights)
    poisoned = hidden.copy().reshape(24, WIDTH)
    poisoned[np.argsort(weights.ravel() == 0, kind="stable")[8:]] = np.nan
    loss, (to_hidden, to_head) = by_us(poisoned.reshape(2, 12, WIDTH), head, targets, weights)
    assert_equal((loss, (to_hidden, to_head)), expected)
    assert not np.asarray(to_hidden)[weights == 0].any()
    everywhere = np.where(weights[:, :, None] == 0, np.nan, hidden)
    assert np.isnan(by_us(everywhere, head, targets, weights)[0])


@pytest.mark.parametrize("wanted", [0, (0, 1)])
def test_memory_does_not_grow_with_the_number_of_chunks(wanted, monkeypatch):
    """Neither the logits nor the head are held once a chunk: either is many times what is added here."""
    set_chunk(monkeypatch, 8)
    rows, vocab = 2, 4096

    def temporary(length: int) -> int:
        shapes = [
            jax.ShapeDtypeStruct((rows, length, WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((vocab, WIDTH), jnp.float32),
            jax.ShapeDtypeStruct((rows, length), jnp.int32),
            jax.ShapeDtypeStruct((rows, length), jnp.float32),
        ]
        gradient = jax.jit(jax.grad(lambda *args: chunked_cross_entropy(*args), argnums=wanted))
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(64), temporary(256)  # 8 and 32 chunks
    assert many - few < vocab * WIDTH * 4
    assert many < rows * 256 * vocab * 4 / 4
