"""The Hugging Face hub: asked only for what has the form of a repository's name and is not here, and not in silence.

A request carries the user's token, and who owns the name that was mistyped decides what comes back.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jlora.errors import UserError
from jlora.files.paths import beside

# Names that were said to be asked for.
_said: set[str] = set()
TIMEOUT = 10.0  # seconds until the hub counts as out of reach


@contextmanager
def _asking(name: str, what: str, error: type[UserError], hint: str = "") -> Iterator[None]:
    """Say on stderr, once for a name, that the hub is asked for what is not here, and in a sentence what it refuses.

    Args:
      what: it could have been here, such as `folder`.

    Raises:
      error: it is no name of the hub, a file's, or a path whose first part is a folder here; or what the hub does not
        deliver.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owner, slash, _ = name.partition("/")
    try:
        validate_repo_id(name)
    except HFValidationError:
        slash = ""
    if name.lower().endswith(".gguf"):  # no repository has such a name, but one may be made to get what is sent there
        slash = ""
    if not slash:
        raise error(f"{name}: no such {what}, and not a hub name (OWNER/NAME){beside(name)}")
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
