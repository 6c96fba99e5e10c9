"""A real run, and Chromium seeing its points as they come."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import browser
import pytest
from command_line import ROOT
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora.reports import live

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium here: apt-get install chromium"),
]


def test_chromium_sees_a_run_train(tmp_path):
    make_llama(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    rows, run = make_completions(tmp_path / "rows.jsonl"), tmp_path / "run"
    sections = {
        "data": {"format": "completion", "max_length": 96, "eval": 0.25},
        "training": {"max_steps": 150, "eval_every": 30, "save_every": None},
    }
    config = write_config(tmp_path / "c.yaml", tmp_path / "base", rows, run, **sections)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run.mkdir()
    with (
        live.Server(run, 0) as server,
        subprocess.Popen([sys.executable, "-m", "jlora.train", str(config), "-q"], env=environment) as training,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        steps, states, deadline = [], [], time.monotonic() + 200
        with browser.open_page(server.url) as ask:
            while "finished" not in states and time.monotonic() < deadline:
                text = ask("Runtime.evaluate", expression="document.body.innerText")["result"]["value"]
                if found := re.search(r"step ([\d,]+) of 150", text):
                    steps.append(int(found[1].replace(",", "")))
                states += re.findall(r"^(training|finished|stopped)\b", text, re.MULTILINE)[:1]
                if (kept := os.environ.get("JLORA_SCREENSHOTS")) and len({*steps}) == 4:
                    Path(kept).mkdir(parents=True, exist_ok=True)
                    for width in (390, 1280):
                        for dark in (False, True):
                            name = f"live-{width}{'-dark' * dark}.png"
                            browser.picture(ask, width, 1400, dark, Path(kept).resolve() / name)
                time.sleep(0.3)
            curve = ask("Runtime.evaluate", expression="document.querySelectorAll('.at').length")["result"]["value"]
        server.over.set()
        server.shutdown()
        assert training.wait(60) == 0
    assert list(dict.fromkeys(states)) == ["training", "finished"]
    assert steps == sorted(steps) and steps[-1] == 150 and len({*steps}) >= 4, steps
    assert curve > 40
