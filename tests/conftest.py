"""What every test runs under: CPU, a persistent compilation cache, and strict arithmetic."""

import importlib.metadata
import io
import os
import sys
from pathlib import Path

# Before JAX is imported, here or in a process that a test starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Most programs run a few times on next to nothing: most of the suite's time went into what LLVM would make of them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jax").startswith("0.10."):  # later ones know no such flag, and end the process for it
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# As `train` sets it by starting itself again, which its tests need not do each time.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
import torch

from jlora.__main__ import COMMANDS

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
torch.set_num_threads(1)
# JAX would make it as umask says, and the commands refuse one that others may write to.
os.makedirs(os.environ["JAX_COMPILATION_CACHE_DIR"], 0o700, exist_ok=True)


LONG = {"test_distributed", "test_llama", "test_quant", "test_resume", "test_step", "test_signals"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a file is one process's, and a long one begun last would run alone."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _no_signal_handlers_left(request: pytest.FixtureRequest):
    """A run in this process takes the signals that stop it; give them back."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def optimized():
    """Programs are compiled as they are for users, here and in processes that are started: for runs of many steps."""
    flag = "jax_disable_most_optimizations"
    before = jax.config.read(flag)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(flag.upper(), "0")
        jax.config.update(flag, False)
        yield
        jax.config.update(flag, before)


@pytest.fixture
def here(monkeypatch, capfd):
    """A command in this process: (exit code, stdout, stderr)."""

    def run(module, *arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [f"jlora.{module}", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back at the end
        capfd.readouterr()
        code = 0
        try:
            importlib.import_module(COMMANDS.get(module, f"jlora.{module}")).main()
        except SystemExit as exit:
            code = exit.code or 0
        return (code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def smallest_base(tmp_path_factory):
    """The smallest base, with its tokenizer; not to be written to."""
    from tiny import make_llama, make_tokenizer

    folder = tmp_path_factory.mktemp("smallest") / "base"
    make_llama(folder, hidden_size=24, intermediate_size=24, num_hidden_layers=1)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """The folder of a tiny model with Llama 3's rotary table, and transformers' model; not to be written to."""
    from ropes import CONFIGS
    from tiny import make_llama, make_tokenizer

    folder = tmp_path_factory.mktemp("llama")
    model = make_llama(folder, **CONFIGS["llama3_rope"])
    make_tokenizer(folder)
    return folder, model
