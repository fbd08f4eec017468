"""report.html shows what the trainer recorded, shows text as text, and works in a browser."""

import json
import math
import re
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import luffy
from machinery import page, plots
from machinery.batches import Trajectory
from machinery.run_directory import Run, token_texts

NASTY = [
    "<script>document.title='bad'</script>",
    "</pre></div></script>",
    "a\0b",
    "\u202eright",
    "\u2028\u0085",
    "/*DATA*/",
    "/*PLOTLY*/",
    "<img src=x onerror=\"document.title='bad'\">",
    "x" * 100_000,
]


def test_a_character_of_several_tokens_is_shown():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

        def batch_decode(self, rows):
            return [self.decode(ids) for ids in rows]

    ids = [*"a√π🤔".encode(), 0xE2, 0x88, *"b\ufffd".encode()]
    shown = "|".join(token_texts(ids, Bytes()))
    assert shown == "a|||√||π||||🤔|\ufffd|\ufffd|b|\ufffd|\ufffd|\ufffd"


class Words:
    """A tokenizer whose tokens are their own texts."""

    def decode(self, ids):
        return "".join(ids)

    def batch_decode(self, rows):
        return [self.decode(ids) for ids in rows]


METRICS = ("reward/hard", "groups/none", "groups/mixed", "groups/all", "trace_prob", "trace_f")
METRICS += ("length", "trace_length", "trace_share")
ROLLOUT = {"right": 0.0, "reward": 0.0, "advantage": -0.125, "inv_z": 0.00123}
TRACE = ROLLOUT | {"right": 1.0, "reward": 1.0, "advantage": 0.875}


def write_run(
    directory,
    steps=(1, 10),
    response=("a", "b"),
    problems=2,
    p=(0.02, 0.92),
    weights=(0.32, 0.48),
    rollout=(),
    trace=(),
    prompt="<user>",
    **config,
):
    """A run directory, by the trainer's own code; with slopes that follow from no formula.

    p, weights: of every other token; rollout, trace: changes of ROLLOUT and TRACE.
    """
    run = Run(replace(luffy.parse_args([]), out=str(directory), **config))
    run.log_evaluation(0, {"hard": {"avg": 0.125}})
    times = len(response) // len(p) + 1
    logp, w = (torch.tensor(x).repeat(times)[: len(response)] for x in (p, weights))
    logp, ratio = logp.log(), 2 + 0 * logp
    passes_clip = torch.arange(len(response)) % 2 == 0

    def rollout_or_trace(n, text, off_policy, **values):
        problem = SimpleNamespace(prompt_ids=[text], answer="2", source="hard")
        t = Trajectory(n, problem, response, off_policy, logp=logp, **values)
        if off_policy:
            return replace(t, logp_behavior=0 * logp, factor=w + 0.1, slope=t.advantage * w)
        slope = t.advantage * ratio * passes_clip
        return replace(t, logp_behavior=logp - ratio.log(), factor=ratio, slope=slope)

    def group(n, text):
        rollouts = [rollout_or_trace(n, text, False, **ROLLOUT | dict(rollout)) for _ in range(7)]
        return [*rollouts, rollout_or_trace(n, text, True, **TRACE | dict(trace))]

    for step in (0, *steps):
        if step:
            metrics = dict.fromkeys(METRICS, 0.25) | {"reward": step / 10, "grad_norm": math.nan}
            run.log_step(step, metrics | {"entropy": 0.1}, [], Words(), show=False)
            groups = [group(n, f"{prompt}{n}+{step}?") for n in range(problems)]
            run.log_samples(step, sum(groups, []), Words())
        watched = rollout_or_trace(0, f"{prompt}0+1?", True, advantage=1.0)
        run.log_watched(step, [replace(watched, logp=logp / (step + 1))], Words())
    return directory


def test_what_was_recorded_is_passed_on(tmp_path):
    sure = -1e-6  # log π
    p = 0.02, math.exp(sure)
    data = page.describe(write_run(tmp_path / "run", p=p), 10_000)
    rollout, trace = data["groups"][0]["problems"][0]["trajectories"][6:]
    assert trace["p"] == [0.02, 1] and trace["rest"] == pytest.approx([0.98, -sure], rel=0.1)
    assert trace["slope"] == [0.28, 0.42] and trace["factor"] == [0.42, 0.58]
    assert rollout["slope"] == [-0.25, 0] and rollout["factor"] == [2, 2]
    assert [t["off_policy"] for t in (rollout, trace)] == [False, True]
    assert trace.items() >= (TRACE | {"learns": True}).items()
    first, *_, last = data["watched"][0]["at"]
    assert first["slope"] == last["slope"] == [0.32, 0.48]  # as if the advantage were 1
    assert first["step"] == 0 and first["p"] == [0.02, 1] and last["p"] == [0.701, 1]
    # a formula has no say, and neither has the configuration
    changes = dict(gamma=7.0, shaping="none", clip=0.01, shape_rollouts=True)
    other = page.describe(write_run(tmp_path / "other", p=p, **changes), 10_000)
    assert other["groups"] == data["groups"] and other["watched"] == data["watched"]


def test_rows_of_earlier_versions_are_left_out(tmp_path):
    run = write_run(tmp_path / "run")
    for file in (*run.glob("samples/*"), run / "watched.jsonl"):
        file.write_text(file.read_text().replace('"slope"', '"weight"'))
    data = page.describe(run, 10_000)
    assert data["groups"] == data["watched"] == [] and data["curves"]["reward"] == [None, 0.1, 1]


def test_the_page_is_bounded_and_keeps_the_first_and_the_last_step(tmp_path):
    run = write_run(
        tmp_path / "run", steps=range(1, 13), response=[f"{i} " for i in range(1100)], problems=5
    )
    found = page.describe(run, page.SHOWN_TOKENS)
    steps = [group["step"] for group in found["groups"]]
    assert steps[0] == 1 and steps[-1] == 12 and len(steps) > 2
    problems = found["groups"][0]["problems"]  # of 8 trajectories of 1,000 tokens
    assert [p["prompt"][-4:] for p in problems] == ["0+1?", "1+1?", "2+1?", "4+1?"]
    shown = found["groups"][0]["problems"][0]["trajectories"][0]
    assert shown["length"] == 1100 and len(shown["tokens"]) == len(shown["p"]) == 1000
    assert shown["tokens"][799:801] == ["799 ", "900 "] and shown["tokens"][-1] == "1099 "
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
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
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

    def lines(self, selector):
        """The pixels of the line below each of the first two tokens, negative if striped."""
        return self.js(
            """
            const tokens = document.querySelector(arguments[0]).querySelectorAll('.token');
            return [...tokens].slice(0, 2).map(t => {
                const style = getComputedStyle(t);
                return parseFloat(style.backgroundSize.split(' ')[1])
                    * (style.backgroundImage.startsWith('repeating') ? -1 : 1);
            })""",
            selector,
        )

    def link(self):
        return self.js("return location.hash")

    def check(self):
        """No error in the console, no request but for the page itself."""
        errors = [e for e in self.browser.get_log("browser") if e["level"] in ("SEVERE", "ERROR")]
        assert not errors
        events = [json.loads(e["message"])["message"] for e in self.browser.get_log("performance")]
        urls = {
            e["params"]["request"]["url"].split(":")[0]
            for e in events
            if e["method"] == "Network.requestWillBeSent"
        }
        assert urls <= {"file", "data", "blob", "about"}
        assert (
            len(
                [
                    e
                    for e in events
                    if e["method"] == "Network.requestWillBeSent"
                    and e["params"]["request"]["url"].startswith("file")
                ]
            )
            <= 1
        )


def test_a_reader_looks_around(browser, tmp_path):
    page.write_page([write_run(tmp_path / "run")], tmp_path / "report.html")
    at = Page(browser, tmp_path / "report.html", "#step=1&problem=1&shaping=none")
    assert "1+1?" in at.text("#question")  # problem 1 of step 1
    assert at.js("return document.querySelectorAll('#cards article').length") == 8
    assert "rollout 7" in at.text("#cards")
    facts = "✓ right, reward 1, advantage +0.875, 1/Z\u00a00.00123, 2 tokens"
    assert facts in at.text(".card.trace") and "does not learn" not in at.text("#cards")
    assert "mean f" in at.text("#curves")
    assert at.js("return document.querySelectorAll('#curves .js-plotly-plot').length") >= 4
    at.press("ARROW_RIGHT")
    assert "1+10?" in at.text("#question") and "step=10" in at.link()
    at.js("document.querySelector('#problem-back').click()")
    assert "0+10?" in at.text("#question") and "problem=0" in at.link()
    at.js(
        "const s = document.querySelector('#step'); s.selectedIndex = 0;"
        "s.dispatchEvent(new Event('change'))"
    )
    assert "0+1?" in at.text("#question")
    at.js("document.querySelector('#groups').focus()")
    at.press("ARROW_DOWN")
    assert "1+1?" in at.text("#question")
    at.js("location.hash = '#step=10&problem=1&shaping=none'")
    at.wait("1+10?", "#question")
    at.press("ARROW_LEFT")
    assert "✗ wrong, reward 0, advantage -0.125, 1/Z\u00a00.00123, 2" in at.text("#cards")
    # tokens of probability .02 and .92; without shaping the pull of both is .875 π (1 - π)
    assert at.lines(".card.trace") == [4, 6]  # for .017 and .064
    shares = "this run 89\u00a0%, without shaping 21\u00a0%, SFT 92\u00a0%"
    assert "1 of 2 tokens; their share of the pull: " + shares in at.text(".card.trace")
    at.js("document.querySelector('#cards .trace .token').click()")
    assert at.text("#detail").startswith(
        "“a”, token 1 of 2: π = 0.02, f = 0.42\npull = slope × (1 − π)\n"
        "this run: 0.28 × 0.98 = 0.274\n"
        "▸ without shaping: 0.0175 × 0.98 = 0.0172\nSFT: 0.875 × 0.98 = 0.85"
    )
    at.press("s")
    assert "shaping=run" in at.link()
    assert at.lines(".card.trace") == [7, 5]  # .274 and .034
    assert at.lines(".card") == [-7, 0]  # a wrong rollout, pulled down: striped
    assert "\n▸ this run: 0.28 × 0.98 = 0.274" in at.text("#detail")  # the same token still
    at.js("document.querySelector('#shapings [value=log]').click()")
    assert "shaping=log" in at.link() and "▸ SFT" in at.text("#detail")
    assert at.lines(".card.trace") == [8, 6] and at.lines(".card") == [-7, 0]
    at.js("document.querySelector('#cards .trace .token').focus()")
    at.press("ARROW_RIGHT")  # on a token: to the next one
    assert "token 2 of 2: π = 0.92" in at.text("#detail") and "step=1&" in at.link()
    at.press("ESCAPE")
    at.press("ARROW_RIGHT")
    assert "step=10" in at.link() and "π =" not in at.text("#detail")
    at.js("document.querySelector('#cards .text').focus()")
    at.press("ENTER")
    rollout = "token 1 of 2: π = 0.02, ratio = 2\npull = slope × (1 − π) = -0.25 × 0.98 = -0.245"
    assert at.text("#detail").endswith(rollout)
    at.press("ARROW_RIGHT")
    assert "ratio = 2\npull = slope × (1 − π) = 0 × 0.08 = 0 (no gradient)" in at.text("#detail")
    at.js("document.querySelector('#watched .token').click()")
    assert "π = 0.02, f = 0.42\nπ after step 0: 0.02, 1: 0.141, 10: 0.701\n" in at.text("#detail")
    assert "\nthis run: 0.32 × 0.98 = 0.314\n" in at.text("#detail")  # as if A were 1
    assert "\n▸ SFT: 1 × 0.98 = 0.98" in at.text("#detail")
    assert "likely now of the 1 at left: 1" in at.text("#watched")
    at.check()


def test_figures_5_and_6_come_first_smoothed_as_in_curves_png(browser, tmp_path):
    runs = [write_run(tmp_path / name, steps=range(1, 15)) for name in ("one", "two")]
    bare = write_run(tmp_path / "bare", steps=(1, 2))  # of a version without the share of traces
    rows = (bare / "metrics.jsonl").read_text()
    (bare / "metrics.jsonl").write_text(rows.replace(', "trace_share": 0.25', ""))
    page.write_page([*runs, bare], tmp_path / "report.html")
    at = Page(browser, tmp_path / "report.html")
    titles = at.js("return [...document.querySelectorAll('#curves h3')].map(h => h.textContent)")
    assert [title[:9] for title in titles[:4]] == ["Figure 5:"] * 3 + ["Figure 6:"]
    shares = titles.index("share of traces in the gradient's weight")
    panels = at.js(
        "return [...document.querySelectorAll('#curves .plot')].map(p => p.data.map("
        "({name, x, y, line, opacity}) => ({name, x, y, dash: line.dash, opacity})))"
    )
    raw, mean = panels[0][:2]
    rewards = [step / 10 for step in range(1, 15)]
    assert raw["y"] == rewards and raw["opacity"] < 0.5 and mean["x"] == [*range(1, 15)]
    assert mean["y"] == pytest.approx(plots.smooth(rewards), rel=5e-3)  # three digits
    lengths = {line["name"]: line["dash"] for line in panels[1][1::2]}  # of rollouts, of traces
    assert len(lengths) == 6 and lengths["two, rollouts"] != lengths["two, traces"] == "dot"
    assert [line["name"] for line in panels[3]] == ["one", "two", "bare"]  # points, as they are
    assert [line["name"] for line in panels[shares][1::2]] == ["one", "two"]
    at.check()


def test_the_weights_that_were_recorded_are_drawn(browser, tmp_path):
    def weight(p):  # as if someone had made this of a trace's tokens
        return 1.3 + math.sin(math.log(p))

    p = torch.logspace(-7, -0.01, 900, dtype=torch.float64).tolist()
    response = [f"{i} " for i in range(900)]
    run = write_run(tmp_path / "run", (1,), response, p=p, weights=[weight(x) for x in p])
    page.write_page([run, write_run(tmp_path / "other")], tmp_path / "report.html")
    at = Page(browser, tmp_path / "report.html", "#run=0")
    for plot, rest in (("weight", lambda x: 1), ("pull", lambda x: 1 - x)):
        dots, none, sft = at.js("return document.getElementById(arguments[0]).data", plot)
        assert dots["name"] == "this run, recorded"
        assert 300 < len(dots["x"]) <= 500 and len([x for x in dots["x"] if x < 1e-4]) > 50
        for x, y in zip(dots["x"], dots["y"]):  # watched after step 1: √π, the weight as before
            assert min(abs(y - weight(was) * rest(x)) for was in (x, x**2)) < 0.03
        assert none["name"] == "without shaping" and sft["name"] == "SFT"
        assert none["y"] == pytest.approx([x * rest(x) for x in none["x"]])
        assert sft["y"] == pytest.approx([rest(x) for x in sft["x"]])
    assert at.js("return document.querySelector('#weight').layout.yaxis.range[1]") > 2.3
    at.js("document.querySelector('.card.trace .token').click()")
    assert at.js("return document.querySelector('#weight').data[3].x") == [1e-7, 1e-7]
    at.check()


def test_the_verifiers_word_is_not_the_reward_and_some_do_not_learn(browser, tmp_path):
    run = write_run(
        tmp_path / "run",
        steps=(1,),
        rollout={"right": 1.0, "reward": -2.5},
        trace={"right": 0.0, "learns": False, "inv_z": 0.0},
    )
    page.write_page([run], tmp_path / "report.html")
    at = Page(browser, tmp_path / "report.html")
    assert "✓ right, reward -2.5, advantage -0.125" in at.text(".card")
    assert "✗ wrong, reward 1, advantage +0.875, 1/Z\u00a00, 2 tokens, does not learn" in at.text(
        ".card.trace"
    )
    assert at.lines(".card") == [-7, 0] and at.lines(".card.trace") == [0, 0]
    at.js("document.querySelector('.card.trace .token').click()")
    assert "= 0.274" in at.text("#detail") and "does not learn" in at.text("#detail")
    at.check()


def test_odd_links_and_other_runs(browser, tmp_path):
    still = {"advantage": 0.0}
    alike = write_run(tmp_path / "alike", steps=(1, 2), rollout=still, trace=still)
    bare = write_run(tmp_path / "bare", steps=(1,))
    shutil.rmtree(bare / "samples")
    mixed = write_run(tmp_path / "mixed", shaping="none", traces=0)
    page.write_page([alike, bare, mixed], tmp_path / "report.html")
    for link in (
        "#run=-1&step=x&problem=99&shaping=constructor",
        "#run=0.5&problem=-2&shaping=luffy",
    ):
        at = Page(browser, tmp_path / "report.html", link)
        assert "step=2" in at.link() and "run=0" in at.link() and "shaping=run" in at.link()
        assert at.js("return document.querySelector('#flat').checkVisibility()")
        at.check()
    assert at.js("return document.querySelector('#curves .plot').data.length") == 6  # of 3 runs
    at.js(
        "chooseRun = i => { const s = document.querySelector('#run'); s.selectedIndex = i;"
        "s.dispatchEvent(new Event('change')); }; chooseRun(1)"
    )
    assert at.js("return document.querySelector('#none').checkVisibility()")
    assert at.js("return document.querySelector('#run').checkVisibility()")
    at.js("chooseRun(2)")
    assert "run=2&step=1" in at.link() and "this run (none)" in at.text("#shapings")
    assert '\nshaping: "none"\n' in at.text("#config pre")
    assert "does not train on traces" in at.text("#untrained")
    assert not at.js("return document.querySelector('#flat').checkVisibility()")
    at.check()


def test_what_a_model_wrote_is_text(browser, tmp_path):
    page.write_page(
        [write_run(tmp_path / "run", response=NASTY, note=NASTY[-2])], tmp_path / "report.html"
    )
    at = Page(browser, tmp_path / "report.html")
    shown = at.text("#cards .text")
    for text in NASTY:
        assert re.sub("[\0\x85\u2028\u202e]", lambda c: f"⟨{ord(c[0]):04X}⟩", text) in shown
    assert at.js("return document.title") == "LUFFY: a run"
    assert at.js("return document.querySelectorAll('img, .text script').length") == 0
    assert at.text("#note") == NASTY[-2] and "<img src=x" in at.text("#config pre")
    at.check()


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    runs = [
        write_run(tmp_path / name, response=NASTY, prompt="y" * 2000, note="z" * 2000)
        for name in ("one", "another")
    ]
    page.write_page(runs, tmp_path / "report.html")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    at = Page(browser, tmp_path / "report.html", "#run=1")
    assert at.js("return document.documentElement.scrollWidth") <= width
    assert at.js("return document.querySelector('#run').selectedIndex") == 1
    at.js("document.querySelector('#config').open = true")
    assert at.js("return document.documentElement.scrollWidth") <= width
    at.js("[...document.querySelectorAll('.token')].at(-1).click()")  # of 100,000 characters
    assert at.js("return document.querySelector('#detail').offsetHeight") < 400
    at.check()
