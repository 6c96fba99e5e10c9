"""LoRA fine-tuning of language models in JAX and Flax.

Letters used in array annotations and einsum equations, in every module:
B batch, T query length, S key/value length, D embed, N query heads, K key/value heads, G = N / K,
H head dim, F mlp, V vocab, L layers, R rank.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jlora.api import Run as Run
    from jlora.api import finetune as finetune
    from jlora.api import open_run as open_run
    from jlora.api import plan_for as plan_for

__version__ = "0.1.0"

_API = ("Run", "finetune", "open_run", "plan_for")


def __getattr__(name: str) -> object:
    """The Python API, loaded when it is first asked for: `import jlora` alone imports nothing."""
    if name not in _API:
        raise AttributeError(f"module 'jlora' has no attribute '{name}'")
    from jlora import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *_API]
