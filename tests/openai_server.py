"""A server with OpenAI's API on the loopback, of transformers and PEFT, wrong in each way that servers are.

And one that answers what it is told, or not at all.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Server(ThreadingHTTPServer):
    daemon_threads = True
    seen: list

    def handle_error(self, *_):
        """Whoever asked may be gone."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def serving(answer):
    """A server whose every request `answer(handler, path, body)` answers; its `seen` has (path, body, headers)."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length) if length else None
            if body is not None and "ndjson" not in self.headers.get("Content-Type", ""):
                body = json.loads(body)
            self.server.seen.append((self.path, body, dict(self.headers)))
            answer(self, self.path, body)

        do_GET = do_POST = handle_any

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def send(handler, status, content, headers=()):
    """An answer: an object as JSON, or bytes as they are."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in (*headers, ("Content-Length", str(len(content)))):
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


class Model:
    """What answers.

    Args:
      adapter: None leaves it out.
      bos: added to a text before it is seen, beside what a chat template writes: 1, or 0 where it is missing, or 2.
      template: of chats. context: tokens of a prompt, of which the last are seen; refuses: longer ones instead.
      stops: ids that end an answer. round_to: bits of every projection.
      offers: of "echo", "ids", "logprobs". content: log-probabilities are shown as chats show them.
    """

    def __init__(self, base, adapter, template=None, *, bos=1, chat_bos=0, context=None, refuses=False, stops=(2,),
                 bits=None, offers=("echo", "ids", "logprobs"), content=False, name="mine"):  # fmt: skip
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if bits is not None:
            round_weights(self.model, bits)
        if adapter is not None:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, adapter).eval()
        self.template, self.bos, self.chat_bos, self.context, self.refuses = template, bos, chat_bos, context, refuses
        self.stops, self.offers, self.content, self.name = stops, offers, content, name

    def __call__(self, handler, path, body):
        if path == "/v1/models":
            return send(handler, 200, {"data": [{"id": self.name}]})
        if path == "/v1/completions":
            wanted = {"echo": body.get("echo"), "ids": isinstance(body["prompt"], list), "logprobs": "logprobs" in body}
            if refused := [name for name, used in wanted.items() if used and name not in self.offers]:
                return send(handler, 400, {"error": {"message": f"no {refused[0]}"}})
            ids = body["prompt"] if wanted["ids"] else [1] * self.bos + self._encode(body["prompt"])
            text = body["prompt"] if not wanted["ids"] else self.tokenizer.decode(ids)
        elif path == "/v1/chat/completions" and self.template is not None:
            text = self.tokenizer.apply_chat_template(
                body["messages"], chat_template=self.template, tokenize=False, add_generation_prompt=True
            )
            ids = [1] * self.chat_bos + self._encode(text)
        else:
            return send(handler, 404, {"error": {"message": "no such path"}})
        if self.context is not None and len(ids) + body["max_tokens"] > self.context:
            if self.refuses:
                said = f"This model's maximum context length is {self.context} tokens, however you requested more."
                return send(handler, 400, {"error": {"message": said}})
            ids = ids[-(self.context - body["max_tokens"]) :]
        send(handler, 200, self._answer(ids, text, body, chat="chat" in path))

    def _encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _answer(self, ids, text, body, chat):
        new, logs = [], []
        with torch.no_grad():
            before = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], -1)
            for _ in range(body["max_tokens"]):
                scores = torch.log_softmax(self.model(torch.tensor([ids + new])).logits[0, -1], -1)
                token = int(scores.argmax())
                if token in self.stops:
                    break
                new.append(token)
                logs.append(float(scores[token]))
        finish = "length" if len(new) == body["max_tokens"] else "stop"
        shown = list(zip(map(self._shown, new), logs, strict=True))
        said = self.tokenizer.decode(new, skip_special_tokens=True)
        if body.get("echo"):
            own = [None, *(float(before[i, token]) for i, token in enumerate(ids[1:]))]
            shown, said = [*zip(map(self._shown, ids), own, strict=True), *shown], text + said
        choice = {"index": 0, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
        if body.get("logprobs"):
            if chat or self.content:
                choice["logprobs"] = {"content": [{"token": t, "bytes": [*t.encode()], "logprob": p} for t, p in shown]}
            else:
                choice["logprobs"] = {"tokens": [t for t, _ in shown], "token_logprobs": [p for _, p in shown]}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}

    def _shown(self, token):
        return self.tokenizer.decode([token])


def round_weights(model, bits):
    """Every projection in blocks of 32, as GGUF's Q8_0 and Q4_0 hold them."""
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            rows, columns = weight.shape
            blocks = torch.nn.functional.pad(weight.data, (0, -columns % 32)).reshape(rows, -1, 32)
            scale = blocks.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            scale[scale == 0] = 1
            weight.data = ((blocks / scale).round() * scale).reshape(rows, -1)[:, :columns].contiguous()
