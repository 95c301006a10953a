"""Lays a page out in a browser, and finds tables that are cut off and words that overlap."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    " disable-component-update disable-sync"
)
# The page stands in a frame of the wanted width: a window of a browser has a least width.
FRAME = """<!doctype html><body style="margin:0">
<iframe id="page" style="width:{width}px;height:3000px;border:0"
srcdoc="{page}"></iframe><pre id="found"></pre><script>
document.getElementById("page").onload = () => {{
  const own = document.getElementById("page").contentDocument;
  const folded = [...own.querySelectorAll("details")];
  folded.forEach(d => d.open = true);
  const wide = [...own.querySelectorAll("*")].filter(e => e.scrollWidth > e.clientWidth + 1
    && e.clientWidth > 0
    && getComputedStyle(e).display !== "inline" && !(e instanceof own.defaultView.SVGElement));
  const over = [];
  for (const svg of own.querySelectorAll("svg")) {{
    const words = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    const frame = svg.getBoundingClientRect();
    words.forEach(([a, p], i) => {{
      if (p.left < frame.left - 1 || p.right > frame.right + 1) over.push(a + " | the edge");
      words.slice(i + 1).forEach(([b, q]) => {{
        const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (x > 1 && y > 3) over.push(a + " | " + b);
      }});
    }});
  }}
  const cut = wide.map(e => e.tagName + "." + e.className + " " + e.scrollWidth + " > " + e.clientWidth + ": "
    + e.textContent.trim().slice(0, 60));
  document.getElementById("found").textContent = JSON.stringify({{cut, over}});
}};
</script></body>"""


def laid_out(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """Returns {"cut": elements wider than their room, "over": words of pictures that overlap}.

    width: of the page, in pixels. folder: for the browser's own files.
    """
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(text)), encoding="utf-8")
    flags = [f"--{flag}" for flag in FLAGS.split()]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={folder / 'user'}", "--window-size=1400,3000"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=4000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found and found[1], done.stderr[-2000:]
    return dict(json.loads(html.unescape(found[1])))
