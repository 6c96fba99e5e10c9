"""Pages as a browser lays them out: headless Chromium, a probe script within the page, and screenshots."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--disable-dev-shm-usage", "--password-store=basic", "--use-mock-keychain"),
)
# Looks into the frame that holds the page, and leaves what is wrong with its layout as JSON in the outer document.
PROBE = """
<script>
const look = frame => {
  const view = frame.contentWindow, page = frame.contentDocument;
  const wide = frame.clientWidth, wrong = [], rects = [];
  const name = e => (e.tagName + " " + (e.textContent || "").trim().replace(/\\s+/g, " ")).slice(0, 60);
  const style = e => view.getComputedStyle(e);
  const seen = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0
    && style(e).visibility !== "hidden" && style(e).opacity !== "0" && e.checkVisibility(); };
  const scrolls = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (/auto|scroll|hidden/.test(style(p).overflowX) && p !== page.documentElement && p !== page.body) return true; };
  const across = page.documentElement.scrollWidth;
  if (across > wide) wrong.push("the page is " + across + " px wide in " + wide);
  for (const e of page.body.querySelectorAll("*")) {
    if (!seen(e) || e.closest("script,style")) continue;
    const r = e.getBoundingClientRect();
    if ((r.right > wide + 1 || r.left < -1) && !scrolls(e)) wrong.push("sticks out: " + name(e));
    if (e.scrollWidth > e.clientWidth + 1 && /hidden|clip/.test(style(e).overflowX) && e.clientWidth > 1)
      wrong.push("cut off: " + name(e));
    for (const node of e.childNodes) {
      if (node.nodeType !== 3 || !node.textContent.trim()) continue;
      const range = page.createRange();
      range.selectNodeContents(node);
      for (const box of range.getClientRects()) if (box.width > 1 && box.height > 1) rects.push([box, e]);
      for (const word of e.closest("svg") ? [] : node.textContent.matchAll(/\\S+/g)) {
        if (word[0].length > 16 || /[-/]/.test(word[0])) continue;
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map(box => box.top)).size > 1)
          wrong.push("broken: " + word[0] + " in " + name(e));
      }
    }
  }
  rects.sort((a, b) => a[0].top - b[0].top);
  for (let i = 0; i < rects.length; i++) for (let j = i + 1; j < rects.length; j++) {
    const [a, ea] = rects[i], [b, eb] = rects[j];
    if (b.top >= a.bottom) break;
    if (ea === eb) continue;
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    // Boxes of lines hold room above and below the letters.
    if (x > 1 && y > 0.4 * Math.min(a.height, b.height)) wrong.push("overlap: " + name(ea) + " | " + name(eb));
  }
  const small = [...page.querySelectorAll("svg text")].filter(seen)
    .filter(e => e.getBoundingClientRect().height < 10).map(name);
  const charts = [...page.querySelectorAll("svg[role=img]")].filter(seen).map(s => ({
    label: s.getAttribute("aria-label"), texts: [...s.querySelectorAll("text")].map(t => t.textContent)}));
  return {wide, height: page.documentElement.scrollHeight, wrong: [...new Set(wrong)], small, charts};
};
addEventListener("load", () => {
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
  document.body.replaceChildren(out);
});
</script>
"""


def find() -> str | None:
    """The browser of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _run(*arguments: str) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [str(find()), *FLAGS, f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=120,
        )
    return done.stdout


def _framed(page: Path, sizes: list[tuple[int, int]], extra: str, folder: Path) -> Path:
    """A page in frames of such widths and heights, for a window is never narrower than some 500 px."""
    source = html.escape(page.read_text(encoding="utf-8"), quote=True)
    frames = "".join(
        f'<iframe style="border:0;display:block;width:{width}px;height:{height}px" srcdoc="{source}"></iframe>'
        for width, height in sizes
    )
    outer = folder / f"{page.stem}-framed.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8">{extra}<body style="margin:0">{frames}</body>', encoding="utf-8"
    )
    return outer


def probe(page: Path, widths: tuple[int, ...], folder: Path) -> list[dict[str, Any]]:
    """What is wrong with the layout of a page at each width.

    Returns:
      wide, height: px; wrong: sentences; small: texts of charts below 10 px; charts: label and texts of each.
    """
    outer = _framed(page, [(width, 1000) for width in widths], PROBE, folder)
    found = _run("--window-size=1400,1000", "--dump-dom", outer.as_uri())
    match = re.search(r'<pre id="probe">(.*?)</pre>', found, re.DOTALL)
    assert match, found[-2000:]
    result: list[dict[str, Any]] = json.loads(html.unescape(match[1]))
    return result


def screenshot(page: Path, width: int, height: int, out: Path, folder: Path) -> Path:
    """A PNG of a page."""
    window = f"--window-size={max(width, 500)},{height}"
    _run(window, f"--screenshot={out}", _framed(page, [(width, height)], "", folder).as_uri())
    return out


@contextmanager
def open_page(url: str) -> Iterator[Any]:
    """A page of a server, alive: yields a function that asks Chromium over its debugging pipe, such as
    `ask("Runtime.evaluate", expression="1 + 1")`; see the Chrome DevTools Protocol."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads descriptor 3 and writes 4.
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        command = (str(find()), *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank")
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(
            ["bash", "-c", shell, "-", *command], pass_fds=(theirs_in, theirs_out), **quiet
        ) as chromium:
            os.close(theirs_in)
            os.close(theirs_out)
            with open(ours_in, "rb") as answers, open(ours_out, "wb", buffering=0) as questions:
                left, number, session = b"", 0, {}

                def ask(method: str, **parameters: Any) -> dict[str, Any]:
                    nonlocal left, number
                    number += 1
                    question = {"id": number, "method": method, "params": parameters} | session
                    questions.write(json.dumps(question).encode() + b"\0")
                    while True:
                        while b"\0" not in left:
                            some = os.read(answers.fileno(), 65536)
                            assert some, "Chromium has ended"
                            left += some
                        message, _, left = left.partition(b"\0")
                        found = json.loads(message)
                        if found.get("id") == number:
                            assert "error" not in found, found
                            return found["result"]

                target = ask("Target.createTarget", url=url)["targetId"]
                session = {"sessionId": ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
                yield ask
                session = {}
                ask("Browser.close")
            chromium.wait(30)


def picture(ask: Any, width: int, height: int, dark: bool, out: Path) -> None:
    """A PNG of a page that is open."""
    ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    ask("Emulation.setEmulatedMedia", features=[scheme])
    out.write_bytes(base64.b64decode(ask("Page.captureScreenshot")["data"]))
