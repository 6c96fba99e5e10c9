"""The lm-evaluation-harness on a jlora model, on tasks made here: its log-probabilities against two references."""

import json
import math

import lm_eval
import numpy as np
import pytest
import torch
from shared_data import SHARED, needs_data
from tiny import make_completions, make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

from jlora.errors import ConfigError
from jlora.evaluation import __main__ as command
from jlora.evaluation import harness


def test_without_the_library_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(harness, "LM", None)
    with pytest.raises(
        ConfigError, match=r"needs lm_eval, which is not .*; pip install 'jlora\[harness\] @ git\+https"
    ):
        harness.JloraLM("base")
    with pytest.raises(SystemExit) as exit:
        command.main()
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def by_transformers(folder, ids, start, adapter=None):
    """Sum of log-probabilities of the ids from `start` on, and whether each is the likeliest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0, start - 1 : -1], dim=-1)
    targets = torch.tensor(ids[start:])
    return logs.gather(1, targets[:, None]).sum().item(), bool((logs.argmax(-1) == targets).all())


@needs_data
def test_log_probabilities_of_a_real_model_and_its_adapter():
    base, adapter = SHARED / "stories260K", SHARED / "stories260K_lora_reviews"
    for folder in (None, str(adapter)):
        lm = harness.JloraLM(str(base), folder, dtype="float32", batch_size=2, max_length=64)
        encode = lm.tokenizer.encode
        greedy = lm.generate_until(
            [request("generate_until", "Once upon a time", {"until": ["."], "max_gen_toks": 24})]
        )
        pairs = [
            ("Once upon a time", ", there was a little girl"),
            ("Once upon a time ", "there was a boy"),  # the space goes with the word
            ("Lily", " went to the park. " * 4),
            ("", "Tom and Sue"),
            ("Once upon a time", greedy[0]),
        ]
        found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
        for (context, continuation), (log, is_greedy) in zip(pairs, found, strict=True):
            start = 1 + len(encode(context.rstrip())) if context else 1
            log_of, greedy_of = by_transformers(base, [1, *encode(context + continuation)], start, folder)
            assert log == pytest.approx(log_of, abs=1e-4) and is_greedy == greedy_of
        assert found[-1][1] and not found[2][1] and greedy[0] and "." not in greedy[0]
        # A text in windows: each token once, of the last window only what is new.
        text = "The dog ran to the big tree and sat in the sun. " * 5
        ids = encode(text)
        assert len(ids) > 63
        (rolling,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
        first = by_transformers(base, [1, *ids[:63]], 1, folder)[0]
        rest, at = 0.0, 63
        while at < len(ids):
            end = min(at + 63, len(ids))
            window = ids[max(0, end - 64) : end]
            rest += by_transformers(base, window, len(window) - (end - at), folder)[0]
            at = end
        assert rolling == pytest.approx(first + rest, abs=2e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    make_llama(folder / "base", max_position_embeddings=256)
    make_tokenizer(folder / "base")
    make_completions(folder / "rows.jsonl", 6)
    return folder


@pytest.mark.long
def test_a_task_of_ones_own(tiny, monkeypatch, capsys):
    """Multiple choice, generation and perplexity over local rows; the loss is that of `jlora.evaluate`."""
    from lm_eval.tasks import TaskManager

    from jlora.evaluate import main

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tiny / "cache"))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tiny / "rows.jsonl")}, "cache_dir": str(tiny / "cache")},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    choice = common | {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{[completion + '</s>', ' something else']}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    generation = common | {
        "task": "generation",
        "output_type": "generate_until",
        "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    lm = harness.JloraLM(str(tiny / "base"), dtype="float32", quantization="none", batch_size=4)
    result = lm_eval.simple_evaluate(
        model=lm, tasks=[choice, generation], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    assert 0 <= result["results"]["choice"]["acc,none"] <= 1
    assert result["results"]["generation"]["exact_match,none"] == 0
    samples = result["samples"]["choice"]
    assert len(samples) == 6
    total = sum(float(sample["resps"][0][0][0]) for sample in samples)

    arguments = ("--base", tiny / "base", "--data", tiny / "rows.jsonl", "--format", "completion", "--dtype", "float32")
    monkeypatch.setattr("sys.argv", ["jlora.evaluate", *map(str, arguments), "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main()
    ours = json.loads(capsys.readouterr().out)
    assert total == pytest.approx(-ours["loss"] * ours["tokens"], abs=1e-4 * ours["tokens"])
    assert math.isfinite(total) and np.sign(total) == -1


def test_what_it_refuses(tiny):
    from lm_eval.api.registry import get_model

    assert get_model("jlora") is harness.JloraLM
    lm = harness.JloraLM.create_from_arg_string(
        f"base={tiny}/base,dtype=float32,chat_template=llama2", {"batch_size": 3, "device": None}
    )
    assert (lm.batch_size, lm.max_length) == (3, 256)
    assert lm.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<s>[INST] Hi [/INST]"
    assert lm.tokenizer_name.startswith("jlora-") and "[INST]" in lm.chat_template()
    with pytest.raises(ConfigError, match="greedily"):
        lm.generate_until([request("generate_until", "a", {"do_sample": True, "temperature": 0.7})])
    with pytest.raises(ConfigError, match="takes no argument pretrained"):
        harness.JloraLM(str(tiny / "base"), pretrained="x")
