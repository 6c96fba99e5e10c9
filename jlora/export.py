"""`jlora export`: a run's checkpoint as a PEFT adapter folder or a full Hugging Face checkpoint.

Every export proves itself before it is called done: what was written is read back and its logits
compared with the run's own.
"""

from pathlib import Path
from typing import Any

from jlora import cli
from jlora.errors import ConfigError, require_installed


def step(text: str) -> int | str:
    """A step's number, or `best`."""
    return text if text == "best" else int(text)


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora export",
        description="Export a run.",
        examples=(
            "jlora export --adapter runs/mine --out adapter --step best",
            "jlora export --adapter runs/mine --out merged --merge --dtype bfloat16",
        ),
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--adapter", type="path", metavar="RUN", dest="run", help="run folder")
    cli.add_old_name(source, "--run", "run")
    source.add_argument(
        "--adapters", type="path", nargs="+", metavar="FOLDER=WEIGHT", help="adapters of one base, to be made one"
    )
    parser.add_argument("--base", type="path", help="where the base lies, if no longer where the run had it")
    parser.add_argument("--combination", choices=("linear", "cat", "svd"), help="of --adapters (default cat)")
    parser.add_argument("--rank", type=int, help="of --combination svd; default: the adapters' largest")
    parser.add_argument(
        "--step", type=step, metavar="N|best", help="checkpoint, or the best by held-out loss; default: the newest"
    )
    parser.add_argument("--out", type="path", required=True, help="new folder to write")
    parser.add_argument("--merge", action="store_true", help="a full checkpoint with the adapter merged in")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of merged weights; default: the run's"
    )
    parser.add_argument(
        "--cost", action="store_true", help="also measure the loss before and after --merge, on the run's held-out rows"
    )
    parser.add_argument("--verify", action="store_true", help="also load the adapter in PEFT and compare logits")
    cli.add_output_arguments(parser, json="one JSON object")
    args = parser.parse_args()

    def body() -> None:
        if args.adapters:
            if args.merge or args.cost or args.verify or args.step is not None or args.dtype:
                raise ConfigError(
                    "--adapters makes an adapter; leave --merge, --cost, --verify, --step and --dtype out"
                )
            from jlora.training.export import export_combined

            how = args.combination or "cat"
            result = export_combined(args.adapters, how, args.rank, args.base, Path(args.out))
            said = f"{result['out']}: {len(args.adapters)} adapters as one of rank {result['rank']}, read back"
            return cli.show(args, result, lambda: print(said))
        if args.combination or args.rank is not None:
            raise ConfigError("--combination and --rank are of --adapters; leave them out with --adapter")
        if args.verify:
            require_installed("--verify", ("torch", "peft"), "torch peft")
        from jlora.training.export import export, use_host

        run, out = Path(args.run), Path(args.out)
        use_host(run, args.merge, args.cost)
        result = export(run, out, args.step, args.merge, args.dtype, args.verify, args.cost, args.base)
        cli.show(args, result, lambda: print_result(result))

    cli.run(body)


def print_result(result: dict[str, Any]) -> None:
    """The figures of an export's proof, for people."""
    kind = {"full": "whole checkpoint"}.get(result["kind"], result["kind"])
    print(f"{result['out']}: {kind} of step {result['step']}, read back and compared:")
    difference = result["logits_relative_difference"]
    print(f"  logits differ by {difference:.1e} of their size" if difference else "  logits are identical")
    if "merged_into" in result:
        print(f"  merged into the {result['merged_into']} weights that the adapter was trained on")
    if "cross_entropy_merged" in result:
        before, after = result["cross_entropy_before_merging"], result["cross_entropy_merged"]
        cost = "not measured, as the run's rows are gone"
        if before is not None:
            cost = f"{after - before:+.1e} (from {before:.4f} to {after:.4f})"
        print(f"  its cost in cross-entropy: {cost}")
    if "base" in result:
        print(f"  its base, to load it on: {result['base']}")
    if "peft_relative_difference" in result:
        print(f"  in PEFT they differ by {result['peft_relative_difference']:.1e}")
        if result["base_read_by"] == "jlora":
            print("  (on the base as jlora reads it: transformers cannot read these files, or rounds what it reads)")


if __name__ == "__main__":
    main()
