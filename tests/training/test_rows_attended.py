"""Every way to write rows x packing x kernel, by the function that chooses: no sequence sees another one of its row.

Splash runs in Pallas's interpreter, and what cuDNN is asked for is answered by XLA, as in `test_attention`.
"""

import json
import sys
from functools import cache
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import open_base
from tiny import make_llama, make_tokenizer

import jlora.evaluate
from jlora.config import Config
from jlora.data import encoding
from jlora.data.packing import Epochs, pack_row
from jlora.data.tokens import load_tokenizer
from jlora.hf.peft import save_adapter
from jlora.model import attention
from jlora.model.adapter import with_scales, without_scales
from jlora.model.adapter_init import new_adapter
from jlora.model.attention import gpu, tiles, tpu
from jlora.training.step import Forward, make_forward

LENGTH, ROWS, BETA = 128, 4, 0.1
# Splash's rows are multiples of 128 and its heads of 64.
SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.1}

WORDS = ["blue", "tree", "a", "mountain", "so"]
PAIRS = [(f"Say {word} {i}.", " ".join([word] * (1 + i % 4))) for i, word in enumerate(WORDS * 2)]
FORMATS = {
    "alpaca": [{"instruction": ask, "output": say} for ask, say in PAIRS],
    "completion": [{"prompt": ask, "completion": say} for ask, say in PAIRS],
    "text": [{"text": ask + say} for ask, say in PAIRS],
    "messages": [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]} for ask, say in PAIRS
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": say}]} for ask, say in PAIRS
    ],
    "preference": [{"prompt": ask, "chosen": say, "rejected": say[::-1] + " " + ask} for ask, say in PAIRS],
}
GPU = Mock(jax.Device, platform="gpu", compute_capability="9.0", device_kind="H100")
TPU = Mock(jax.Device, platform="tpu", device_kind="TPU v5e")
# Name of the kernel: what the config asks for, and the device that the run is for.
KERNELS = {
    "reference": ("reference", GPU),
    "blocked": ("blocked", GPU),
    "cudnn": ("auto", GPU),
    "splash": ("auto", TPU),
}
FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The base, an adapter whose B is not zero, and the files."""
    folder = tmp_path_factory.mktemp("rows")
    make_llama(folder / "base", **SHAPE)
    make_tokenizer(folder / "base")
    for name, rows in FORMATS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base, digest = open_base(folder / "base")
    section = Config(**sections(folder, "text", True, "auto")).lora
    adapter = new_adapter(section, base.cfg, 0)
    draw = np.random.default_rng(0)
    own, scales = without_scales(adapter)
    own = jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape).astype(np.float32), own)
    adapter = with_scales(own, scales)
    return SimpleNamespace(folder=folder, base=base, digest=digest, adapter=adapter)


@pytest.fixture(autouse=True)
def kernels_here(monkeypatch):
    """Kernels of absent devices answered by this one, several tiles of each in a row."""
    ask = jax.nn.dot_product_attention

    def ask_xla(*qkv, implementation, **how):
        assert implementation == "cudnn"
        with jax.numpy_dtype_promotion("standard"):  # which JAX's own code for XLA needs in bfloat16
            return ask(*qkv, **how, implementation="xla")

    interpreted = tpu._splash_rows
    monkeypatch.setattr(jax.nn, "dot_product_attention", ask_xla)
    monkeypatch.setattr(tpu, "_splash_rows", lambda *qkv, interpret, **how: interpreted(*qkv, **how, interpret=True))
    monkeypatch.setattr(tiles, "TILE", 64)
    monkeypatch.setattr(gpu, "MAX_MASKED_LENGTH", 64)
    monkeypatch.setattr(gpu, "QUERY_BLOCK", 64)


def sections(folder, format, packing, kernel):
    rows = {"train": str(folder / f"{format}.jsonl"), "format": format, "packing": packing, "max_length": LENGTH}
    rows |= {"prompt": "chat", "chat_template": "llama2"} if format in ("alpaca", "messages", "sharegpt") else {}
    return {
        "model": {"path": str(folder / "base"), "dtype": "bfloat16", "attention": kernel},
        "lora": {"rank": 2, "target_modules": "all-linear"},
        "data": rows,
        "objective": {"name": "dpo", "beta": BETA} if format == "preference" else {},
        "training": {"batch_size": ROWS},
        "output_dir": str(folder / "run"),
    }


@cache
def by_token(kernel):
    """(base, adapter, batch) -> log-probabilities of trained tokens, under a kernel; compiled once."""
    return jax.jit(lambda *args: Forward(kernel, "none", FLOAT32).by_token(*args)[0])


@cache
def loss_of(kernel, objective):
    """(base, adapter, batch) -> mean loss of an objective, under a kernel; compiled once."""

    def mean(base, adapter, batch):
        loss, count, _ = Forward(kernel, "none", FLOAT32, objective).loss(base, adapter, batch, None)
        return loss / count

    return jax.jit(mean)


def stacked(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def alone(tiny, adapter, sequences):
    """Log-probabilities of each sequence's trained tokens, in a row of its own, by the reference."""
    rows = [pack_row([sequence], LENGTH) for sequence in sequences]
    rows += [pack_row([], LENGTH)] * (-len(rows) % ROWS)
    score = by_token(attention.reference)
    found = [score(tiny.base, adapter, stacked(rows[at : at + ROWS])) for at in range(0, len(rows), ROWS)]
    return [row[: len(one.ids)] for row, one in zip(np.concatenate(found), sequences, strict=False)]


@pytest.mark.long
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "not packed"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_sequence_in_its_row_is_as_it_is_alone(tiny, format, packing, kernel):
    asked, device = KERNELS[kernel]
    cfg = Config(**sections(tiny.folder, format, packing, asked))
    shown, forward = make_forward(
        cfg, tiny.base.cfg, Mock(jax.sharding.Mesh, devices=np.array([device]), shape={"context": 1})
    )
    assert shown == kernel
    dataset, _ = encoding.read_data(cfg, load_tokenizer(tiny.folder / "base", cfg.data.chat_template))
    epochs = Epochs(dataset, cfg.data, ROWS, seed=0)
    batch, members = stacked([epochs[i] for i in range(ROWS)]), [epochs.rows(0).one(i) for i in range(ROWS)]
    in_rows = [[one for i in row for one in dataset.examples[i].sequences()] for row in members]
    most = max(map(len, in_rows))
    assert most > 1 if packing or format == "preference" else most == 1

    expected = iter(alone(tiny, tiny.adapter, [one for row in in_rows for one in row]))
    found = np.asarray(by_token(forward.attention)(tiny.base, tiny.adapter, batch))
    for row, segments, sequences in zip(found, batch["segments"], in_rows, strict=True):
        for number, _ in enumerate(sequences, 1):
            right = next(expected)
            assert np.abs(right).max() > 0.1
            np.testing.assert_allclose(row[segments == number], right, rtol=0, atol=1e-4)

    if format == "preference":
        pairs = [sequence for row in in_rows for sequence in row]
        policy, base = (np.array([x.sum() for x in alone(tiny, who, pairs)]) for who in (tiny.adapter, {}))
        ratios = (policy - base).reshape(-1, 2)
        right = np.logaddexp(0.0, -BETA * (ratios[:, 0] - ratios[:, 1])).mean()
        assert abs(right - np.log(2)) > 1e-2
        loss = loss_of(forward.attention, cfg.objective)(tiny.base, tiny.adapter, batch)
        np.testing.assert_allclose(loss, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["completion", "preference"])
def test_evaluation_chooses_as_training_does(tiny, format, monkeypatch, capsys):
    """`jlora.evaluate` of a run that does not pack, where its device is a GPU."""
    cfg = Config(**sections(tiny.folder, format, False, "auto"))
    run = tiny.folder / f"run-{format}"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(cfg.dump_yaml(), encoding="utf-8")
    save_adapter(run / "adapter", tiny.adapter, cfg.lora, cfg.model.path, tiny.digest)
    choose, chosen = attention.choose, []

    def on_gpu(name, device, *shapes, **how):
        chosen.append(choose(name, GPU, *shapes, **how)[1])
        return name, chosen[-1]

    monkeypatch.setattr(attention, "choose", on_gpu)
    monkeypatch.setattr("sys.argv", ["evaluate", "--base", cfg.model.path, "--adapter", str(run), "--data"])
    monkeypatch.setattr("sys.argv", [*sys.argv, str(cfg.data.train), "--json"])
    with pytest.raises(SystemExit) as ended:
        jlora.evaluate.main()
    assert not ended.value.code
    figures = json.loads(capsys.readouterr().out)
    assert chosen == [attention.cudnn if format == "preference" else attention.cudnn_one_segment]
    assert figures["rows"] == len(PAIRS) and np.isfinite(figures["loss"])
