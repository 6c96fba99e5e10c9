"""A single-file HTML page about one training run: figures, curves, data, samples and provenance.

`train` writes it at the end of a run; `jlora report RUN` writes it anew, `jlora report RUN RUN --out FILE` compares
runs in one page, as `jlora report SWEEP` does those of a sweep, and so it does files of answers.
"""

from pathlib import Path

from jlora import cli
from jlora.errors import ConfigError
from jlora.files.paths import beside, require_own

NO_RUN = (
    "is not a run folder (no metrics.jsonl, summary.json or config.yaml in it); `jlora runs` lists those below a folder"
)


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora report",
        description="Write a run's report, or compare runs in one page.",
        examples=(
            "jlora report runs/mine --watch",
            "jlora report runs/a runs/b --out compared.html",
        ),
    )
    parser.add_argument(
        "runs",
        type="path",
        nargs="+",
        metavar="RUN",
        help="run folder, or a sweep's; or files of answers, as jlora generate prints them as JSON",
    )
    parser.add_argument(
        "--out", type="path", metavar="FILE", help="HTML file; default for one run: its own report.html"
    )
    parser.add_argument(
        "--watch", action="store_true", help="serve a page that follows the run while it trains, to this machine alone"
    )
    parser.add_argument("--port", type=int, help="of --watch, on 127.0.0.1; default: a free one")
    cli.add_output_arguments(parser)
    args = parser.parse_args()

    def body() -> None:
        from jlora.reports.answers import MOST_FILES, compare_files
        from jlora.reports.page import write_page
        from jlora.reports.run import write_report
        from jlora.reports.runs import MOST_RUNS, compare, sweep_runs, write_sweep

        runs = [Path(run) for run in args.runs]
        if all(run.is_file() for run in runs):
            if not args.out:
                raise ConfigError("answers are compared in one page; name it with --out FILE")
            if len(runs) > MOST_FILES:
                raise ConfigError(f"{len(runs)} files of answers are too many for one page; name at most {MOST_FILES}")
            compare_files(Path(args.out), runs)
            return cli.show(args, None, lambda: print(args.out))
        if args.port is not None and not args.watch:
            raise ConfigError("--port is of --watch; add it, or leave --port out")
        if not 0 <= (args.port or 0) < 2**16:
            raise ConfigError(f"--port {args.port}: is no port; name one of 1 to 65535, or leave it out for a free one")
        for run in runs:
            if not run.exists():
                raise ConfigError(f"{run}: no such folder{beside(run)}")
            require_own(run, ConfigError)
            if not any((run / name).is_file() for name in ("metrics.jsonl", "summary.json", "config.yaml")):
                raise ConfigError(f"{run}: {NO_RUN}")
        begun = sweep_runs(runs[0])
        if args.watch:
            if len(runs) > 1 or args.out:
                raise ConfigError("--watch follows one run and writes no file; name one run, without --out")
            if begun is not None:
                those = ", ".join(map(str, begun)) or "none has begun"
                raise ConfigError(f"--watch follows one run, and {runs[0]} is a sweep; name one of its runs ({those})")
            from jlora.reports.live import serve

            return serve(runs[0], args.port or 0)
        if len(runs) > 1 and not args.out:
            raise ConfigError("several runs are compared in one page; name it with --out FILE")
        if len(runs) > MOST_RUNS:
            raise ConfigError(f"{len(runs)} runs are too many for one page; name at most {MOST_RUNS}")
        out = Path(args.out) if args.out else runs[0] / "report.html"
        if len(runs) > 1:
            write_page(out, compare(runs))
        elif begun is not None:
            write_sweep(runs[0], out)
        else:
            write_report(runs[0], out)
        cli.show(args, None, lambda: print(out))

    cli.run(body)


if __name__ == "__main__":
    main()
