"""`jlora verify --endpoint`: the right server passes, each fault is named, and a bad server ends in a sentence."""

import json
import socket
import time

import pytest
from command_line import one_sentence
from openai_server import Model, send, serving
from served_runs import make_served_runs

from jlora.data.tokens import CHAT_TEMPLATES

LLAMA2 = CHAT_TEMPLATES["llama2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, optimized):
    """A folder with two runs."""
    folder = tmp_path_factory.mktemp("served")
    make_served_runs(folder)
    return folder


@pytest.fixture
def verified(here, trained):
    """The command against a server of a run: (exit code, what it prints as JSON, its sentence)."""

    def run(name, *more, **wrong):
        options = {"base": trained / "base", "adapter": trained / name / "adapter"}
        options |= {"template": LLAMA2} if name == "chat" else {}
        with serving(Model(**(options | wrong))) as server:
            arguments = ("--endpoint", server.url, "--model", "mine", "--run", trained / name, "--json", "-q")
            code, out, err = here("verify", *arguments, "--rows", "6", "--max-new-tokens", "16", *more)
        return code, json.loads(out), err

    return run


@pytest.mark.long
@pytest.mark.parametrize("name", ["plain", "chat"])
@pytest.mark.parametrize(
    "offered",
    [
        {},
        {"offers": ("logprobs", "ids")},
        {"offers": ("logprobs",), "content": True},
        {"offers": ()},
    ],
    ids=["all", "no echo", "no ids", "texts"],
)
def test_the_right_server_passes(verified, name, offered):
    code, found, err = verified(name, **offered)
    assert (code, err, found["passed"], found["faults"]) == (0, "", True, [])
    assert found["difference"] < 1e-4 and found["difference_from_base"] > 0.1 and found["agreeing"] > 0.99
    assert found["compared"] == ("texts" if offered.get("offers") == () else "log-probabilities")
    assert (found["chats"], found["rows"]) == (6 if name == "chat" else 0, 6)
    if not offered:
        assert found["loss"]["server"] == pytest.approx(found["loss"]["trained"], abs=1e-4)
        assert found["loss"]["gain_kept"] == pytest.approx(1, abs=1e-3)
    else:
        assert found["loss"] is None


def named(result):
    """The names of faults, and that the sentence tells them all."""
    code, found, err = result
    assert code == 4 and not found["passed"]
    sentence = one_sentence(err)
    assert all(fault["says"] in sentence for fault in found["faults"])
    return [fault["fault"] for fault in found["faults"]]


@pytest.mark.long
@pytest.mark.parametrize("offers", [("echo", "ids", "logprobs"), ("ids", "logprobs")])
@pytest.mark.parametrize("name", ["plain", "chat"])
def test_an_adapter_that_is_not_applied(verified, name, offers):
    assert named(verified(name, adapter=None, offers=offers)) == ["adapter"]


@pytest.mark.long
@pytest.mark.parametrize("offers", [("echo", "logprobs"), ()])
def test_bos_of_completions(verified, offers):
    assert named(verified("plain", bos=2, offers=offers)) == ["bos_double"]
    assert named(verified("plain", bos=0, offers=offers)) == ["bos_missing"]


@pytest.mark.long
def test_bos_of_chats(verified):
    assert named(verified("chat", chat_bos=1)) == ["bos_double"]
    assert named(verified("chat", template=LLAMA2.replace("bos_token + ", "'' + "))) == ["bos_missing"]


@pytest.mark.long
@pytest.mark.parametrize("offers", [("echo", "ids", "logprobs"), ("logprobs",)])
def test_another_template(verified, offers):
    code, found, err = verified("chat", template=LLAMA2.replace("[INST]", "<<USER>>"), offers=offers)
    assert named((code, found, err)) == ["template"] and "where training has" in err


@pytest.mark.long
def test_a_stop_token_that_is_none(verified):
    assert named(verified("plain", stops=())) == ["stop"]
    assert named(verified("chat", stops=())) == ["stop"]


@pytest.mark.long
def test_a_stop_that_comes_early(verified):
    """At a space, as a server's own list of stops may have it."""
    assert named(verified("plain", stops=(2, 223))) == ["stop"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["plain", "chat"])
def test_another_base(verified, trained, name):
    assert named(verified(name, base=trained / "other")) == ["other_base"]


@pytest.mark.long
def test_a_base_in_fewer_bits(verified):
    code, found, err = verified("plain", bits=4)
    assert named((code, found, err)) == ["rounded"] and "4 bits" in err
    assert verified("plain", bits=8)[0] == 0


@pytest.mark.long
def test_a_base_in_more_bits_than_in_training(verified, trained, here):
    rounded = ("--config", trained / "plain.yaml", "-q", "model.quantization=int4", "training.max_steps=30")
    assert here("train", *rounded, f"output_dir={trained / 'int4'}")[0] == 0
    code, found, err = verified("int4", "--bound", "0.01")
    assert named((code, found, err)) == ["unrounded"]
    assert "is not held in int4, over which the adapter was trained" in err and "--merge" in err


@pytest.mark.long
def test_an_adapter_that_changes_too_little_to_be_seen(verified, trained, here):
    barely = ("--config", trained / "plain.yaml", "-q", "training.max_steps=1", "optimizer.learning_rate=1e-9")
    assert here("train", *barely, f"output_dir={trained / 'barely'}")[0] == 0
    code, found, err = verified("barely")
    assert named((code, found, err)) == ["unclear"] and "--rows" in err
    assert named(verified("barely", adapter=None)) == ["unclear"]


@pytest.mark.long
@pytest.mark.parametrize("refuses", [True, False])
def test_a_context_that_is_too_short(verified, refuses):
    code, found, err = verified("plain", context=128, refuses=refuses)
    assert "context" in named((code, found, err))
    assert ("maximum context length is 128" in err) is refuses


@pytest.mark.long
def test_a_page_shows_what_differs_first(verified, tmp_path):
    page = tmp_path / "served.html"
    named(verified("plain", "--html", page, adapter=None))
    text = page.read_text(encoding="utf-8")
    assert "does not serve what was trained" in text and "the adapter is not applied" in text
    assert text.count("<article") == 6 and "As trained" in text and "Base alone" in text
    assert verified("plain", "--html", page)[0] == 0
    assert "the same text" in page.read_text(encoding="utf-8")


# Servers that fail


@pytest.fixture
def asked(here, world):
    """The command against a server that answers as it is told: (exit code, sentence, what it was sent, seconds)."""

    def run(answer, *more):
        with serving(answer) as server:
            arguments = ("--endpoint", server.url, "--model", "mine", "--run", world / "run", "-q", *more)
            began = time.monotonic()
            code, out, err = here("verify", *arguments)
            assert out == ""
            return code, one_sentence(err), server.seen, time.monotonic() - began

    return run


def listed(then):
    """A list of models, and something else for all other requests."""

    def answer(handler, path, body):
        if path == "/v1/models":
            return send(handler, 200, {"data": [{"id": "mine"}]})
        then(handler)

    return answer


def drop(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def hang(handler):
    time.sleep(3)


def drip(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def broken_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def no_http(handler):
    handler.wfile.write(b"\x00\xffno HTTP at all\n\n")


@pytest.mark.parametrize(
    ("then", "says"),
    [
        (drop, "drops the connection, 3 times in a row"),
        (hang, "no answer within"),
        (drip, "no answer within"),
        (broken_off, "breaks off in the middle"),
        (no_http, "does not speak HTTP"),
        (
            lambda handler: send(handler, 200, b"<html>hello"),
            "an answer that is no JSON object (it begins '<html>hello')",
        ),
        (lambda handler: send(handler, 200, b"[" * 100000), "no JSON object"),
        (lambda handler: send(handler, 200, {"choices": []}), "an answer without a text"),
        (lambda handler: send(handler, 200, {"choices": [{"text": 7}]}), "an answer without a text"),
        (lambda handler: send(handler, 500, {"error": {"message": "CUDA is gone"}}), "answers 500 (CUDA is gone)"),
        (lambda handler: send(handler, 302, b"", [("Location", "http://127.0.0.1:9/x")]), "leads elsewhere"),
        (lambda handler: send(handler, 401, {"detail": "who?"}), "wants a key (401)"),
        (lambda handler: send(handler, 404, {}), "has neither /completions nor"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_server_that_fails_ends_in_a_sentence(asked, monkeypatch, then, says):
    monkeypatch.setattr("jlora.evaluation.endpoint.FIRST_WAIT", 0.05)
    code, sentence, seen, seconds = asked(listed(then), "--timeout", "4")
    assert says in sentence and seconds < 30 and len(seen) < 20
    assert code == (2 if "wants a key" in says else 4)


def test_the_time_for_all_requests_ends(asked, monkeypatch):
    def slow(handler):
        time.sleep(0.3)
        send(handler, 200, {"choices": [{"text": "a", "finish_reason": "stop"}]})

    code, sentence, seen, _ = asked(listed(slow), "--timeout", "1.5")
    assert code == 4 and "took more than 1.5 seconds for" in sentence and "--timeout" in sentence


def test_answers_that_are_nonsense_are_no_proof(asked):
    """Figures that are none, tokens that do not exist: judged by what is left, or refused."""
    garbage = {"tokens": ["\ud800", "zz", 7], "token_logprobs": [float("nan"), "x", None]}
    choice = {"text": "zz", "finish_reason": 3, "logprobs": garbage}
    code, sentence, *_ = asked(listed(lambda handler: send(handler, 200, {"choices": [choice], "usage": 5})))
    assert code == 4 and "is not what" in sentence


def test_a_model_that_the_server_does_not_have(asked):
    code, sentence, seen, _ = asked(lambda handler, *_: send(handler, 200, {"data": [{"id": "a"}, {"id": "b"}]}))
    assert code == 2 and sentence.endswith("has no such model; it has a, b") and len(seen) == 1


def test_no_server(here, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        code, _, err = here("verify", "--endpoint", url, "--model", "m", "--run", world / "run", "--timeout", "5")
    assert code == 4 and "no connection (Connection refused)" in one_sentence(err)


def test_the_key_is_sent_and_told_nowhere(asked, monkeypatch):
    key = "hunter2-hunter2"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def tells(handler, path, body):
        send(handler, 400, {"error": {"message": f"bad: {handler.headers['Authorization']}"}})

    code, sentence, seen, _ = asked(tells)
    assert seen[0][2]["Authorization"] == f"Bearer {key}"
    assert code == 4 and key not in sentence and "bad: Bearer [secret]" in sentence
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb: c")
    code, sentence, seen, _ = asked(tells)
    assert code == 2 and seen == [] and "OPENAI_API_KEY: holds a character" in sentence


def test_requests_go_nowhere_else(asked, monkeypatch):
    """Not by a proxy of the environment, and each to a path of the API."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    code, _, seen, _ = asked(listed(lambda handler: send(handler, 500, {})), "--timeout", "4")
    assert {path for path, *_ in seen} <= {"/v1/models", "/v1/completions", "/v1/chat/completions"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("localhost:8000", "is no URL of a server"),
        ("ftp://localhost", "is no URL of a server"),
        ("http://", "is no URL of a server"),
        ("http://h:99999999", "is no URL of a server"),
        ("http://h/\n", "is no URL of a server"),
        ("http://me:pw@h/v1", "holds a user or a password"),
        ("http://h/v1?key=a", "more than a host and a path"),
    ],
)
def test_urls_that_are_refused(here, world, url, says):
    code, _, err = here("verify", "--endpoint", url, "--model", "m", "--run", world / "run")
    assert code == 2 and says in one_sentence(err) and "pw" not in err


def test_what_is_no_run(here, world):
    common = ("verify", "--endpoint", "http://127.0.0.1:9", "--model", "m")
    code, _, err = here(*common, "--run", world / "base")
    assert code == 4 and "not a run folder" in one_sentence(err)
    assert here(*common, "--run", world / "run", "--rows", "0")[0] == 2
    assert here(*common, "--run", world / "run", "--bound", "nan")[0] == 2
