"""report.html shows what the training code computed, shows text as text, and works in a browser."""

import json
import math
import re
from shutil import which

import pytest
import torch

import page

CONFIG = dict(algo="luffy", model="toy", traces=1, gamma=0.1, shaping="luffy", clip=None,
              shape_rollouts=False)
NASTY = ["<script>document.title='bad'</script>", "</pre></div></script>", "a\0b", "\u202eright",
         "\u2028\u0085", "/*DATA*/", "/*PLOTLY*/",
         "<img src=x onerror=\"document.title='bad'\">", "x" * 100_000]


def logs(*probabilities):
    return torch.tensor(probabilities).log()


def test_weights_are_the_training_codes():
    p, gamma, advantage = torch.tensor([0.001, 0.1, 0.9]), 0.1, 0.875

    def weights(shaping, **changes):
        return page.token_weights(p.log(), 0 * p, advantage, True, CONFIG | changes, shaping)

    torch.testing.assert_close(weights("none"), advantage * p)
    torch.testing.assert_close(weights("luffy"), advantage * gamma * p / (p + gamma) ** 2)
    torch.testing.assert_close(weights("luffy", gamma=0.3), advantage * 0.3 * p / (p + 0.3) ** 2)
    torch.testing.assert_close(weights("log"), torch.full((3,), advantage))
    now, old = logs(0.5, 0.1), logs(0.25, 0.2)
    torch.testing.assert_close(page.token_weights(now, old, -0.5, False, CONFIG, "luffy"),
                               torch.tensor([-1.0, -0.25]))
    # on the token's own logit: times 1 - π
    shown = page.of_trace(p.log(), CONFIG)
    assert shown["f"] == [0.0099, 0.5, 0.9] and shown["rest"] == [0.999, 0.9, 0.1]
    assert shown["weights"]["luffy"] == [0.0098, 0.25, 0.09]
    clipped = page.token_weights(now, old, 0.5, False, CONFIG | {"clip": 0.2}, "luffy")
    torch.testing.assert_close(clipped, torch.tensor([0.0, 0.25]))


def write_run(run, steps=(1, 10), response=("a", "b"), problems=2):
    """A run directory as luffy.py writes it."""
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(CONFIG))
    metrics = [{"step": s, "reward": s / 10, "reward/hard": 0.1, "groups/none": 0.5, "entropy": 0.1,
                "groups/mixed": 0.25, "groups/all": 0.25, "trace_prob": 0.5, "grad_norm": math.nan}
               for s in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    logp = [math.log(0.02 + 0.9 * (i % 2)) for i in range(len(response))]
    row = {"source": "hard", "prompt": "<user>1+1?", "answer": "2", "response": "".join(response),
           "tokens": list(response), "logp": logp, "logp_old": logp}
    for step in steps:
        rows = [row | {"position": p, "off_policy": i == 7, "reward": float(i == 7),
                       "advantage": 0.875 if i == 7 else -0.125, "prompt": f"<user>{p}+{step}?"}
                for p in range(problems) for i in range(8)]
        (run / "samples" / f"step-{step:06d}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    watched = [{"step": s, "traces": [{"position": 0, "logp": logp} | (
        {key: row[key] for key in ("source", "prompt", "answer", "tokens")} if s == 0 else {})]}
        for s in (0, *steps)]
    (run / "watched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in watched))
    return run


def test_the_page_is_bounded_and_keeps_the_first_and_the_last_step(tmp_path):
    run = write_run(tmp_path / "run", steps=range(1, 13), response=["word "] * 1500, problems=5)
    found = page.describe(run, page.SHOWN_TOKENS)
    steps = [group["step"] for group in found["groups"]]
    assert steps[0] == 1 and steps[-1] == 12 and len(steps) > 2
    assert len(found["groups"][0]["problems"]) == 5  # of 8 trajectories of 1,000 tokens
    shown = found["groups"][0]["problems"][0]["trajectories"][0]
    assert shown["length"] == 1500 and len(shown["tokens"]) == len(shown["p"]) == 1000
    few = page.describe(run, 100)["groups"]
    assert [(group["step"], len(group["problems"])) for group in few] == [(1, 1), (12, 1)]
    page.write_page([run] * 3, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 16e6


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (which("chromium") and which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """A report in the browser."""

    def __init__(self, browser, file, link=""):
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(f"file://{file}{link}")
        self.browser = browser

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, key):
        from selenium.webdriver.common.keys import Keys
        self.browser.switch_to.active_element.send_keys(getattr(Keys, key, key))

    def link(self):
        return self.js("return location.hash")

    def check(self):
        """No error in the console, no request but for the page itself."""
        errors = [e for e in self.browser.get_log("browser") if e["level"] in ("SEVERE", "ERROR")]
        assert not errors
        events = [json.loads(e["message"])["message"] for e in self.browser.get_log("performance")]
        urls = {e["params"]["request"]["url"].split(":")[0] for e in events
                if e["method"] == "Network.requestWillBeSent"}
        assert urls <= {"file", "data", "blob", "about"}
        assert len([e for e in events if e["method"] == "Network.requestWillBeSent"
                    and e["params"]["request"]["url"].startswith("file")]) == 1


def test_a_reader_looks_around(browser, tmp_path):
    page.write_page([write_run(tmp_path / "run")], tmp_path / "report.html")
    at = Page(browser, tmp_path / "report.html", "#step=1&problem=1&shaping=none")
    assert "1+1?" in at.text("#question")  # problem 1 of step 1
    assert at.js("return document.querySelectorAll('#cards article').length") == 8
    assert "rollout 7" in at.text("#cards") and "advantage +0.875" in at.text(".card.trace")
    assert at.js("return document.querySelectorAll('#curves .js-plotly-plot').length") >= 4
    at.press("ARROW_RIGHT")
    assert "1+10?" in at.text("#question") and "step=10" in at.link()
    at.js("document.querySelector('#problem-back').click()")
    assert "0+10?" in at.text("#question") and "problem=0" in at.link()
    at.js("const s = document.querySelector('#step'); s.selectedIndex = 0;"
          "s.dispatchEvent(new Event('change'))")
    assert "0+1?" in at.text("#question")
    # tokens of probability .02 and .92; without shaping the push of both is .875 π (1 - π)
    line = "return [...document.querySelectorAll('.card.trace .token')].slice(0, 2)" \
           ".map(t => getComputedStyle(t).borderBottom.split(' ').slice(0, 2).join(' '))"
    assert at.js(line) == ["4px solid", "6px solid"]  # .017 and .064
    assert "get 21 % of the push" in at.text(".card.trace")
    at.press("s")
    assert "shaping=luffy" in at.link()
    assert at.js(line) == ["6px solid", "4px solid"]  # .119 and .0062
    assert "get 95 % of the push" in at.text(".card.trace")
    assert at.js(line.replace(".trace", "")) == ["6px dotted", "4px dotted"]  # a wrong rollout
    at.js("document.querySelector('#cards .trace .token').click()")
    assert "π = 0.02, f(π) = 0.167" in at.text("#detail")
    assert "push 0.119 = A w (1 − π) = 0.875 × 0.139 × 0.98" in at.text("#detail")
    at.check()


def test_what_a_model_wrote_is_text(browser, tmp_path):
    page.write_page([write_run(tmp_path / "run", response=NASTY)], tmp_path / "report.html")
    at = Page(browser, tmp_path / "report.html")
    shown = at.text("#cards .text")
    for text in NASTY:
        assert re.sub("[\0\x85\u2028\u202e]", lambda c: f"⟨{ord(c[0]):04X}⟩", text) in shown
    assert at.js("return document.title") == "LUFFY: a run"
    assert at.js("return document.querySelectorAll('.text script, .text img').length") == 0
    at.check()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    runs = [write_run(tmp_path / name, response=NASTY) for name in ("one", "another")]
    page.write_page(runs, tmp_path / "report.html")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False})
    at = Page(browser, tmp_path / "report.html", "#run=1")
    assert at.js("return document.documentElement.scrollWidth") <= width
    assert at.js("return document.querySelector('#run').selectedIndex") == 1
    at.check()
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
