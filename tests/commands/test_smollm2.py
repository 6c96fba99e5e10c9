"""The quickstart's base, a real chat model of 135M parameters, from its GGUF file to an adapter in PEFT."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from shared_data import SMOLLM2, needs_smollm2
from transformers import LlamaConfig, LlamaForCausalLM

from jlora.data.prompts import encode_prompt
from jlora.hf.adapters import open_adapter
from jlora.hf.names import name_table
from jlora.hf.pretrained import load_pretrained, open_pretrained
from jlora.hf.verify import probe_logits, probe_tokens
from jlora.inference.generate import generate
from jlora.inference.model import Adapted
from jlora.model.sharding import one_device_mesh

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "jlora" / "quickstart"
PROMPTS = QUICKSTART / "prompts.jsonl"

pytestmark = needs_smollm2


@pytest.fixture(scope="module")
def pretrained():
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        yield load_pretrained(open_pretrained(str(SMOLLM2), None, None), jax.numpy.dtype("float32"), mesh)


@pytest.fixture(scope="module")
def torch_model(pretrained):
    """transformers' Llama on the dequantised weights."""
    source = pretrained.source
    model = LlamaForCausalLM(LlamaConfig(**source.config)).float().eval()
    state = {name: torch.from_numpy(source.read(name)) for name in name_table(pretrained.base.cfg)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return model


def train(output_dir: Path, *overrides: str) -> dict:
    """A run of the quickstart's config; its summary."""
    command = [sys.executable, "-m", "jlora.train", "--config", "quickstart.yaml", "--json", "-q"]
    command += [f"model.path={SMOLLM2}", f"output_dir={output_dir}", *overrides]
    done = subprocess.run(
        command, cwd=QUICKSTART, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> tuple[Path, dict]:
    """Four small steps; held-out loss on the first six held-out rows."""
    folder = tmp_path_factory.mktemp("smollm2")
    lines = (QUICKSTART / "heldout.jsonl").read_text().splitlines()[:6]
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    small = ("training.max_steps=4", "training.batch_size=1", "data.max_length=288", "optimizer.warmup_steps=0")
    return folder / "run", train(folder / "run", f"data.eval={folder / 'heldout.jsonl'}", *small)


def greedy_in_torch(model, pretrained, ids: list[int], max_new_tokens: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=pretrained.tokenizer.eos_id,
            pad_token_id=pretrained.tokenizer.eos_id,
        )
    new = out[0, len(ids) :].tolist()
    return new[:-1] if new[-1] == pretrained.tokenizer.eos_id else new


def test_logits_equal_transformers_on_the_dequantised_weights(pretrained, torch_model):
    tokens = probe_tokens(pretrained.base.cfg.vocab_size, {})
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(tokens).long()).logits[0].numpy()
    found = probe_logits(pretrained.base, {}, jax.numpy.dtype("float32"))
    # Its hidden states reach 22,000, where float32 itself is good to 1e-3, so the logits are compared relative to
    # their own size; float64 puts transformers' own float32 logits off by nearly as much as ours.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_a_few_steps_lower_the_held_out_loss(short_run):
    _, summary = short_run
    assert summary["eval_loss"] < 0.97 * summary["eval_loss_before"]


@pytest.mark.slow
def test_the_adapter_says_the_same_in_peft(pretrained, torch_model, short_run):
    run_dir, _ = short_run
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()[:3]]
    prompts = [encode_prompt(pretrained.tokenizer, row, format="alpaca", prompt="chat") for row in rows]
    float32 = jax.numpy.dtype("float32")
    *_, bare = generate(Adapted(pretrained, {}, float32), prompts, max_new_tokens=24)
    adapter = open_adapter(str(run_dir), pretrained)
    *_, ours = generate(Adapted(pretrained, adapter, float32), prompts, max_new_tokens=24)
    assert ours != bare  # the adapter does something, so equality below says something
    model = PeftModel.from_pretrained(torch_model, run_dir / "adapter").eval()
    theirs = [greedy_in_torch(model, pretrained, ids, 24) for ids in prompts]
    model.unload()
    assert ours == theirs


@pytest.mark.slow
def test_the_quickstart_lowers_the_held_out_loss_by_30_percent(tmp_path):
    summary = train(tmp_path / "run")
    assert summary["eval_loss"] < 0.7 * summary["eval_loss_before"]
