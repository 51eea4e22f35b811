"""Draw the pictures of docs/playground.md: a question to a running server, in headless Chromium.

rlprompt serve written=written concise=runs/first/artifact --reward first/reward.py
python scripts/playground_pictures.py http://127.0.0.1:8000/ --about concise
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.fixtures.browser import Browser, find_browser  # noqa: E402

DONE = "document.getElementById('stop').hidden && !document.querySelector('.answer.live')"
SETTLED = "new Promise(done => setTimeout(done, 1500))"


def draw(browser: Browser, url: str, question: str, about: str, folder: Path) -> None:
    """Ask, and write playground_light.png, playground_dark.png and playground_phone.png.

    Args:
        browser: the browser.
        url: where the playground is.
        question: what all prompts are asked.
        about: name of the prompt whose sheet is shown, and that the phone shows.
        folder: where the pictures go.
    """
    browser.resize(1180, 640)
    browser.prefer("light")
    browser.open(url, "document.querySelectorAll('.column').length > 0")
    browser.evaluate(
        f"{{ const q = document.getElementById('question'); q.focus(); q.value = {question!r}; "
        "q.dispatchEvent(new Event('input')); document.getElementById('max_tokens').value = 64 }"
    )
    browser.press("Enter", "Enter", 2)
    browser.wait(DONE)
    browser.evaluate(f"document.activeElement.blur(); {SETTLED}")  # rewards come after the answers
    browser.screenshot(folder / "playground_light.png")
    browser.prefer("dark")
    browser.evaluate(f"document.querySelector('[aria-label=\"About {about}\"]').click(); {SETTLED}")
    browser.screenshot(folder / "playground_dark.png")
    browser.press("Escape", "Escape")
    browser.resize(380, 740, is_phone=True)
    browser.prefer("light")
    browser.evaluate(
        f"[...document.querySelectorAll('.chip')].find(e => e.textContent.slice(1) === {about!r})"
        f".click(); {SETTLED}"
    )
    browser.screenshot(folder / "playground_phone.png")


def main() -> None:
    """Draw, as the command line says."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--about", required=True, help="name of a prompt")
    parser.add_argument("--question", default="How do I keep bread fresh?")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "figures")
    asked = parser.parse_args()
    executable = find_browser()
    if executable is None:
        sys.exit("error: there is no Chromium; install one (Debian: chromium)")
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(executable, Path(profile))
        try:
            draw(browser, asked.url, asked.question, asked.about, asked.folder)
        finally:
            browser.close()


if __name__ == "__main__":
    main()
