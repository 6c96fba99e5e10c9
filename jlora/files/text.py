"""Text made safe to show: what others wrote, without control characters; and without secrets.

Secrets are those of the environment, of URLs, and what looks like a token. A configuration that holds one is refused,
since it would go into config.yaml, logs and reports; a sentence that holds one, such as a server's answer, is told
without it.
"""

import os
import re
from collections.abc import Iterator

# Control characters move a terminal's cursor or set the clipboard, and are invalid in HTML even when escaped; halves
# of surrogate pairs cannot be encoded; bidi overrides and isolates turn the text around them.
_REFUSED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|_PASS|_PWD|_PAT|_KEY|APIKEY|_KEY_ID|_AUTH|CREDENTIALS?|CONNECTION_STRING)$",
    re.IGNORECASE,
)
_SHORTEST = 8  # a shorter value may stand anywhere by chance
_SHAPES = {
    "a password in a URL": re.compile(r"(?<=://)[^/\s@]+(?=@)"),
    "a signature in a URL": re.compile(
        r"(?<=[?&])(?:[\w-]*(?:token|signature|secret|password|api_?key|credential)|sig)=[^&\s]+", re.IGNORECASE
    ),
    "an access token": re.compile(
        r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|xox[abprs]-[\w-]{20,}"
        r"|sk-[\w-]{20,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)(?![\w-])"
    ),
}
HIDDEN = "[secret]"


def clean(text: str) -> str:
    """Text without the characters that no page and no terminal may be given."""
    return _REFUSED.sub("\N{REPLACEMENT CHARACTER}", text)


def counted(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def find_secret(text: str) -> str | None:
    """What kind of secret `text` holds; None without one."""
    for name, value in _environment():
        if value in text:
            return f"the value of the environment variable {name}"
    return next((kind for kind, pattern in _SHAPES.items() if pattern.search(text)), None)


def redact(text: str) -> str:
    """`text` without the secrets in it."""
    for _, value in _environment():
        text = text.replace(value, HIDDEN)
    for pattern in _SHAPES.values():
        text = pattern.sub(HIDDEN, text)
    return text


def _environment() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            yield name, value
