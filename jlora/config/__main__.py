"""`python -m jlora.config`: print the configuration reference."""

from jlora.cli import Parser
from jlora.config.reference import reference


def main() -> None:
    """Command line."""
    Parser(prog="python -m jlora.config", description=reference.__doc__).parse_args()
    print(reference(), end="")


if __name__ == "__main__":
    main()
