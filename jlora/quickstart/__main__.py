"""`jlora quickstart [FOLDER]`: write the folder of a first run, and say how to go on."""

import sys

from jlora import cli


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora quickstart",
        description="Write a folder with rows, a config and a small chat model, to train at once on a CPU.",
        examples=("jlora quickstart", "jlora quickstart first --base HuggingFaceTB/SmolLM2-135M-Instruct"),
    )
    parser.add_argument("folder", nargs="?", type="path", default="quickstart", help="default: quickstart")
    parser.add_argument(
        "--base",
        type="path",
        help="another chat model: hub name, folder or .gguf file; default: SmolLM2-135M-Instruct, fetched (93 MB)",
    )
    cli.add_output_arguments(parser)
    args = parser.parse_args()

    def body() -> None:
        from jlora.quickstart.folder import CONFIG, write_folder

        if args.base is None and not args.quiet:
            print("fetching SmolLM2-135M-Instruct, 93 MB", file=sys.stderr)
        write_folder(args.folder, args.base)
        if not args.quiet:
            print(f"wrote {args.folder}; train with: cd {args.folder} && jlora train {CONFIG}")

    cli.run(body)


if __name__ == "__main__":
    main()
