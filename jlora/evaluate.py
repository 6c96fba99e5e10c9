"""`python -m jlora.evaluate`: how good a base and its adapters are on held-out rows.

Mean loss over trained tokens, perplexity and token accuracy, or a loss on pairs; with `--generate` also answers,
scored against the rows' own, and with `--compare` those of several adapters side by side.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax

from jlora import cli, data
from jlora.cli import add_model_arguments, open_model
from jlora.config import DataSection, ObjectiveSection
from jlora.errors import ConfigError
from jlora.evaluation.scores import answer_and_score, describe_scores, require_scores
from jlora.files.paths import short_names
from jlora.hf.pretrained import make_reference, open_adapter, run_config
from jlora.inference.answers import Question, read_questions
from jlora.model import attention
from jlora.model.adapter import Adapter
from jlora.model.sharding import one_device_mesh
from jlora.reports.answers import write_comparison
from jlora.training.evaluator import Evaluator, describe_figures
from jlora.training.step import Forward


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m jlora.evaluate", description="Loss, perplexity and scored answers on rows.")
    add_model_arguments(parser, DataSection.model_fields["format"].default)
    parser.add_argument("--data", required=True, help="rows: a file, folder or hub data set")
    parser.add_argument("--max-length", type=int, help="tokens in a row of a batch; default: as the run did")
    parser.add_argument("--train-on", choices=("response", "all"), help="tokens that count; default: as the run")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), help="default: as the run")
    parser.add_argument("--generate", type=int, metavar="N", help="answer the first N rows greedily, and score them")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    parser.add_argument(
        "--compare", nargs="+", metavar="ADAPTER", help="the base and these adapters, on the same rows and prompts"
    )
    parser.add_argument("--html", metavar="FILE", help="write the answers side by side as a page")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch, or prompts answered together")
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: ConfigError: arguments that do not go together."""
    if args.batch_size < 1 or not (args.max_length is None or args.max_length >= 2):
        raise ConfigError("--max-length must be at least 2 and --batch-size at least 1")
    if args.max_new_tokens < 1 or (args.generate is not None and args.generate < 1):
        raise ConfigError("--generate and --max-new-tokens must be at least 1")
    if args.compare and args.adapter:
        raise ConfigError("--compare names all adapters itself; leave --adapter out")
    if args.html and args.generate is None:
        raise ConfigError("--html shows answers; say of how many rows with --generate N")
    if args.generate is not None:
        require_scores()


def warn_of_formats(args: argparse.Namespace, section: DataSection) -> None:
    """Say which adapters were trained on rows written otherwise than they are asked here."""
    for name in args.compare:
        run = run_config(name)
        keys = [k for k in ("format", "prompt", "chat_template") if run and getattr(run.data, k) != getattr(section, k)]
        if keys:
            print(f"warning: {name} was trained with another data.{keys[0]} than it is asked with", file=sys.stderr)


def main() -> None:
    """Command line."""
    args = make_parser().parse_args()

    def body() -> None:
        check_arguments(args)
        mesh = one_device_mesh()
        with jax.set_mesh(mesh):
            names = args.compare or []
            if names:
                args.adapter = names[0]  # whose run says how rows are read
            pretrained, adapter, dtype, section = open_model(args, mesh)
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
            dataset = data.tokenize(args.data, pretrained.tokenizer, section)
            device, head_dim = mesh.devices.flat[0], pretrained.base.cfg.head_dim
            _, kernel = attention.choose("auto", device, head_dim, section.max_length, dtype, section.one_segment)
            forward = Forward(kernel, "none", dtype, objective, token_accuracy=True)
            evaluator = Evaluator(dataset, section, args.batch_size, forward, mesh)
            questions: list[Question] = []
            if args.generate is not None:
                questions = read_questions(args.data, section, pretrained.tokenizer, args.generate)
            models: list[tuple[str | None, Adapter]] = [(args.adapter, adapter)]
            if names:
                models = [(None, {}), *models, *((name, open_adapter(name, pretrained)) for name in names[1:])]
            labels, results = short_names([name or args.base for name, _ in models]), []
            for label, (name, adapter) in zip(labels, models, strict=True):
                label = f"base {label}" if names and name is None else label
                result = {"model": label, "adapter": name} | evaluator.measure(pretrained.base, adapter, reference)
                result["rows"] = len(dataset.examples)
                if questions:
                    result |= answer_and_score(
                        pretrained,
                        adapter,
                        questions,
                        dtype=dtype,
                        max_new_tokens=args.max_new_tokens,
                        batch_size=args.batch_size,
                    )
                results.append(result)
                if not args.json:
                    print_result(result, alone=not names)
        if args.html:
            write_comparison(Path(args.html), f"Answers to {Path(args.data).name}", results, questions)
        if args.json:
            counts = {"truncated": dataset.truncated, "dropped": dict(dataset.dropped)}
            cli.print_json({"models": results} | counts if names else results[0] | counts)

    cli.run(body)


def print_result(result: dict[str, Any], alone: bool) -> None:
    """A model's figures, for people."""
    name = "" if alone else f"{result['model']}: "
    print(f"{name}{describe_figures(result)} in {result['rows']} rows")
    if "answers" in result:
        print(f"{name}{describe_scores(result)} over {result['generated']} answers", flush=True)


if __name__ == "__main__":
    main()
