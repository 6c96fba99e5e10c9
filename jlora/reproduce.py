"""`jlora reproduce`: an adapter trained anew from what lies beside it, and whether it comes out the same."""

from pathlib import Path
from typing import Any

from jlora import cli
from jlora.errors import ModelError
from jlora.runtime import signals, xla


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora reproduce",
        description="Train an adapter anew by its provenance.json, and say whether it comes out equal, to the byte, or "
        "where and why it parted. Rows, base and tokenizer are compared before the first step.",
        examples=(
            "jlora reproduce runs/mine --out runs/again",
            "jlora reproduce adapter --out runs/again model.path=/models/llama data.train=rows.jsonl",
        ),
    )
    parser.add_argument("adapter", type="path", metavar="ADAPTER", help="run folder or adapter folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="where base and rows lie, if no longer where the run had them"
    )
    parser.add_argument(
        "--out", type="path", required=True, metavar="DIR", help="run folder to train in; one that was stopped goes on"
    )
    cli.add_output_arguments(parser, json="one JSON object")
    args = parser.parse_intermixed_args()
    xla.use_huge_pages()

    def body() -> int:
        signals.end_on_signals()
        try:
            with signals.listening():
                from jlora.training.reproduction import reproduce

                result = reproduce(args.adapter, Path(args.out), args.overrides, args.quiet)
        finally:
            signals.ignore_signals()
        if result["equal"] is None:
            return cli.PREEMPTED
        cli.show(args, result, lambda: print_result(result))
        if not result["equal"]:
            raise ModelError(f"{result['made']}: is not what {result['adapter']} holds{because(result)}")
        return 0

    cli.run(body, listen=False)


def print_result(result: dict[str, Any]) -> None:
    """What was found, for people."""
    if result["equal"]:
        print(f"{result['made']}: equal to {result['adapter']}, byte for byte, after {result['step']} steps")
        return
    if (largest := result["largest_difference"]) is not None:
        print(f"{result['made']}: weights differ from those of {result['adapter']} by up to {largest:.1e}")
    where = result["parted_at_step"]
    print("  the logged losses are equal" if where is None else f"  the logged losses part at step {where}")


def because(result: dict[str, Any]) -> str:
    """Where it parted, and why it may have, as the end of a sentence."""
    where = result["parted_at_step"]
    at = "" if where is None else f", from step {where} on"
    if not result["differences"]:
        return f"{at}, though versions, device and data are as they were; please report this"
    named = ", ".join(f"{name} {then} -> {now}" for name, (then, now) in result["differences"].items())
    return f"{at}; what is not as it was: {named}"


if __name__ == "__main__":
    main()
