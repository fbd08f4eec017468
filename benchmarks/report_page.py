"""report.html of a run: how long it takes to write and to open, and its size.

    python benchmarks/report_page.py RUN_DIR                              # a minute
    python benchmarks/report_page.py RUN_DIR --picture FILE.png --link "#step=1&problem=4"

Opened is: loaded, all curves drawn, in Debian's chromium without a screen. An answer: another
problem chosen, and its texts laid out. FILE.png gets the part of the page about tokens, with the
group that the link names.
"""

import argparse
import base64
import statistics
import subprocess
import sys
import time
from pathlib import Path
from shutil import which

from selenium import webdriver

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from machinery.printing import print_what_can_be  # noqa: E402


def main() -> None:
    print_what_can_be()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--link", default="")
    args = parser.parse_args()
    page = args.run.resolve() / "report.html"
    if args.picture:
        return picture(page.as_uri() + args.link, args.picture)
    seconds = {"written": [], "opened": [], "an answer": []}
    for _ in range(args.rounds):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "eval.py", "report", page.parent],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds["written"].append(time.perf_counter() - start)
        browser = open_browser()
        start = time.perf_counter()
        browser.get(page.as_uri())
        assert browser.execute_script("return document.querySelectorAll('.js-plotly-plot').length")
        seconds["opened"].append(time.perf_counter() - start)
        start = time.perf_counter()
        browser.execute_script(
            "document.querySelector('#problem-on').click();return document.body.offsetHeight"
        )
        seconds["an answer"].append(time.perf_counter() - start)
        browser.quit()
    print(f"{page.stat().st_size / 1e6:.1f} MB")
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")


def open_browser(width: int = 1280, height: int = 900):
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        f"--window-size={width},{height}",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    return webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver")))


def picture(url: str, file: Path) -> None:
    """From how much a token counts down to the group's texts."""
    browser = open_browser(1100, 900)
    browser.get(url)
    clip = browser.execute_script("""
        const [from, to] = ["#counts", "#groups"].map(s =>
            document.querySelector(s).getBoundingClientRect());
        return {x: 0, y: from.y, width: innerWidth, height: to.bottom - from.y + 10, scale: 1};""")
    shot = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
    )
    file.write_bytes(base64.b64decode(shot["data"]))
    browser.quit()


if __name__ == "__main__":
    main()
