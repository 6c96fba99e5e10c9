"""What `jlora verify` does: ask a server for a run's held-out rows, and judge what it says by the run's own model."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jlora.config import Config
from jlora.errors import ConfigError, ModelError
from jlora.evaluation.endpoint import Endpoint
from jlora.evaluation.faults import Judge, Verdict
from jlora.evaluation.served import Scorer, Seen, ask_server
from jlora.evaluation.served_rows import ServedRow, held_out_rows, on_day
from jlora.hf.adapters import open_adapter, run_config
from jlora.inference.answers import answer
from jlora.inference.model import Adapted, open_adapted
from jlora.model.sharding import one_device_mesh
from jlora.reports.served import ServedAnswer, write_served

# Prompts that jlora answers together for the page.
TOGETHER = 4


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """Ask, judge, and write the page where one is wanted.

    Returns:
      {"endpoint", "model", "run", "passed", "faults": [{"fault", "says"}], "difference", "bound", ...}

    Raises:
      UserError: of the run, its base and its rows; the server does not answer.
    """
    cfg = run_config(args.run)
    if cfg is None:
        raise ModelError(f"{args.run}: not a run folder (it has no config.yaml)")
    if cfg.method == "full":
        raise ConfigError(f"{args.run}: trained every weight; only what is served of a run with an adapter is verified")
    endpoint = Endpoint(args.endpoint, args.model, args.timeout)
    endpoint.require_model()
    mesh, base = one_device_mesh(), args.base or cfg.model.path
    with jax.set_mesh(mesh):
        model = open_adapted(base, args.run)
        tokenizer, stops = on_day(cfg, model.pretrained.tokenizer), model.pretrained.stops
        rows, held_out = held_out_rows(cfg, tokenizer, stops, args.rows)
        if not held_out and not args.quiet:
            print("warning: the run held no rows out, so the server is asked for rows of its training", file=sys.stderr)
        began = time.monotonic()
        seen = ask_server(endpoint, rows, tokenizer, args.max_new_tokens)
        seconds = time.monotonic() - began
        end = tokenizer.eos_id
        trained, bare = (Scorer(model.pretrained.base, part, model.dtype, end) for part in (model.adapter, {}))
        judge = Judge(
            trained, bare, _rounder(base, args.run, end), tokenizer.bos_id, stops, cfg.model.quantization, args.bound
        )
        found = judge.judge(seen)
        result = _result(args, cfg, rows, seen, found) | {"requests": endpoint.requests, "seconds": round(seconds, 3)}
        if args.html:
            write_served(Path(args.html), result, _answers(model, rows, seen, args.max_new_tokens))
    return result


def _rounder(base: str, run: str, end: int) -> Callable[[str], Scorer]:
    """The run's model with its base held in another number of bits."""

    def rounded(kind: str) -> Scorer:
        other = open_adapted(base, None, quantization=kind, **_as_run(run))
        return Scorer(other.pretrained.base, open_adapter(run, other.pretrained), other.dtype, end)

    return rounded


def _as_run(run: str) -> dict[str, Any]:
    cfg = run_config(run)
    assert cfg is not None
    return {"tokenizer": cfg.model.tokenizer, "chat_template": cfg.data.chat_template, "dtype": cfg.model.dtype}


def _result(
    args: argparse.Namespace, cfg: Config, rows: Sequence[ServedRow], seen: Seen, found: Verdict
) -> dict[str, Any]:
    """The figures, as JSON."""
    loss: dict[str, Any] | None = None
    if found.loss is not None:
        gained = found.loss["base"] - found.loss["trained"]
        kept = (found.loss["base"] - found.loss["server"]) / gained if gained > 0 else None
        loss = found.loss | {"gain_kept": kept}
    return {
        "endpoint": args.endpoint,
        "model": args.model,
        "run": str(args.run),
        "passed": not found.faults,
        "faults": [{"fault": fault.name, "says": fault.says} for fault in found.faults],
        "bound": args.bound,
        "difference": found.difference,
        "difference_from_base": found.of_base,
        "compared": found.compared,
        "tokens": found.tokens,
        "agreeing": found.agreeing,
        "loss": loss,
        "rows": len(rows),
        "chats": sum(one.chat for one in seen.observed),
        "notes": found.notes,
    }


def _answers(model: Adapted, rows: Sequence[ServedRow], seen: Seen, most: int) -> list[ServedAnswer]:
    """What the server, the trained model and the base say to each row."""
    prompts = [row.asked.ids for row in rows]
    ours, base = (
        answer(each, prompts, max_new_tokens=most, batch_size=min(TOGETHER, len(prompts)))
        for each in (model, replace(model, adapter={}))
    )
    said: dict[tuple[int, bool], tuple[str, bool]] = {(one.row, one.chat): (one.text, one.cut) for one in seen.observed}
    return [
        ServedAnswer(
            row.where,
            row.shown,
            row.reference,
            {
                name: text
                for name, text in (
                    ("Server, completion", said.get((i, False))),
                    ("Server, chat", said.get((i, True))),
                    ("As trained", (ours.texts[i], not ours.ended[i])),
                    ("Base alone", (base.texts[i], not base.ended[i])),
                )
                if text is not None
            },
        )
        for i, row in enumerate(rows)
    ]
