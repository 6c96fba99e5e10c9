"""A stand-in for the Hugging Face hub on loopback: its HTTP API as far as an upload asks for it."""

import base64
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from command_line import ROOT

TOKEN = "hf_" + "a1" * 15


class Hub:
    """What was asked and what is kept.

    Attributes:
      files: "OWNER/NAME" -> name -> content. private: "OWNER/NAME" -> whether it is.
      commits: of each the repository and the message. fails: path's beginning -> status to answer with.
    """

    def __init__(self):
        self.files, self.private, self.commits, self.fails = {}, {}, [], {}
        self.stored, self.paths = {}, []


@contextmanager
def hub_server():
    """A `Hub` and its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, value, status=200):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handled(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.paths.append(f"{self.command} {self.path}")
            for path, status in hub.fails.items():
                if self.path.startswith(path):
                    return self.answer({"error": f"refused {self.headers.get('Authorization')}"}, status)
            if not self.path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid username or password."}, 401)
            parts = self.path.strip("/").split("/")
            match self.command, parts:
                case "GET", ["api", "whoami-v2"]:
                    return self.answer({"name": "me", "type": "user", "orgs": []})
                case "POST", ["api", "validate-yaml"]:
                    return self.answer({"errors": [], "warnings": []})
                case "POST", ["api", "repos", "create"]:
                    asked = json.loads(body)
                    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    if name in hub.files:
                        return self.answer(
                            {"error": "You already created this model repo", "url": f"{url}/{name}"}, 409
                        )
                    hub.files[name] = {}
                    hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
                    return self.answer({"url": f"{url}/{name}", "name": name})
                case "POST", ["api", "models", owner, name, "preupload", "main"]:
                    modes = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    return self.answer({"files": modes})
                case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                    objects = [
                        each | {"actions": {"upload": {"href": f"{url}/lfs/{each['oid']}"}}}
                        for each in json.loads(body)["objects"]
                    ]
                    return self.answer({"transfer": "basic", "objects": objects})
                case "PUT", ["lfs", oid]:
                    hub.stored[oid] = body
                    return self.answer({})
                case "POST", ["api", "models", owner, name, "commit", "main"]:
                    kept = hub.files[f"{owner}/{name}"]
                    for line in map(json.loads, body.decode().splitlines()):
                        value = line["value"]
                        if line["key"] == "header":
                            hub.commits.append((f"{owner}/{name}", value["summary"]))
                        elif line["key"] == "file":
                            kept[value["path"]] = base64.b64decode(value["content"])
                        elif line["key"] == "lfsFile":
                            kept[value["path"]] = hub.stored[value["oid"]]
                    return self.answer({"commitUrl": f"{url}/{owner}/{name}/commit/0", "commitOid": "0" * 40})
                case "GET", ["api", "models", owner, name, *_]:
                    full = f"{owner}/{name}"
                    if full in hub.files:
                        return self.answer({"id": full, "private": hub.private[full], "siblings": [], "tags": []})
            return self.answer({"error": f"no such page: {self.command} {self.path}"}, 404)

        do_GET = do_POST = do_PUT = handled

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, url
    finally:
        server.shutdown()
        server.server_close()


def pushed(url, *arguments, token=TOKEN):
    """An export in a process of its own, which asks the stand-in."""
    settings = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "PYTHONPATH": str(ROOT)}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nonexistent"}
    command = [sys.executable, "-m", "jlora.export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, timeout=300)
