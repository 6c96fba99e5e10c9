"""The Hugging Face hub: asked only for what has the form of a repository's name and is not here, and not in silence.

A request carries the user's token, and who owns the name that was mistyped decides what comes back.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jlora.errors import ConfigError, UserError
from jlora.files.paths import beside

# Names that were said to be asked for.
_said: set[str] = set()
TIMEOUT = 10.0  # seconds until the hub counts as out of reach


def _is_repository(name: str) -> bool:
    """Whether a name has the form OWNER/NAME, as the hub has it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


@contextmanager
def _asking(name: str, what: str, error: type[UserError], hint: str = "") -> Iterator[None]:
    """Say on stderr, once for a name, that the hub is asked for what is not here, and in a sentence what it refuses.

    Args:
      what: it could have been here, such as `folder`.

    Raises:
      error: it is no name of the hub, a file's, or a path whose first part is a folder here; or what the hub does not
        deliver.
    """
    # No repository has the name of a file, but one may be made to get what is sent there.
    if not _is_repository(name) or name.lower().endswith(".gguf"):
        raise error(f"{name}: no such {what}, and not a hub name (OWNER/NAME){beside(name)}")
    owner = name.partition("/")[0]
    if Path(owner).is_dir():
        raise error(f"{name}: no such {what} in the folder {owner}, and so the hub is not asked{beside(name)}")
    if name not in _said:
        _said.add(name)
        print(f"{name} is no {what}; asking the Hugging Face hub", file=sys.stderr)
    try:
        yield
    except Exception as refused:  # the hub client and the network library below it share no base class
        reason = next(iter(str(refused).strip().splitlines()), type(refused).__name__)
        raise error(f"{name}: no such {what}, and the hub did not deliver it ({reason}){hint}") from None


def download(name: str, patterns: list[str], what: str, error: type[UserError], revision: str | None = None) -> Path:
    """The files of a repository that match a pattern, in a folder of the hub's cache; none of folders in it.

    Raises:
      error: there is no such repository, or the hub does not deliver it.
    """
    with _asking(name, what, error):
        from huggingface_hub import snapshot_download

        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored, revision=revision))


def require_data_set(name: str, what: str, error: type[UserError]) -> None:
    """Ask the hub once whether it has a data set; the library that reads one would try for half a minute.

    Raises:
      error: it has none, or cannot be reached.
    """
    hint = "; check the name, or set HF_HUB_OFFLINE=1 to read what was downloaded before"
    with _asking(name, what, error, hint):
        import huggingface_hub

        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(name, timeout=TIMEOUT)


def require_repository(name: str) -> None:
    """A name that can be pushed to, and a token that the hub knows; asked before an export is made.

    Raises:
      ConfigError: neither, or the hub does not answer.
    """
    from huggingface_hub import HfApi

    if not _is_repository(name):
        raise ConfigError("--push: needs the name of a repository, OWNER/NAME")
    with _pushing(name, "nothing was written; log in with `hf auth login`, or set HF_TOKEN to a token that may write"):
        HfApi().whoami()


def push(name: str, files: dict[str, Path], private: bool, message: str, kept: str) -> str:
    """Add files to a model repository, which is made where there is none, in one commit; returns its address.

    Args:
      files: name in the repository -> what is uploaded. private: nobody else sees it; else as it is, or public if new.
      kept: where what was exported lies, whatever the hub says.

    Raises:
      ConfigError: the hub refuses; or `private`, and the repository that is there is not.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _pushing(name, f"{kept} is whole; mend that, and upload it by `hf upload {name} {kept}`"):
        address = api.create_repo(name, repo_type="model", private=private or None, exist_ok=True)
        if private and not api.repo_info(name, repo_type="model", timeout=TIMEOUT).private:
            raise ConfigError(
                f"--push {name}: is there already and is public, and --private asks for one that is not; nothing was "
                f"uploaded, and {kept} is whole; name another, or make that one private first"
            )
        added = [CommitOperationAdd(path_in_repo=inside, path_or_fileobj=str(path)) for inside, path in files.items()]
        api.create_commit(name, added, commit_message=message, repo_type="model")
    return str(address)


@contextmanager
def _pushing(name: str, hint: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as refused:  # the hub client and the network library below it share no base class
        reason = " ".join(str(refused).split())[:300] or type(refused).__name__
        raise ConfigError(f"--push {name}: the hub did not take it ({reason}); {hint}") from None
