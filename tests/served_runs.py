"""Two small runs that have learnt when to stop, as a server would be checked for them."""

import json

from command_line import shell
from tiny import make_completions, make_llama, make_tokenizer, write_config

# Of llama.cpp's blocks of 32.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
MERGES = (("l", "u"), ("b", "lu"), ("blu", "e"))
ADAPTED = {"rank": 8, "alpha": 16, "target_modules": "all-linear"}


def make_served_runs(folder):
    """`base` and `other`; `plain` on completions, `chat` on conversations by the template llama2."""
    for seed, name in enumerate(("base", "other")):
        make_llama(folder / name, max_position_embeddings=512, seed=seed, **SIZES)
        make_tokenizer(folder / name, merges=MERGES)
    make_completions(folder / "rows.jsonl", 60)
    make_completions(folder / "eval.jsonl", 12, first=100)
    for name in ("rows", "eval"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        if name == "eval":  # one that is longer than a short context
            rows.insert(5, {"prompt": "mountain " * 30 + "7:", "completion": " mountain"})
            (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        chats = [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
            for r in rows
        ]
        (folder / f"{name}_chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    for run, ending, format in (("plain", "", "completion"), ("chat", "_chat", "messages")):
        data = {"format": format, "eval": str(folder / f"eval{ending}.jsonl"), "max_length": 320}
        data |= {"chat_template": "llama2"} if format == "messages" else {}
        write_config(
            folder / f"{run}.yaml", folder / "base", folder / f"rows{ending}.jsonl", folder / run, lora=ADAPTED,
            data=data, training={"max_steps": 60, "batch_size": 2}, optimizer={"learning_rate": 2e-2},
        )  # fmt: skip
        done = shell("train", "--config", folder / f"{run}.yaml", "-q")
        assert done.returncode == 0, done.stderr
