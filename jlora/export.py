"""`jlora export`: a run's checkpoint as a PEFT adapter folder, a full Hugging Face checkpoint or a GGUF file.

Every export proves itself before it is called done: what was written is read back and its logits
compared with the run's own.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jlora import cli
from jlora.errors import ConfigError, require_installed
from jlora.files import hub
from jlora.files.atomic import write_text


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
            "jlora export --adapter runs/mine --gguf mine.gguf --quantize Q8_0",
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
    parser.add_argument("--out", type="path", help="new folder to write")
    parser.add_argument("--gguf", type="path", metavar="FILE", help="write base and adapter as one GGUF file instead")
    parser.add_argument("--gguf-adapter", type="path", metavar="FILE", help="write the adapter alone, for llama.cpp")
    parser.add_argument(
        "--quantize",
        metavar="KIND",
        help="of --gguf: F16 (default), BF16, F32, Q8_0, Q5_1 to Q4_0; with llama-quantize on the path Q6_K to Q2_K",
    )
    parser.add_argument(
        "--min-gain",
        type=float,
        default=None,
        metavar="SHARE",
        help="of --gguf: how much it must keep of what training gained (default 0.8; 0 measures nothing)",
    )
    parser.add_argument("--merge", action="store_true", help="a full checkpoint with the adapter merged in")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of merged weights; default: the run's"
    )
    parser.add_argument(
        "--cost", action="store_true", help="also measure the loss before and after --merge, on the run's held-out rows"
    )
    parser.add_argument("--verify", action="store_true", help="also load the adapter in PEFT and compare logits")
    parser.add_argument("--card", action="store_true", help="write a model card: README.md, or FILE.md beside --gguf")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="N", help="rows that the card shows with their answers; default 0"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload what is written, with its card, to a model repository of the hub"
    )
    parser.add_argument("--private", action="store_true", help="a repository that --push makes is seen by nobody else")
    cli.add_output_arguments(parser, json="one JSON object")
    args = parser.parse_args()

    def body() -> None:
        check_publishing(args)
        if args.gguf or args.gguf_adapter:
            return gguf(args)
        if args.quantize or args.min_gain is not None:
            raise ConfigError("--quantize and --min-gain are of --gguf FILE; leave them out, or name the file")
        if args.out is None:
            raise ConfigError("name a new folder with --out, or a file with --gguf")
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
        publish(args, result)
        cli.show(args, result, lambda: print_result(result))

    cli.run(body)


def gguf(args: argparse.Namespace) -> None:
    """Write a GGUF file, and say what it keeps."""
    alone: tuple[str, ...] = ("out", "adapters", "combination", "rank", "merge", "dtype", "cost", "verify")
    alone += ("gguf", "quantize", "min_gain") if args.gguf_adapter else ()
    if given := [name for name in alone if getattr(args, name)]:
        raise ConfigError(f"--gguf and --gguf-adapter write one file, of one run; leave --{given[0]} out")
    least = 0.8 if args.min_gain is None else args.min_gain
    if not 0 <= least <= 1:
        raise ConfigError("--min-gain is a share from 0 to 1")
    from jlora.training.export import use_host
    from jlora.training.gguf_export import export_gguf, export_gguf_adapter

    if args.gguf_adapter:
        use_host(Path(args.run), merge=True, cost=False)
        result = export_gguf_adapter(Path(args.run), Path(args.gguf_adapter), args.step, args.base)
        said = f"{result['out']}: adapter of step {result['step']}, read back; for {result['base']} in GGUF"
        return cli.show(args, result, lambda: print(said))
    use_host(Path(args.run), merge=least == 0, cost=least > 0)
    kind = (args.quantize or "F16").upper()
    result = export_gguf(Path(args.run), Path(args.gguf), args.step, kind, args.base, least)
    publish(args, result)
    if not args.quiet:
        for warning in result["warnings"]:
            print(f"warning: {warning}", file=sys.stderr)
    cli.show(args, result, lambda: print_gguf(result))


def check_publishing(args: argparse.Namespace) -> None:
    """What `publish` will need, before anything is written."""
    if args.adapters and (args.card or args.push):
        raise ConfigError("--card and --push are of one run; leave them out with --adapters")
    if args.gguf_adapter and (args.card or args.push):
        raise ConfigError("--card and --push are of --out and --gguf; leave them out with --gguf-adapter")
    if args.samples and not (args.card or args.push):
        raise ConfigError("--samples are those of the card; add --card")
    if args.samples < 0:
        raise ConfigError("--samples must be 0 or more")
    if args.private and not args.push:
        raise ConfigError("--private is of --push OWNER/NAME")
    if args.push:
        hub.require_repository(args.push)
    card = Path(args.gguf).with_suffix(".md") if args.gguf else None
    if card is not None and (args.card or args.push) and card.exists():
        raise ConfigError(f"--card: {card} is there already; remove it, or name another --gguf")


def publish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the card of an export, and upload both; adds to `result` where they are."""
    if not (args.card or args.push):
        return
    from jlora.hf.adapter_config import CONFIG
    from jlora.hf.source import read_json
    from jlora.reports.card import Exported, card
    from jlora.training.summary import versions

    out = Path(result["out"])
    if result["kind"] == "gguf":
        path, files = out.with_suffix(".md"), {each.name: each for each in (out, Path(result["modelfile"]))}
    else:
        path, files = out / "README.md", {each.name: each for each in sorted(out.iterdir())}
    rank = None
    if result["kind"] == "adapter":
        options = read_json(out / CONFIG)
        rank = max([options["r"], *options["rank_pattern"].values()])
    what = {name: result[name] for name in ("kind", "step", "base", "license")}
    told = Exported(**what, files=list(files), repository=args.push, rank=rank, versions=versions())
    write_text(path, card(Path(args.run), told, args.samples))
    result["card"] = str(path)
    if args.push:
        message = f"Add step {result['step']} of a jlora run"
        result["pushed"] = hub.push(args.push, files | {"README.md": path}, args.private, message, str(out))


def print_published(result: dict[str, Any]) -> None:
    """Where card and repository are, for people."""
    if "card" in result:
        print(f"  card: {result['card']}")
    if "pushed" in result:
        print(f"  uploaded: {result['pushed']}")


def print_gguf(result: dict[str, Any]) -> None:
    """The figures of a GGUF file, for people."""
    size = f"{result['bytes'] / 2**20:,.0f} MiB"
    print(f"{result['out']}: step {result['step']} in {result['quantize']}, {size}, read back and compared")
    print_published(result)
    print(f"  for Ollama: ollama create {Path(result['out']).stem} -f {result['modelfile']}")
    if "gain_kept" not in result:
        return
    before, after, kept = (result[f"cross_entropy_{name}"] for name in ("base", "trained", "file"))
    if before is None:
        print("  what it keeps was not measured, as the run's rows are gone")
        return
    share = result["gain_kept"]
    said = "training gained nothing on these rows" if share is None else f"it keeps {share:.0%} of what training gained"
    print(f"  held-out loss {before:.4f} before training, {after:.4f} after, {kept:.4f} in the file: {said}")


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
    if result["kind"] == "adapter":
        print(f"  its base, to load it on: {result['base']}")
    print_published(result)
    if "peft_relative_difference" in result:
        print(f"  in PEFT they differ by {result['peft_relative_difference']:.1e}")
        if result["base_read_by"] == "jlora":
            print("  (on the base as jlora reads it: transformers cannot read these files, or rounds what it reads)")


if __name__ == "__main__":
    main()
