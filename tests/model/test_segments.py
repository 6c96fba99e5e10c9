"""Packed rows: a sequence is as it is alone."""

import jax
import jax.numpy as jnp
import numpy as np
from parity import assert_close, hidden, logits, open_base, torch_logits
from ropes import DYNAMIC
from tiny import make_llama

LENGTHS = ((5, 9, 4), (11, 3))  # of the sequences of two rows; what is left of ROW is padding
ROW = 20


def packed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, positions and segments, [B ROW]; no token is in a row twice."""
    draw = np.random.default_rng(5)
    tokens = np.stack([draw.permutation(300)[:ROW] for _ in LENGTHS]).astype(np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for segment, length in enumerate(lengths, 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = segment
            start += length
    return tokens, positions, segments


def test_packed_rows_equal_separate_ones(llama, base, adapter):
    _, model = llama
    tokens, positions, segments = packed()
    for factors in ({}, adapter):
        together = logits(base, factors, tokens, positions, segments)
        for row, lengths in enumerate(LENGTHS):
            ends = np.cumsum(lengths)
            for start, end in zip(ends - lengths, ends, strict=True):
                alone = np.zeros((2, ROW), np.int32)  # one compiled shape; causality hides the rest
                alone[0, : end - start] = tokens[row, start:end]
                separate = logits(base, factors, alone)[0, : end - start]
                assert_close(together[row, start:end], separate, 1e-5)
                if not factors:
                    theirs = torch_logits(model, tokens[row : row + 1, start:end])[0]
                    assert_close(together[row, start:end], theirs, 1e-4)


def test_a_token_reaches_its_own_segment_and_no_earlier_position(base):
    """By gradients: tokens of a row are distinct, so a row of the embedding's gradient is one position."""
    tokens, positions, segments = packed()
    direction = np.random.default_rng(6).normal(size=48).astype(np.float32)

    @jax.jit
    def reach(base, tokens, positions, segments):
        def score(base, position):
            states = hidden(base, {}, tokens[None], positions[None], segments[None], "none")
            return states[0, position] @ direction

        gradients = jax.vmap(jax.grad(score), in_axes=(None, 0))(base, jnp.arange(ROW))
        return jnp.any(gradients.embed_tokens[...] != 0.0, axis=-1)  # [T, V]

    for row in range(len(LENGTHS)):
        found = np.asarray(reach(base, tokens[row], positions[row], segments[row]))
        other = np.setdiff1d(np.arange(300), tokens[row])
        assert not found[:, other].any()
        same = segments[row][:, None] == segments[row][None, :]
        expected = same & (positions[row][None, :] <= positions[row][:, None])
        real = segments[row] > 0
        np.testing.assert_array_equal(found[:, tokens[row]][real], expected[real])
        assert not found[:, tokens[row]][~real][:, real].any()


def test_dynamic_rope_of_a_segment_is_that_of_the_segment_alone(tmp_path):
    """Segments of 9 and 11 tokens are longer than the 8 positions, those beside them are not."""
    model = make_llama(tmp_path, **(DYNAMIC | {"max_position_embeddings": 8}))
    tokens, positions, segments = packed()
    together = logits(open_base(tmp_path)[0], {}, tokens, positions, segments)
    for row, lengths in enumerate(LENGTHS):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            # transformers goes on with the longest length that it has seen; a fresh one has seen none.
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
            theirs = torch_logits(model, tokens[row : row + 1, start:end])[0]
            assert_close(together[row, start:end], theirs, 1e-4)
