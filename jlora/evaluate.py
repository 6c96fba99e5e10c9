"""`python -m jlora.evaluate`: mean loss over trained tokens and perplexity on held-out rows, or a loss on pairs."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jlora import attention, cli, data
from jlora.adapter import Adapter
from jlora.config import DataSection, ObjectiveSection
from jlora.data import Dataset, Epochs
from jlora.errors import ConfigError
from jlora.generate import add_model_arguments, one_device_mesh, open_model
from jlora.model import Decoder
from jlora.pretrained import make_reference, run_config
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
    return f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.3f} over {figures['tokens']} tokens"


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that does not fit a float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def main() -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m jlora.evaluate", description="Loss and perplexity on rows.")
    add_model_arguments(parser, DataSection.model_fields["format"].default)
    parser.add_argument("--data", required=True, help="rows: a file, folder or hub data set")
    parser.add_argument("--max-length", type=int, help="tokens in a row of a batch; default: as the run did")
    parser.add_argument("--train-on", choices=("response", "all"), help="tokens that count; default: as the run")
    parser.add_argument("--on-bad-row", choices=("error", "skip"), help="default: as the run")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch")
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()

    def body() -> None:
        if args.batch_size < 1 or not (args.max_length is None or args.max_length >= 2):
            raise ConfigError("--max-length must be at least 2 and --batch-size at least 1")
        mesh = one_device_mesh()
        with jax.set_mesh(mesh):
            pretrained, adapter, dtype, section = open_model(args, mesh)
            changes = {"max_length": args.max_length, "train_on": args.train_on, "on_bad_row": args.on_bad_row}
            section = section.model_copy(update={k: v for k, v in changes.items() if v is not None})
            objective, reference = ObjectiveSection(), None
            if section.format == "preference":
                run = run_config(args.adapter)
                if run is None or run.objective.name == "sft":
                    raise ConfigError("rows of preference are measured as a run on pairs does; give it as --adapter")
                objective, reference = run.objective, make_reference(run, pretrained)
            dataset = data.tokenize(args.data, pretrained.tokenizer, section)
            device, head_dim = mesh.devices.flat[0], pretrained.base.cfg.head_dim
            _, kernel = attention.choose("auto", device, head_dim, section.max_length, dtype, section.packing)
            forward = Forward(kernel, "none", dtype, objective)
            evaluator = Evaluator(dataset, section, args.batch_size, forward, mesh)
            figures = evaluator.measure(pretrained.base, adapter, reference)
            rows = len(dataset.examples)
            if args.json:
                result = figures | {"rows": rows, "truncated": dataset.truncated}
                cli.print_json(result | {"dropped": dict(dataset.dropped)})
            else:
                print(f"{describe_figures(figures)} in {rows} rows")

    cli.run(body)


if __name__ == "__main__":
    main()
