"""`python -m jlora.evaluate`: how good a base and its adapters are on held-out rows.

Mean loss over trained tokens, perplexity and token accuracy, or a loss on pairs; with `--generate` also answers,
scored against the rows' own, and with `--compare` those of several adapters side by side.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora import attention, cli, data
from jlora.adapter import Adapter
from jlora.answers import Question, answer, read_questions
from jlora.compare import write_comparison
from jlora.config import DataSection, ObjectiveSection
from jlora.data import Dataset, Epochs
from jlora.errors import ConfigError
from jlora.generate import add_model_arguments, one_device_mesh, open_model
from jlora.model import Decoder
from jlora.pretrained import Pretrained, make_reference, open_adapter, run_config
from jlora.scores import describe_scores, require_scores, score
from jlora.sharding import local_rows, place_rows
from jlora.step import Forward, make_eval_step


class Evaluator:
    """The objective of any base and adapter on one set of rows."""

    def __init__(self, dataset: Dataset, cfg: DataSection, batch_size: int, forward: Forward, mesh: jax.sharding.Mesh):
        self._batch_size, self._mesh = batch_size, mesh
        self._epochs = Epochs(dataset, cfg, batch_size, seed=None)
        self._step = make_eval_step(forward)
        self._pairs = forward.objective.name != "sft"

    def mean_loss(self, base: Decoder, adapter: Adapter) -> tuple[float, int]:
        """Mean loss, over trained tokens in nats or over pairs, and their number."""
        figures = self.measure(base, adapter)
        return figures["loss"], figures["pairs" if self._pairs else "tokens"]

    def measure(
        self,
        base: Decoder,
        adapter: Adapter,
        reference: Adapter | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """{"loss", "perplexity", "tokens"} over trained tokens; of an objective on pairs {"loss", "pairs"} and rewards.

        With `Forward.token_accuracy` also {"token_accuracy"}, the share of trained tokens that are the likeliest.

        Args:
          reference: as for `jlora.step.Forward.loss`.
          on_batch: called after every batch.
        """
        totals: dict[str, float] = {}
        for batch in self._batches():
            on_devices = {name: place_rows(array, self._mesh) for name, array in batch.items()}
            loss, count, sums = self._step(base, adapter, reference, on_devices)
            for name, value in {"loss": loss, "count": count, **sums}.items():
                totals[name] = totals.get(name, 0.0) + value.item()
            on_batch()
        number = totals.pop("count")
        means = {name: value / number for name, value in totals.items()}
        if self._pairs:
            return means | {"pairs": int(number)}
        return means | {"perplexity": perplexity(means["loss"]), "tokens": int(number)}

    def _batches(self) -> Iterable[dict[str, Any]]:
        rows = local_rows(self._mesh, self._batch_size)
        return data.batches(self._epochs, self._batch_size, rows, last=self._epochs.num_batches(1))


def describe_figures(figures: dict[str, Any]) -> str:
    """What `Evaluator.measure` found, in a line."""
    if "pairs" in figures:
        right = figures["rewards/accuracies"]
        return f"loss {figures['loss']:.4f}, {right:.1%} of {figures['pairs']} pairs the right way round"
    right = f", {figures['token_accuracy']:.1%} right" if "token_accuracy" in figures else ""
    return f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.3f}{right} over {figures['tokens']} tokens"


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that does not fit a float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def answer_and_score(
    pretrained: Pretrained,
    adapter: Adapter,
    questions: list[Question],
    *,
    dtype: jnp.dtype,
    max_new_tokens: int,
    batch_size: int,
    timed: bool = False,
    until: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Greedy answers with their scores.

    Returns {"exact_match", "rouge_l", "chrf"} of all (see `jlora.scores.score`), "generated" (how many), "mean_tokens",
    "seconds" and "answers", which holds {"text", "tokens", "ended"} and the scores of each. For `timed` and `until`
    see `jlora.answers.answer`.
    """
    found = answer(
        pretrained,
        adapter,
        [question.ids for question in questions],
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        timed=timed,
        until=until,
    )
    total, each = score(found.texts, [question.reference for question in questions])
    answers = [
        {"text": text, "tokens": tokens, "ended": ended} | scores
        for text, tokens, ended, scores in zip(found.texts, found.tokens, found.ended, each, strict=True)
    ]
    mean = sum(found.tokens) / len(answers)
    rest = {"generated": len(answers), "mean_tokens": mean, "seconds": found.seconds, "answers": answers}
    return total | rest


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


def short_names(paths: list[str]) -> list[str]:
    """The last names of paths, or the paths themselves where two end alike."""
    names = [Path(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else paths


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
                objective, reference = run.objective, make_reference(run, pretrained)
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
