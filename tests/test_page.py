"""report.html shows what the training code computed, shows text as text, and works in a browser."""

import json
import math
import re
import shutil
import time
from dataclasses import asdict

import pytest
import torch

import luffy
import page
import run as run_module

CONFIG = asdict(luffy.parse_args([]))  # LUFFY on the toy
NASTY = ["<script>document.title='bad'</script>", "</pre></div></script>", "a\0b", "\u202eright",
         "\u2028\u0085", "/*DATA*/", "/*PLOTLY*/",
         "<img src=x onerror=\"document.title='bad'\">", "x" * 100_000]


def test_weights_are_the_training_codes():
    p, gamma, advantage = torch.tensor([0.001, 0.1, 0.9]), 0.1, 0.875

    def weights(shaping, **changes):
        return page.token_weights(p.log(), 0 * p, advantage, True, CONFIG | changes, shaping)

    torch.testing.assert_close(weights("none"), advantage * p)
    torch.testing.assert_close(weights("luffy"), advantage * gamma * p / (p + gamma) ** 2)
    torch.testing.assert_close(weights("luffy", gamma=0.3), advantage * 0.3 * p / (p + 0.3) ** 2)
    torch.testing.assert_close(weights("log"), torch.full((3,), advantage))
    # on the token's own logit: times 1 - π
    shown = page.of_trace(p.log(), CONFIG | {"gamma": 0.3})
    assert shown["rest"] == [0.999, 0.9, 0.1] and shown["f"] == [0.00332, 0.25, 0.75]
    assert shown["weights"]["luffy"] == pytest.approx([0.00331, 0.1875, 0.1875], rel=5e-3)


@pytest.mark.parametrize("algo", [a for a, row in luffy.ALGORITHMS.items() if row["rollouts"]])
def test_rollouts_are_shown_with_their_rows_weights(algo):
    cfg = asdict(luffy.parse_args(["--algo", algo]))
    now, old = torch.tensor([0.5, 0.1]), torch.tensor([0.25, 0.2])
    shown = page.trajectory({"off_policy": False, "reward": 1.0, "advantage": 0.5,
                             "tokens": ["a", "b"], "logp": now.log().tolist(),
                             "logp_old": old.log().tolist()}, cfg)
    if cfg["shape_rollouts"]:  # of f(π)/f(π_old)
        assert shown["ratio"] == [1.17, 0.75]
        expected = 0.5 * 0.1 * now / (now + 0.1) ** 2 / (old / (old + 0.1))
    else:
        assert shown["ratio"] == [2, 0.5]
        expected = 0.5 * now / old * torch.tensor([cfg["clip"] is None, True])
    assert shown["weights"] == pytest.approx(expected.tolist(), rel=1e-2)


def test_a_character_of_several_tokens_is_shown():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

        def batch_decode(self, rows):
            return [self.decode(ids) for ids in rows]

    ids = [*"a√π🤔".encode(), 0xE2, 0x88, *"b\ufffd".encode()]
    assert run_module.token_texts(ids, Bytes()) == [
        "a", "", "", "√", "", "π", "", "", "", "🤔", "\ufffd", "\ufffd", "b", "\ufffd", "\ufffd",
        "\ufffd"]


def write_run(run, steps=(1, 10), response=("a", "b"), problems=2, advantages=(-0.125, 0.875),
              prompt="<user>", **config):
    """A run directory as luffy.py writes it."""
    (run / "samples").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(CONFIG | config))
    metrics = [{"step": s, "reward": s / 10, "reward/hard": 0.1, "groups/none": 0.5, "entropy": 0.1,
                "groups/mixed": 0.25, "groups/all": 0.25, "trace_prob": 0.5, "grad_norm": math.nan}
               for s in steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (run / "evals.jsonl").write_text(json.dumps(
        {"step": 0, "scores": {"hard": {"avg": 0.125}}}) + "\n")
    p = torch.tensor([0.02 + 0.9 * (i % 2) for i in range(len(response))])
    row = {"source": "hard", "prompt": prompt, "answer": "2", "response": "".join(response),
           "tokens": list(response), "logp": p.log().tolist(),
           "logp_old": (p / 2).log().tolist()}  # the ratio is 2
    for step in steps:
        rows = [row | {"position": n, "off_policy": i == 7, "reward": float(i == 7),
                       "advantage": advantages[i == 7], "prompt": f"{prompt}{n}+{step}?"}
                for n in range(problems) for i in range(8)]
        (run / "samples" / f"step-{step:06d}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    watched = [{"step": s, "traces": [{"position": 0, "logp": (p.log() / (s + 1)).tolist()} | (
        {key: row[key] for key in ("source", "prompt", "answer", "tokens")} if s == 0 else {})]}
        for s in (0, *steps)]
    (run / "watched.jsonl").write_text("".join(json.dumps(row) + "\n" for row in watched))
    return run


def test_the_page_is_bounded_and_keeps_the_first_and_the_last_step(tmp_path):
    run = write_run(tmp_path / "run", steps=range(1, 13), response=[f"{i} " for i in range(1500)],
                    problems=5)
    found = page.describe(run, page.SHOWN_TOKENS)
    steps = [group["step"] for group in found["groups"]]
    assert steps[0] == 1 and steps[-1] == 12 and len(steps) > 2
    problems = found["groups"][0]["problems"]  # of 8 trajectories of 1,000 tokens
    assert [p["prompt"][-4:] for p in problems] == ["0+1?", "1+1?", "2+1?", "4+1?"]
    shown = found["groups"][0]["problems"][0]["trajectories"][0]
    assert shown["length"] == 1500 and len(shown["tokens"]) == len(shown["p"]) == 1000
    assert shown["tokens"][799:801] == ["799 ", "1300 "] and shown["tokens"][-1] == "1499 "
    assert found["steps"] == [*range(13)] and found["curves"]["grad_norm"] == [None] * 13
    assert found["curves"]["eval/hard"] == [0.125] + [None] * 12
    few = page.describe(run, 100)["groups"]
    assert [(group["step"], len(group["problems"])) for group in few] == [(1, 1), (12, 1)]
    page.write_page([run] * 3, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 16e6


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """A report in the browser."""

    def __init__(self, browser, file, link=""):
        browser.get("about:blank")
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(f"file://{file}{link}")
        self.browser = browser
        while self.js("return document.readyState") != "complete":
            time.sleep(0.1)

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def wait(self, text, selector):
        end = time.monotonic() + 10
        while text not in self.text(selector):
            assert time.monotonic() < end, f"no {text!r} in {selector}"

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
                    and e["params"]["request"]["url"].startswith("file")]) <= 1


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
    at.js("document.querySelector('#groups').focus()")
    at.press("ARROW_DOWN")
    assert "1+1?" in at.text("#question")
    at.js("location.hash = '#step=10&problem=1&shaping=none'")
    at.wait("1+10?", "#question")
    at.press("ARROW_LEFT")
    assert "✗ wrong, reward 0, advantage -0.125, 2 tokens" in at.text("#cards")
    # tokens of probability .02 and .92; without shaping the push of both is .875 π (1 - π)
    line = """return [...document.querySelectorAll('.card.trace .token')].slice(0, 2).map(t => {
        const style = getComputedStyle(t);
        return parseFloat(style.backgroundSize.split(' ')[1])
            * (style.backgroundImage.startsWith('repeating') ? -1 : 1);
    })"""
    assert at.js(line) == [4, 6]  # pixels of the line below for .017 and .064
    assert "with shaping 95\u00a0%, without 21\u00a0%, SFT 92\u00a0%" in at.text(".card.trace")
    at.js("document.querySelector('#cards .trace .token').click()")
    assert "▸ without: 0.875 × 0.02 × 0.98 = 0.0172" in at.text("#detail")
    at.press("s")
    assert "shaping=luffy" in at.link()
    assert at.js(line) == [6, 4]  # .119 and .0062
    assert at.js(line.replace(".trace", "")) == [-7, -5]  # a wrong rollout, pushed down: striped
    assert "token 1 of 2: π = 0.02, f(π) = 0.167" in at.text("#detail")  # the same token still
    assert "▸ with shaping: 0.875 × 0.139 × 0.98 = 0.119" in at.text("#detail")
    at.press("ARROW_RIGHT")  # on a token: to the next one
    assert "token 2 of 2: π = 0.92" in at.text("#detail") and "step=1&" in at.link()
    at.press("ESCAPE")
    at.press("ARROW_RIGHT")
    assert "step=10" in at.link() and "π =" not in at.text("#detail")
    at.js("document.querySelector('#cards .text').focus()")
    at.press("ENTER")
    assert "ratio π/π_old = 2\npush = A w (1 − π) = -0.125 × 2 × 0.98" in at.text("#detail")
    at.js("document.querySelector('#watched .token').click()")
    assert "π = 0.02, f(π) = 0.167\nπ after step 0: 0.02, 1: 0.141, 10: 0.701" in at.text("#detail")
    assert "likely now of the 1 at left: 1" in at.text("#watched")
    at.check()


def test_odd_links_and_other_runs(browser, tmp_path):
    alike = write_run(tmp_path / "alike", steps=(1, 2), advantages=(0, 0))
    bare = write_run(tmp_path / "bare", steps=(1,))
    shutil.rmtree(bare / "samples")
    mixed = write_run(tmp_path / "mixed", shaping="none")
    page.write_page([alike, bare, mixed], tmp_path / "report.html")
    for link in ("#run=-1&step=x&problem=99&shaping=constructor", "#run=0.5&problem=-2"):
        at = Page(browser, tmp_path / "report.html", link)
        assert "step=2" in at.link() and "run=0" in at.link()
        assert at.js("return document.querySelector('#flat').checkVisibility()")
        at.check()
    assert at.js("return document.querySelector('#curves .plot').data.length") == 3  # runs
    at.js("chooseRun = i => { const s = document.querySelector('#run'); s.selectedIndex = i;"
          "s.dispatchEvent(new Event('change')); }; chooseRun(1)")
    assert at.js("return document.querySelector('#none').checkVisibility()")
    assert at.js("return document.querySelector('#run').checkVisibility()")
    at.js("chooseRun(2)")
    assert "run=2&step=1" in at.link() and "shaping=none" in at.link()  # its own
    assert not at.js("return document.querySelector('#flat').checkVisibility()")
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
    runs = [write_run(tmp_path / name, response=NASTY, prompt="y" * 2000)
            for name in ("one", "another")]
    page.write_page(runs, tmp_path / "report.html")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False})
    at = Page(browser, tmp_path / "report.html", "#run=1")
    assert at.js("return document.documentElement.scrollWidth") <= width
    assert at.js("return document.querySelector('#run').selectedIndex") == 1
    at.js("[...document.querySelectorAll('.token')].at(-1).click()")  # of 100,000 characters
    assert at.js("return document.querySelector('#detail').offsetHeight") < 400
    at.check()
