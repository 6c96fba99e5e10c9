"""`python -m jlora.evaluation`: the command line of EleutherAI's lm-evaluation-harness, with the model `jlora`.

`python -P -m jlora.evaluation --model jlora --model_args base=BASE,adapter=RUN --tasks ...`. Needs the extra `harness`.
"""

from jlora import cli
from jlora.evaluation.harness import require_harness


def main() -> None:
    """The harness's own command line, which knows the model `jlora`."""

    def body() -> None:
        require_harness()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()

    cli.run(body)


if __name__ == "__main__":
    main()
