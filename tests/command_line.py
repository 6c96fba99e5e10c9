"""What a command says when it fails."""


def one_sentence(err):
    """The message of a failed command: one line, and nothing of Python."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0], err
    assert "Traceback" not in err and 'File "' not in err
    return lines[0]
