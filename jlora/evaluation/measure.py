"""What `jlora evaluate` does: measure a base and its adapters on the same rows and prompts."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jlora.config import DataSection, ObjectiveSection
from jlora.data import encoding
from jlora.data.speakers import Turn, turns
from jlora.errors import ConfigError
from jlora.evaluation.scores import answer_and_score, describe_scores
from jlora.files.paths import short_names
from jlora.hf.adapters import make_reference, open_adapter, run_config
from jlora.hf.pretrained import warn_of_length
from jlora.inference.answers import Question, read_questions
from jlora.inference.model import open_model
from jlora.model import attention
from jlora.model.adapter import Adapter
from jlora.model.sharding import one_device_mesh
from jlora.reports.answers import write_comparison
from jlora.training.evaluator import Evaluator, describe_figures
from jlora.training.step import Forward


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and tell people unless the command line asks for JSON, which is returned.

    Raises:
      UserError: of base, adapters and rows, as where they are read; or pairs without a run on pairs.
    """
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        names = args.compare or []
        if names:
            args.adapter = names[0]  # whose run says how rows are read
        model, section = open_model(args, args.data)
        pretrained = model.pretrained
        changes = {"max_length": args.max_length, "train_on": args.train_on, "on_bad_row": args.on_bad_row}
        section = section.model_copy(update={k: v for k, v in changes.items() if v is not None})
        if names and not args.quiet:
            warn_of_formats(args, section)
        objective, reference = ObjectiveSection(), None
        if section.format == "preference":
            run = run_config(args.adapter)
            if names or run is None or run.objective.name == "sft":
                raise ConfigError("rows of preference are measured as a run on pairs does; give it as --adapter")
            objective, reference = run.objective, make_reference(run, pretrained, mesh)
        dataset = encoding.tokenize(args.data, pretrained.tokenizer, section)
        if not args.quiet:
            longest = max(len(one.ids) for row in dataset.examples for one in row.sequences())
            warn_of_length(pretrained.source, f"a row of {longest} tokens", longest)
        device, shape = mesh.devices.flat[0], pretrained.base.cfg
        shapes = shape.head_dim, section.max_length, model.dtype, section.one_segment
        _, kernel = attention.choose("auto", device, *shapes, shape.attention_softcap)
        forward = Forward(kernel, "none", model.dtype, objective, token_accuracy=True)
        evaluator = Evaluator(dataset, section, args.batch_size, forward, mesh)
        questions: list[Question] = []
        if args.generate is not None:
            questions = read_questions(args.data, section, pretrained.tokenizer, args.generate)
        models: list[tuple[str | None, Adapter]] = [(args.adapter, model.adapter)]
        if names:
            models = [(None, {}), *models, *((name, open_adapter(name, pretrained)) for name in names[1:])]
        labels, results = short_names([name or pretrained.name for name, _ in models]), []
        for label, (name, adapter) in zip(labels, models, strict=True):
            label = f"base {label}" if names and name is None else label
            result = {"model": label, "adapter": name} | evaluator.measure(pretrained.base, adapter, reference)
            result["rows"] = len(dataset.examples)
            if questions:
                adapted = replace(model, adapter=adapter)
                limits = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
                result |= answer_and_score(adapted, questions, **limits)
            results.append(result)
            if not args.json:
                print_result(result, alone=not names)
    if args.html:
        prompts = [(turns(pretrained.tokenizer, q.ids) or [Turn("", q.shown)], q.reference) for q in questions]
        write_comparison(Path(args.html), f"Answers to {Path(args.data).name}", results, prompts)
    counts = {"truncated": dataset.truncated, "dropped": dict(dataset.dropped)}
    return {"models": results} | counts if names else results[0] | counts


def warn_of_formats(args: argparse.Namespace, section: DataSection) -> None:
    """Say which adapters were trained on rows written otherwise than they are asked here."""
    for name in args.compare:
        run = run_config(name)
        keys = [k for k in ("format", "prompt", "chat_template") if run and getattr(run.data, k) != getattr(section, k)]
        if keys:
            print(f"warning: {name} was trained with another data.{keys[0]} than it is asked with", file=sys.stderr)


def print_result(result: dict[str, Any], alone: bool) -> None:
    """A model's figures, for people."""
    name = "" if alone else f"{result['model']}: "
    print(f"{name}{describe_figures(result)} in {result['rows']} rows")
    if "answers" in result:
        print(f"{name}{describe_scores(result)} over {result['generated']} answers", flush=True)
