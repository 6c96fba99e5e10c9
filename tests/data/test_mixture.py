"""Several sources with weights: shares that are exact, orders by the seed alone, a position that is kept."""

import hashlib
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from data_files import RANDOM_LENGTHS, jsonl, lengths_dataset, section, write
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora.config import DataSource, load_config
from jlora.data.checks import count_sources
from jlora.data.dataset import hold_out, join
from jlora.data.encoding import read_data
from jlora.data.packing import Epochs, batches
from jlora.data.tokens import load_tokenizer
from jlora.errors import ConfigError, DataError
from jlora.training.run import train


def mixture(sizes, weights):
    """Examples of several sources; no two of all sources are equal."""
    lengths = [RANDOM_LENGTHS[i % len(RANDOM_LENGTHS)] for i in range(sum(sizes))]
    sources = [DataSource(path=f"{i}.jsonl", weight=weight) for i, weight in enumerate(weights)]
    parts = []
    for number, size in enumerate(sizes):
        parts.append(lengths_dataset(lengths[:size]))
        parts[-1].digest = str(number)
    return join(sources, parts)


def drawn(dataset, epoch, seed=0):
    epochs = Epochs(dataset, section(), 4, seed)
    return [i for row in epochs.rows(epoch) for i in row]


def test_shares_are_exact_and_no_row_comes_again_before_all_came():
    dataset = mixture((10, 40), (3.0, 1.0))
    epochs = Epochs(dataset, section(), 4, 0)
    seen = Counter()
    for epoch in range(4):
        rows = [i for row in epochs.rows(epoch) for i in row]
        first = sum(i < 10 for i in rows)
        assert abs(len(rows) - 50) <= 1 and abs(first - 37.5) <= 1 and abs(len(rows) - first - 12.5) <= 1
        seen.update(rows)
        for size in (range(10), range(10, 50)):
            counts = [seen[i] for i in size]
            assert max(counts) - min(counts) <= 1
    assert [seen[i] for i in (0, 9)] == [15, 15] and sum(seen[i] for i in range(10, 50)) == 50
    assert [source["first_epoch"] for source in count_sources(dataset)] == [38, 12]
    assert [source["examples"] for source in count_sources(dataset)] == [10, 40]


def test_order_depends_on_seed_and_epoch_alone():
    dataset = mixture((10, 40, 5), (0.5, 0.2, 2))
    one = Epochs(dataset, section(), 4, 7)
    wanted = [one.rows(epoch) for epoch in range(3)]
    again = Epochs(mixture((10, 40, 5), (0.5, 0.2, 2)), section(), 4, 7)
    assert [again.rows(epoch) for epoch in (2, 0, 1)] == [wanted[epoch] for epoch in (2, 0, 1)]
    assert drawn(dataset, 0, seed=8) != drawn(dataset, 0, seed=7) != drawn(dataset, 1, seed=7)
    # Weights that are the sizes, or none, take every row once an epoch.
    for weights in ((10, 40, 5), (None, None, None)):
        assert sorted(drawn(mixture((10, 40, 5), weights), 1)) == list(range(55))


def test_position_of_a_mixture_is_kept():
    def start():
        return batches(Epochs(mixture((10, 40), (3, 1)), section(), 4, 7), 4)

    whole = start()
    expected = [next(whole)["tokens"] for _ in range(14)]  # over the end of the first epoch
    first = start()
    for _ in range(3):
        next(first)
    second = start()
    second.set_state(json.loads(json.dumps(first.get_state())))
    for wanted in expected[3:]:
        np.testing.assert_array_equal(next(second)["tokens"], wanted)


def test_tokens_and_places_of_batches():
    epochs = Epochs(mixture((10, 40), (3, 1)), section(), 4, 7)
    total = epochs.num_batches(2)
    tokens = [epochs.tokens_in(batch) for batch in range(total)]
    assert [epochs.tokens_at(batch) for batch in range(total + 1)] == np.cumsum([0, *tokens]).tolist()
    assert all(place.startswith("rows.jsonl:") for place in epochs.places_in(0))


def test_old_epochs_are_forgotten_and_made_again_where_they_are_large(monkeypatch):
    wanted = [drawn(mixture((10, 40), (3, 1)), epoch) for epoch in range(5)]
    monkeypatch.setattr("jlora.data.packing.KEPT", 60)
    epochs = Epochs(mixture((10, 40), (3, 1)), section(), 4, 0)
    for epoch in (4, 0, 3, 1, 2, 4):
        assert [i for row in epochs.rows(epoch) for i in row] == wanted[epoch]
        assert len(epochs._kept) <= 2


def test_rows_held_out_of_a_mixture():
    dataset = mixture((10, 40), (3, 1))
    kept, held = hold_out(dataset, 0.3, seed=1)
    sizes = [part.examples for part in kept.parts]
    assert sum(sizes) == len(kept.examples) == 35 and len(held.examples) == 15 and held.parts == ()
    found = sorted(int(example.ids[0]) for part in (kept, held) for example in part.examples)
    assert found == sorted(int(example.ids[0]) for example in dataset.examples)
    # The lengths, which packing goes by, are those of the examples.
    assert kept.lengths.tolist() == [len(example.ids) for example in kept.examples]
    with pytest.raises(DataError, match="leaves no row of 0.jsonl"):
        hold_out(mixture((1, 40), (3, 1)), 0.95, seed=1)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    make_llama(folder / "base", num_hidden_layers=1)
    make_tokenizer(folder / "base")
    make_completions(folder / "a.jsonl", 24)
    write(folder / "b.jsonl", jsonl([{"prompt": f"b{i}", "completion": "y" * (3 + i)} for i in range(8)]))
    return folder


def config_of(material, tmp_path, weights=(1.0, 3.0), **keys):
    sources = [
        {"path": str(material / name)} | ({} if weight is None else {"weight": weight})
        for name, weight in zip(("a.jsonl", "b.jsonl"), weights, strict=True)
    ]
    data = {"format": "completion", "max_length": 64, "train": sources} | keys
    return write_config(
        tmp_path / "c.yaml", material / "base", material, tmp_path / "run", data=data,
        training={"batch_size": 4, "max_steps": 6, "save_every": 3, "keep_checkpoints": 9},
    )  # fmt: skip


def test_digest_of_a_mixture_follows_sources_and_weights(material, tmp_path):
    tokenizer = load_tokenizer(material / "base", None)

    def digest(weights=(1.0, 3.0), **keys):
        return read_data(load_config(config_of(material, tmp_path, weights, **keys)), tokenizer)[0].digest

    first = digest()
    assert digest() == first == digest(cache_dir=str(tmp_path / "cache"))
    assert len({first, digest((2.0, 3.0)), digest((None, None)), digest(train_on="all")}) == 4


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], "data.train: should be"),
        (["a.jsonl"], "each source of a mixture is {path: FILE, weight: NUMBER}, not 'a.jsonl'"),
        ([{"weight": 1}], "each source of a mixture"),
        ([{"path": "a", "wieght": 1}], "path and weight, not 'wieght'"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "give every source of the mixture a weight, or none of them"),
        ([{"path": "a", "weight": 0}], "greater than 0"),
    ],
)
def test_mixture_that_is_none(material, tmp_path, train, words):
    with pytest.raises(ConfigError) as caught:
        load_config(config_of(material, tmp_path, train=train))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.long
def test_run_on_a_cached_mixture_goes_on_bit_for_bit(material, tmp_path):
    path = config_of(material, tmp_path, cache_dir=str(tmp_path / "cache"))
    summary = train(load_config(path), quiet=True)
    assert [source["examples"] for source in summary["rows"]["sources"]] == [24, 8]
    assert [source["first_epoch"] for source in summary["rows"]["sources"]] == [8, 24]

    def digest():
        return hashlib.sha256((tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()

    unbroken = digest()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    shutil.rmtree(tmp_path / "run" / "adapter")
    # Where the rows are kept is no matter: from memory, it is the same run.
    assert train(load_config(path, ["data.cache_dir=null"]), quiet=True)["steps"] == 6
    assert digest() == unbroken
