"""`jlora runs [FOLDER ...]`: the run folders in some folders, one line each, the newest first."""

from collections.abc import Iterator
from pathlib import Path

from jlora import cli
from jlora.errors import ConfigError

# How far below FOLDER a run is looked for: runs/NAME, and the runs of a sweep in it.
DEPTH = 2


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora runs",
        description="List run folders with their figures, the newest first.",
        examples=("jlora runs runs/sweep --json", "jlora runs --html runs/index.html"),
    )
    parser.add_argument("folders", type="path", nargs="*", metavar="FOLDER", help="where to look; default: runs")
    parser.add_argument("--json", action="store_true", help="one JSON array")
    parser.add_argument("--html", type="path", metavar="FILE", help="write the list as a page that leads to each run's")
    args = parser.parse_args()

    def body() -> None:
        folders = [Path(folder) for folder in args.folders or ["runs"]]
        for folder in folders:
            if not folder.is_dir():
                raise ConfigError(f"{folder}: no such folder; name the folder that your runs are in")

        from jlora.reports.runs import described, print_runs, write_index

        found = dict.fromkeys(run for folder in folders for run in run_folders(folder, DEPTH))
        listed = sorted(map(described, found), key=lambda run: run["changed"], reverse=True)
        if args.html and listed:
            write_index(Path(args.html), [Path(run["run"]) for run in listed])
        if args.json:
            cli.print_json(listed)
        elif args.html and listed:
            print(args.html)
        elif listed:
            print_runs(listed)
        else:
            print(f"no run in {', '.join(map(str, folders))}")

    cli.run(body)


def run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """The folder itself, if it is a run's, and those below it; no link is followed."""
    if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
        yield folder
    elif depth:
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                yield from run_folders(path, depth - 1)


if __name__ == "__main__":
    main()
