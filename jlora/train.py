"""`jlora train --config C [key=value ...]`: train a run, or the runs of a sweep.

If the run folder holds a checkpoint of the same run, training resumes from it. The story is `jlora.training.run`.
"""

import sys
from pathlib import Path

from jlora import cli
from jlora.config import Config, load_config
from jlora.errors import ConfigError
from jlora.runtime import distributed, signals, streams, supervise, xla


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
                from jlora.training.run import train
                from jlora.training.summary import print_summary, print_sweep, warn_of_result
                from jlora.training.sweep import require_all, train_together

                if args.fresh:
                    begin_anew(cfg)
                summary = train_together(cfg, args.quiet) if cfg.sweep else train(cfg, args.quiet)
        finally:
            signals.ignore_signals()
        finished = summary["status"] == "finished"
        if distributed.is_main():
            if finished and not args.quiet and not cfg.sweep:
                warn_of_result(summary)
            with streams.told(result=args.json and finished):
                if args.json:
                    cli.print_json(summary)
                elif not args.quiet and cfg.sweep:
                    print_sweep(summary)
                elif not args.quiet:
                    print_summary(summary, cfg.output_dir)
        if cfg.sweep:
            require_all(summary)
        return 0 if finished else cli.PREEMPTED

    cli.run(body, listen=False)


def begin_anew(cfg: Config) -> None:
    """Move an earlier run out of the way, and say where it is now."""
    from jlora.training.folder import set_aside

    if distributed.expected(cfg.distributed):
        raise ConfigError("--fresh is for one process; set another output_dir for a job of several")
    aside = set_aside(Path(cfg.output_dir))
    if aside is not None:
        print(f"the run that was in {cfg.output_dir} is in {aside} now; delete it when you like", file=sys.stderr)


if __name__ == "__main__":
    main()
