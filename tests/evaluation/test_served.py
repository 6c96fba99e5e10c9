"""What is kept of a server's answers, which the verdict is made of."""

import pytest
from tiny import make_tokenizer

from jlora.data.prompts import Asked
from jlora.data.tokens import load_tokenizer
from jlora.evaluation.endpoint import Endpoint, Said, Token
from jlora.evaluation.served import ask_server
from jlora.evaluation.served_rows import ServedRow


class Server(Endpoint):
    """Answers each request with the next of what it is to say."""

    def __init__(self, *says):
        super().__init__("http://127.0.0.1", "mine", 1.0)
        self.says = list(says)

    def complete(self, text, most, echo=False, ids=None):
        return self.says.pop(0)


@pytest.mark.parametrize("gives", [True, False])
def test_an_answer_that_ends_at_once_is_no_server_without_log_probabilities(tmp_path, gives):
    """It gives none for want of a token, and the other answers' are compared all the same."""
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, None)
    ids = tokenizer.encode("a")
    more = Said("a", [Token("a", None, ids[-1], -0.5)] * gives, "stop", 2)
    row = ServedRow("rows.jsonl:1", Asked("b", tokenizer.encode("b")), [], None, None)
    seen = ask_server(Server(Said("", [], "stop", 2), more), [row, row], tokenizer, 4)
    assert [one.logprobs for one in seen.observed] == [[], [-0.5] if gives else None]
    assert [len(one.said) for one in seen.observed] == [0, 1]
