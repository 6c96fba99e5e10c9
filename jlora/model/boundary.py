"""What is told where array trees cross a boundary: a batch into a step, an adapter onto a base, a restored state."""

import re

LONGEST = 200  # characters


def finding(error: Exception) -> str:
    """What an assertion of chex, or a library's error, says: a line for a message to a user."""
    said = re.sub(r"^\[Chex\] Assertion \w+ failed: (Trees 0 and 1 differ in )?", "", " ".join(str(error).split()))
    return said.rstrip(".")[:LONGEST]
