"""Objectives on pairs against TRL, and a run on pairs: its batches, metrics, accumulation and going on."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import open_base
from shared_data import SHARED, needs_data, read_rows
from tiny import make_llama, make_tokenizer, write_config

import jlora.evaluate
from jlora.config import DataSection, LoraSection, ObjectiveSection, load_config
from jlora.data import encoding, packing
from jlora.data.tokens import load_tokenizer
from jlora.errors import ConfigError, DataError
from jlora.hf.peft import save_adapter
from jlora.model import attention
from jlora.model.adapter_init import new_adapter
from jlora.training.metrics import read_metrics
from jlora.training.objective import pair_loss
from jlora.training.run import train
from jlora.training.step import Forward

STORIES = SHARED / "stories260K"
LENGTH, AT_ONCE = 96, 25  # of one sequence; pairs
SECTION = LoraSection(rank=4, alpha=8, target_modules="all-linear")


def preference_rows(count):
    """Real answers, each preferred to that of the row after it."""
    rows = [row for row in read_rows("instruct/alpaca_libre.jsonl") if len(row["instruction"] + row["input"]) < 100]
    return [
        {"prompt": f"{row['instruction']}\n{row['input']}\n", "chosen": row["output"], "rejected": other["output"]}
        for row, other in zip(rows[:count], rows[1:], strict=False)
    ]


@pytest.fixture(scope="module")
def ours():
    """The real small model with a random adapter: base, adapter, tokenizer and 200 pairs."""
    base, digest = open_base(STORIES)
    adapter = new_adapter(SECTION, base.cfg, 0)
    draw = np.random.default_rng(0)
    adapter = {
        name: replace(lora, lora_b=jnp.asarray(0.1 * draw.standard_normal(lora.lora_b.shape), jnp.float32))
        for name, lora in adapter.items()
    }
    return SimpleNamespace(base=base, digest=digest, adapter=adapter, rows=preference_rows(200))


@pytest.fixture(scope="module")
def pairs(ours, tmp_path_factory):
    """The pairs as our examples."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ours.rows), encoding="utf-8")
    section = DataSection(train=str(file), format="preference", max_length=2 * LENGTH, on_bad_row="skip")
    return encoding.tokenize(str(file), load_tokenizer(STORIES, None), section).examples


@pytest.fixture(scope="module")
def make_trainer(ours, tmp_path_factory):
    """TRL's trainer for an objective, over transformers' and PEFT's model with our adapter in it."""
    import datasets
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    save_adapter(folder / "adapter", ours.adapter, SECTION, str(STORIES), ours.digest)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(STORIES)
    tokenizer.pad_token = tokenizer.eos_token
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    args = DPOConfig(str(folder / "run"), max_length=LENGTH, report_to="none", use_cpu=True, bf16=False)
    rows = datasets.Dataset.from_list(ours.rows)
    trainer = DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    set_peft_model_state_dict(trainer.model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    return trainer


def batch_of(examples, rows=AT_ONCE):
    made = [packing.pack_row([example], 2 * LENGTH) for example in examples]
    made += [packing.pack_row([], 2 * LENGTH)] * (rows - len(made))
    return {name: jnp.asarray(np.stack([row[name] for row in made])) for name in made[0]}


def gradient_of(ours, objective, reference=None):
    """batch -> (mean loss, metrics), gradients; compiled once."""
    forward = Forward(attention.reference, "none", jnp.dtype("float32"), objective)

    @jax.jit
    def of(adapter, batch):
        def loss(adapter):
            total, count, sums = forward.loss(ours.base, adapter, batch, None, reference)
            return total / count, {name: value / count for name, value in sums.items()}

        return jax.value_and_grad(loss, has_aux=True)(adapter)

    return lambda batch: jax.tree.map(np.asarray, of(ours.adapter, batch))


def torch_gradients(model):
    """PEFT's gradients as ours are shaped, {(projection, side): [L, ...]}; and none left behind."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            key = (parts[-4], {"lora_A": "a", "lora_B": "b"}[parts[-3]])
            found.setdefault(key, []).append(parameter.grad.T.numpy().copy())
            parameter.grad = None
    return {key: np.stack(layers) for key, layers in found.items()}


def assert_gradients(ours, theirs):
    """To 1e-4, and to that share of the largest element."""
    for name, lora in ours.items():
        for side, found in (("a", lora.lora_a), ("b", lora.lora_b)):
            right = theirs[name, side]
            assert np.abs(right).max() > 1e-3
            np.testing.assert_allclose(
                found.reshape(right.shape), right, rtol=0, atol=1e-4 * min(1.0, np.abs(right).max())
            )


def by_trl(trainer, rows, **settings):
    """Mean loss, metrics and gradients of TRL on rows of its data set."""
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer._metrics["train"].clear()
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), metrics, torch_gradients(trainer.model)


@needs_data
def test_pairs_are_tokenised_as_trl_does(pairs, make_trainer):
    assert len(pairs) == len(make_trainer.train_dataset) == 200
    for ours, theirs in zip(pairs, make_trainer.train_dataset, strict=True):
        for sequence, answer in zip(ours.sequences(), ("chosen_ids", "rejected_ids"), strict=True):
            ids = (theirs["prompt_ids"] + theirs[answer])[:LENGTH]
            assert sequence.ids.tolist() == ids
            assert sequence.trained.tolist() == (np.arange(len(ids)) >= len(theirs["prompt_ids"])).tolist()


@pytest.mark.long
@needs_data
def test_dpo_is_that_of_trl(ours, pairs, make_trainer, record_property):
    """Loss, rewards and gradients of 200 real rows, eight at a time, to 1e-4."""
    step = gradient_of(ours, ObjectiveSection(name="dpo", beta=0.1))
    worst = 0.0
    for start in range(0, len(pairs), AT_ONCE):
        rows = range(start, min(start + AT_ONCE, len(pairs)))
        (loss, metrics), gradients = step(batch_of([pairs[i] for i in rows]))
        right, expected, theirs = by_trl(make_trainer, rows, loss_types=["sigmoid"], beta=0.1)
        found = metrics | {"loss": loss}
        expected = {name: expected[name] for name in metrics} | {"loss": right}
        assert abs(expected["rewards/chosen"]) > 1e-2
        for name, value in expected.items():
            # Sums of some hundred log-probabilities, of which float32 keeps seven digits.
            assert abs(found[name] - value) <= 1e-4 * max(1.0, abs(value)), name
            worst = max(worst, abs(found[name] - value)) if name != "logps/chosen" else worst
        assert_gradients(gradients, theirs)
    record_property("largest_difference", float(worst))


@pytest.fixture(scope="module")
def sums():
    """Log-probabilities of tokens [2 P, T] as TRL holds them, chosen ones first; their mask; the reference's sums."""
    draw = np.random.default_rng(0)
    mask = np.arange(9) < draw.integers(1, 10, (8, 1))
    logps = -draw.exponential(2.0, mask.shape) * mask
    return [torch.tensor(x, dtype=torch.float32) for x in (logps, mask, -draw.exponential(9.0, 8))]


def by_pairs(values):
    """[2 P] chosen ones first -> [1 P 2]."""
    return jnp.asarray(values.detach().numpy().reshape(2, -1).T[None])


@needs_data
@pytest.mark.parametrize(
    ("section", "loss_type", "rows"),
    [
        ({"name": "dpo", "beta": 0.3}, "sigmoid", 4),
        ({"name": "ipo", "beta": 0.3}, "ipo", 4),
        ({"name": "hinge", "beta": 0.3}, "hinge", 4),
        # TRL's loss over sorted ratios is the smoothed one where there is one pair.
        ({"name": "dpo", "beta": 0.3, "label_smoothing": 0.2}, "aot", 1),
    ],
    ids=["dpo", "ipo", "hinge", "smoothed"],
)
def test_each_loss_is_that_of_trl(sums, make_trainer, section, loss_type, rows):
    section, keep = ObjectiveSection(**section), [*range(rows), *range(4, 4 + rows)]
    logps, mask, reference = (x[keep] for x in sums)
    logps = logps.clone().requires_grad_()
    nothing = torch.zeros_like(logps)
    outputs = SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing > 0)
    trainer = make_trainer
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"loss_types": [loss_type], "precompute_ref_logps": True, **section.model_dump()}.items():
            if name != "name":
                patch.setattr(trainer, name, value)
        shifted = torch.nn.functional.pad(mask.long(), (1, 0))
        batch = {"input_ids": shifted, "attention_mask": shifted, "completion_mask": shifted}
        batch |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference.chunk(2), strict=True))
        right = trainer._compute_loss(lambda **_: outputs, batch, return_outputs=False)
    right.backward()

    def loss(policy):
        total, count, figures = pair_loss(section, policy, by_pairs(reference), by_pairs(mask.sum(1)))
        return total / count, figures

    (found, figures), gradient = jax.value_and_grad(loss, has_aux=True)(by_pairs(logps.sum(1)))
    np.testing.assert_allclose(found, right.item(), rtol=1e-5)
    theirs = by_pairs(logps.grad[:, 0])
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(gradient, theirs, rtol=1e-4, atol=1e-6)
    margins = trainer._metrics["train"]["rewards/margins"][-1]
    np.testing.assert_allclose(figures["rewards/margins"] / rows, margins, rtol=1e-5)


@needs_data
def test_orpo_is_its_odds_ratio_in_trl(sums):
    """Beside the mean cross-entropy of each chosen answer, as the paper has it."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logps, mask, _ = sums
    logps, lengths = logps.sum(1).requires_grad_(), mask.sum(1)
    chosen, rejected = (logps / lengths).chunk(2)
    trainer = SimpleNamespace(beta=0.2, accelerator=SimpleNamespace(device="cpu"))
    losses, chosen_rewards, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    right = (-chosen - losses).mean()
    right.backward()

    def loss(policy):
        total, count, figures = pair_loss(ObjectiveSection(name="orpo", beta=0.2), policy, policy, by_pairs(lengths))
        return total / count, figures

    (found, figures), gradient = jax.value_and_grad(loss, has_aux=True)(by_pairs(logps))
    np.testing.assert_allclose(found, right.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, by_pairs(logps.grad), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(figures["rewards/chosen"] / 4, chosen_rewards.mean().item(), rtol=1e-5)


def test_orpo_of_a_certain_answer_is_finite():
    sums = jnp.asarray([[[0.0, -3.0], [0.0, 0.0]]])
    lengths = jnp.asarray([[[2.0, 3.0], [0.0, 0.0]]])

    def loss(policy):
        return pair_loss(ObjectiveSection(name="orpo"), policy, policy, lengths)[0]

    value, gradient = jax.value_and_grad(loss)(sums)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert not gradient[0, 1].any()  # there is no second pair


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    words = ["blue", "tree", "a", "mountain", "so"]
    for name, first in (("rows.jsonl", 0), ("held.jsonl", 100)):
        rows = [
            {
                "prompt": f"{words[i % 5]} {first + i}:",
                "chosen": " " + words[i % 5] * (1 + i % 4),
                "rejected": f" {words[i % 3]}!",
            }
            for i in range(24)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def tiny_config(tiny, run, *overrides):
    path = write_config(tiny / "run.yaml", tiny / "base", tiny / "rows.jsonl", tiny / run)
    return load_config(path, ["data.format=preference", "data.max_length=128", "objective.name=dpo", *overrides])


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.long
def test_a_run_on_pairs(tiny, capsys):
    """It learns to prefer, logs what TRL logs, accumulates exactly, goes on bit for bit, and is evaluated.

    All from an adapter whose B is not zero: the model that pairs are compared with has it too, as in TRL.
    """
    base, digest = open_base(tiny / "base")
    adapter = new_adapter(SECTION, base.cfg, 0)
    adapter = {name: replace(lora, lora_b=lora.lora_b + 0.1) for name, lora in adapter.items()}
    save_adapter(tiny / "first", adapter, SECTION, str(tiny / "base"), digest)
    begun = "training.max_steps=4", "lora.target_modules=all-linear", f"lora.init_from={tiny / 'first'}"
    train(tiny_config(tiny, "whole", *begun), quiet=True)
    settings = f"data.eval={tiny / 'held.jsonl'}", "training.gradient_accumulation_steps=2", "training.save_every=2"
    cfg = tiny_config(tiny, "parts", *begun, *settings)
    summary = train(cfg, quiet=True)
    lines = read_metrics(tiny / "parts" / "metrics.jsonl")
    first = next(line for line in lines if "loss" in line)
    assert abs(first["loss"] - np.log(2)) < 1e-6 and first["rewards/margins"] == 0.0
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen"} <= first.keys()
    last = lines[-1]
    assert last["eval_loss"] < np.log(2) - 0.01 and last["eval_rewards/accuracies"] > 0.5 and last["eval_pairs"] == 24
    assert summary["eval_loss"] == last["eval_loss"]
    np.testing.assert_allclose(losses(tiny / "parts"), losses(tiny / "whole"), atol=1e-6)

    shutil.copytree(tiny / "parts", tiny / "resumed")
    shutil.rmtree(tiny / "resumed" / "checkpoints" / "4")
    (tiny / "resumed" / "summary.json").unlink()
    train(cfg.model_copy(update={"output_dir": str(tiny / "resumed")}), quiet=True)
    adapters = [(tiny / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("parts", "resumed")]
    assert adapters[0] == adapters[1]

    argv = ["--base", tiny / "base", "--adapter", tiny / "parts", "--data", tiny / "rows.jsonl", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            jlora.evaluate.main()
    assert not ended.value.code
    figures = json.loads(capsys.readouterr().out)
    assert figures["pairs"] == figures["rows"] == 24 and figures["rewards/accuracies"] > 0.5


MESSAGES = {
    "prompt": [{"role": "user", "content": "Hi"}],
    "chosen": [{"role": "assistant", "content": "Hello"}],
    "rejected": [{"role": "assistant", "content": "No"}],
}


def tokenized(tiny, rows, **section):
    file = tiny / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = load_tokenizer(tiny / "base", None)
    turns = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = replace(tokenizer, chat_template=template)
    section = DataSection(train=str(file), format="preference", **{"max_length": 128} | section)
    return tokenizer, encoding.tokenize(str(file), tokenizer, section)


def test_conversations_with_and_without_their_prompt(tiny):
    whole = {name: MESSAGES["prompt"] + MESSAGES[name] for name in ("chosen", "rejected")}
    tokenizer, found = tokenized(tiny, [MESSAGES, whole, whole | {"prompt": "Hi"}])
    first, *others = found.examples
    chosen, rejected = first.sequences()
    assert tokenizer.decode(chosen.ids) == "user: Hi\nassistant: Hello\n"
    assert tokenizer.decode(chosen.ids[chosen.trained]) == "Hello\n"
    assert tokenizer.decode(rejected.ids[rejected.trained]) == "No\n"
    for other in others:
        assert other.ids.tolist() == first.ids.tolist() and other.second == first.second


def test_strings_without_a_prompt_share_their_beginning(tiny):
    tokenizer, found = tokenized(tiny, [{"chosen": "Q: a? A: yes", "rejected": "Q: a? A: no"}])
    chosen, rejected = found.examples[0].sequences()
    assert tokenizer.decode(chosen.ids[chosen.trained]) == " yes" and chosen.ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "same", "rejected": "same"}, '"chosen" and "rejected" are equal'),
        ({"chosen": " ", "rejected": "a"}, '"chosen" is empty'),
        ({"chosen": "a", "rejected": ""}, '"rejected" is empty'),
        ({"chosen": "a"}, '"rejected" is missing'),
        ({"chosen": "a", "rejected": [1]}, '"rejected" is int, not str'),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": None, "chosen": "ab", "rejected": "ba"}, "no prompt"),
        ({"prompt": "x" * 200, "chosen": "a", "rejected": "b"}, "prompt alone fills half of data.max_length=128"),
        ({"chosen": "y" * 100 + "a", "rejected": "y" * 100 + "b"}, "cut at 64 tokens (half of data.max_length)"),
        (MESSAGES | {"chosen": []}, '"chosen" holds no answer'),
        (MESSAGES | {"chosen": [{"role": "user", "content": "x"}]}, '"chosen" is not the assistant'),
        (MESSAGES | {"chosen": MESSAGES["rejected"]}, "are equal"),
    ],
)
def test_a_bad_pair_is_named_by_file_and_line_or_dropped(tiny, row, reason):
    good = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    with pytest.raises(DataError, match=r"some\.jsonl:2: ") as error:
        tokenized(tiny, [good, {"prompt": "Hi"} | row])
    assert reason in str(error.value)
    _, found = tokenized(tiny, [good, {"prompt": "Hi"} | row], on_bad_row="skip")
    assert len(found.examples) == sum(found.dropped.values()) == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.format=alpaca"], "objective.name=dpo needs pairs; set data.format=preference"),
        (["objective.name=sft"], "data.format=preference holds pairs"),
        (["method=full"], "set method=lora"),
        (["data.train_on=all"], "set data.train_on=response"),
        (["objective.name=ipo", "objective.label_smoothing=0.1"], "label_smoothing is dpo's"),
        (["objective.beta=0"], "greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, overrides, says):
    with pytest.raises(ConfigError, match=says):
        tiny_config(tiny, "refused", *overrides)
