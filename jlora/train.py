"""`jlora train --config C [key=value ...]`: train a run, or the runs of a sweep.

If the run folder holds a checkpoint of the same run, training resumes from it. The story is `jlora.training.run`.
"""

import sys
from functools import partial
from pathlib import Path

from jlora import cli
from jlora.config import load_config
from jlora.errors import ConfigError
from jlora.runtime import distributed, signals, supervise, xla


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora train",
        description="Fine-tune a model, or resume.",
        examples=("jlora train quickstart.yaml", "jlora train run.yaml training.epochs=2 output_dir=runs/two"),
    )
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="start anew: what output_dir holds moves to a folder beside it"
    )
    cli.add_output_arguments(parser, json="print the summary as JSON on stdout")
    args = parser.parse_intermixed_args()
    xla.use_huge_pages()

    def body() -> int:
        signals.end_on_signals()
        cfg = load_config(cli.config_file(args), args.overrides)
        if distributed.expected(cfg.distributed):
            supervise.supervise(cfg.distributed.host_timeout)
        try:
            with signals.listening():
                from jlora.training.folder import set_aside
                from jlora.training.run import train
                from jlora.training.summary import print_summary, print_sweep, warn_of_result
                from jlora.training.sweep import require_all, train_together

                if args.fresh:
                    if distributed.expected(cfg.distributed):
                        raise ConfigError("--fresh is for one process; set another output_dir for a job of several")
                    if (aside := set_aside(Path(cfg.output_dir))) is not None:
                        said = f"the run that was in {cfg.output_dir} is in {aside} now; delete it when you like"
                        print(said, file=sys.stderr)
                summary = train_together(cfg, args.quiet) if cfg.sweep else train(cfg, args.quiet)
        finally:
            signals.ignore_signals()
        finished = summary["status"] == "finished"
        if distributed.is_main():
            if finished and not args.quiet and not cfg.sweep:
                warn_of_result(summary)
            people = partial(print_sweep, summary) if cfg.sweep else partial(print_summary, summary, cfg.output_dir)
            cli.show(args, summary, people, kept=not finished)
        if cfg.sweep:
            require_all(summary)
        return 0 if finished else cli.PREEMPTED

    cli.run(body, listen=False)


if __name__ == "__main__":
    main()
