"""The report in a real browser: opened from the file system, without a network, in light and dark, wide and narrow."""

import pytest
from chromium import Browser, find_chromium
from sample_run import write_sample_run

from millrace.observe.report import write_report

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed; on Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(write_sample_run(tmp_path_factory.mktemp("sample")))


def test_a_page_that_complains_or_asks_the_network_is_noticed(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/a.png'><script>console.error('no'); missing();</script>")
    browser.open(bad)
    said = " ".join(browser.complaints())
    assert '"no"' in said and "missing is not defined" in said
    assert browser.requests()[1:] == ["http://127.0.0.1:9/a.png"]


def luminance(browser):
    """Brightness of the page's background, 0 to 255."""
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    return sum(int(part) for part in colour.strip("rgb()").split(",")) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_opens_from_the_file_system_without_a_complaint_or_a_request(browser, page, width, scheme):
    browser.open(page, width=width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert (luminance(browser) > 200) == (scheme == "light")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('.chart > svg').length") > 40


def test_the_button_goes_through_light_dark_and_the_system_s(browser, page):
    browser.open(page, scheme="light")
    seen = []
    for _ in range(3):
        browser.run("document.getElementById('theme').click()")
        seen.append((browser.run("document.documentElement.dataset.theme"), luminance(browser) > 200))
    assert seen == [("light", True), ("dark", False), ("auto", True)]


def test_nothing_moves_once_the_page_stands(browser, page):
    browser.open(page)
    script = """new Promise(resolve => { let moved = 0;
        new PerformanceObserver(list => list.getEntries().forEach(e => { moved += e.value; }))
            .observe({type: 'layout-shift', buffered: true});
        setTimeout(() => resolve(moved), 400); })"""
    assert browser.run(script) < 0.01


def test_every_chart_says_what_its_axes_count_also_the_chosen_one(browser, page):
    browser.open(page)
    texts = "s => [...s.querySelectorAll('.unit')].map(u => u.textContent)"
    units = f"[...document.querySelectorAll('.chart > svg')].map({texts})"
    drawn = browser.run(units)
    assert drawn[0] == ["reward", "step of the stage"]
    assert all(unit and unit != "undefined" and over == "step of the stage" for unit, over in drawn)
    browser.run(
        "(() => { const s = document.getElementById('compare-metric'); s.value = 'time/train';"
        " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    assert browser.run(units)[0] == ["seconds", "step of the stage"]


def test_the_arrows_read_a_curve(browser, page):
    browser.open(page)
    browser.run("document.querySelector('#compare-chart > svg').focus()")
    readout = "document.querySelector('#compare-chart .readout').textContent"
    browser.press("Home")
    first = browser.run(readout)
    assert first.startswith("step 1grpo-again 0.") and "mopd 0." in first
    browser.press("ArrowRight")
    assert browser.run(readout).startswith("step 2grpo-again")


def test_the_pointer_reads_all_charts_of_a_stage_at_one_step(browser, page):
    browser.open(page)
    box = browser.run(
        "(() => { const s = document.querySelector('.stage .chart > svg'); s.scrollIntoView({behavior: 'instant'});"
        "const b = s.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )
    browser.hover(*box)
    steps = browser.run(
        "[...document.querySelector('.stage').querySelectorAll('.readout > :first-child')].map(e => e.textContent)"
    )
    assert len(set(steps)) == 1 and steps[0] != "step 20"


def test_the_comparison_takes_another_metric_and_other_stages(browser, page):
    browser.open(page)
    browser.run("""(() => { const metric = document.getElementById('compare-metric'); metric.value = 'entropy';
        document.querySelector('#compare-stages input[value="if-rl"]').checked = true;
        metric.dispatchEvent(new Event('change', {bubbles: true})); })()""")
    assert browser.run("document.querySelectorAll('#compare-chart .line').length") == 3
    assert browser.run("document.querySelector('#compare-stages input[value=sft]').disabled")


def test_tokens_are_coloured_and_tell_their_numbers(browser, page):
    browser.open(page)
    assert "teacher − student log-prob" in browser.run("document.getElementById('v-legend').textContent")
    coloured = "[...document.querySelectorAll('.tok')].filter(t => t.style.background).length"
    assert browser.run(coloured) > 20
    browser.run("document.querySelector('.answer pre').focus()")
    browser.press("ArrowRight")
    tip = browser.run("document.getElementById('tip').innerText")
    assert "token 1 of" in tip and "teacher log-prob" in tip and "teacher − student" in tip
    browser.press("Escape")
    assert browser.run("document.getElementById('tip').hidden")


def test_the_viewer_filters_by_stage_domain_and_verdict(browser, page):
    browser.open(page)
    choose = """((name, value) => { const s = document.getElementById('v-' + name); s.value = value;
        s.dispatchEvent(new Event('change', {bubbles: true})); })"""
    browser.run(f"{choose}('stage', '2')")
    assert browser.run("[...document.getElementById('v-domain').options].map(o => o.value)") == ["", "math", "mcqa"]
    browser.run(f"{choose}('domain', 'mcqa')")
    prompts = browser.run("[...document.getElementById('v-group').options].map(o => o.text)")
    assert prompts and all(text.startswith("mcqa · ") for text in prompts)
    browser.run(f"{choose}('verdict', 'wrong')")
    verdicts = browser.run("[...document.querySelectorAll('.answer .facts-line b')].map(b => b.textContent)")
    assert verdicts and set(verdicts) == {"✕ reward 0"}
    assert browser.complaints() == []


def test_folded_measurements_come_out(browser, page):
    browser.open(page)
    shown = "[...document.querySelectorAll('tr.inside')].filter(r => r.offsetHeight).length"
    before = browser.run(shown)
    browser.run("document.getElementById('show-inside').click()")
    assert browser.run(shown) > before == 1


def test_everything_that_can_be_worked_can_be_reached_by_the_keyboard(browser, page):
    browser.open(page)
    reached = set()
    for _ in range(30):
        browser.press("Tab")
        here = "document.activeElement"
        reached.add(browser.run(f"{here}.id || {here}.getAttribute('class') || {here}.tagName"))
    assert {"skip", "theme", "show-inside", "scroll", "compare-metric"} <= reached


@pytest.mark.parametrize("until", [None, "sft", "mopd"])
def test_partial_and_bare_runs_open_without_a_complaint(browser, tmp_path, until):
    run = write_sample_run(tmp_path, until=until or "sft", answers=until is not None)
    if until is None:
        for name in ("metrics.jsonl", "ledger.jsonl"):
            (run / name).unlink()
    browser.open(write_report(run))
    assert browser.complaints() == []
    assert browser.run("document.querySelectorAll('section').length") == 5
