"""The report: whole runs, unfinished ones, hostile text; and, where Chromium is installed, the page in a browser."""

from __future__ import annotations

import dataclasses
import html
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from jaxdistill.evals import charts, facts, samples
from jaxdistill.evals.report import bars, headline, p_value, render, report, waterfall
from jaxdistill.records import Problem, RunDir, Score, Trace, Verdict, read_records, write_records
from tests.evals import fake_run

CHARTS = 11
"""Loss, rate, token accuracy, throughput, two while training, lengths, tokens, difficulty, two of early answers."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(config, run, page) of a whole fake run."""
    config, run = fake_run.make_run(tmp_path_factory.mktemp("full"), problems=200, held_out=120)
    report(config, run)
    return config, run, (run.report / "index.html").read_text()


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """The page of a run that has not begun."""
    folder = tmp_path_factory.mktemp("empty")
    return render(fake_run.make_config(folder), RunDir(folder))


class Page(HTMLParser):
    """Ids, what is loaded from where, and whether every element that was opened is closed."""

    VOID = frozenset(["meta", "link", "br", "img", "input", "hr"])

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name == "href" and tag in ("a", "use"):
                self.links.append(value)
            elif name in ("src", "srcset", "href", "data", "poster", "action", "xlink:href"):
                self.loads.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def text_of(page: str) -> str:
    return " ".join("".join(Page(re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)).text).split())


def test_a_whole_run_shows_all_its_parts(full):
    _, run, page = full
    text = text_of(page)
    assert "not run yet" not in text
    for part in (
        "quickstart",
        "held-out problems correctly",
        "200 to learn from",
        "120 held out",
        "1.18M parameters",
        "final loss",
    ):
        assert part in text, part
    for name in ("teacher", "student", "answer_only", "unverified"):
        score = sum(s.outcome == "correct" for s in read_records(run.evaluation / name, Score)) / 120
        assert f"{100 * score:.1f}%" in text, name
    assert "data.response: answer" in text and "train.optimizer.learning_rate: 0.001" in text
    assert "demo @ sha256:8c5f7a1e90b2d346" in text and "row_tokens: 512" in text
    assert page.count("<svg") == CHARTS
    for part in ("MATH-500", "3 of them among the training problems", "pass@4", "maj@4", "Ablations", "shuffled_steps"):
        assert part in text, part
    for part in (
        "Well formed",
        "Follows a mistake",
        "Throughput",
        "Tokens of an example",
        "How often the teacher",
        "Cost",
    ):
        assert part in text, part


def test_the_page_is_well_formed_and_loads_nothing(full, empty):
    for text in (full[2], empty):
        page = Page(text)
        assert page.open == [], "every element is closed"
        assert len(page.ids) == len(set(page.ids)), "ids are unique, those of the charts too"
        assert [each for each in page.loads if not each.startswith("data:")] == []
        assert {each[1:] for each in page.links} <= set(page.ids), "every link stays on the page"
        assert all(each.startswith("#") for each in page.links)
        assert "script" not in page.tags and "iframe" not in page.tags
        assert not re.search(r"https?://|@import|url\((?!#)", text)
        assert "default-src 'none'" in text


def test_equal_runs_give_equal_pages(full):
    config, run, page = full
    assert render(config, run) == page


def test_an_empty_run_says_so_everywhere(empty):
    text = text_of(empty)
    assert "No model has been evaluated yet." in text
    assert text.count("not run yet") == 7 + 8, "seven stages, eight sections"
    assert "<svg" not in empty


def test_the_stage_counts_what_is_missing(tmp_path, capsys):
    config, run = fake_run.make_config(tmp_path), RunDir(tmp_path)
    fake_run.add_problems(run, 10, 5)
    counts = report(config, run)
    assert counts["missing"] == ["traces", "verdicts", "tokens", "checkpoints", "export", "evaluation"]
    assert counts["bytes"] == (run.report / "index.html").stat().st_size
    assert "without traces, verdicts" in capsys.readouterr().out
    assert [p.name for p in run.report.iterdir()] == ["index.html"]


@pytest.mark.parametrize("stop", ["problems", "traces", "training"])
def test_every_unfinished_run_has_a_page(tmp_path, stop):
    config, run, rng = fake_run.make_config(tmp_path), RunDir(tmp_path), random.Random(0)
    fake_run.add_problems(run, 20, 10)
    if stop != "problems":
        fake_run.add_traces(run, rng)
    if stop == "training":  # killed in the middle of a line, no manifest
        fake_run.add_training(run, rng, floor=0.1)
        (run.checkpoints / "manifest.json").unlink()
        with open(run.checkpoints / "metrics.jsonl", "a") as file:
            file.write('{"step": 910, "lo')
    page = render(config, run)
    assert Page(page).open == []
    text = text_of(page)
    assert "20 to learn from" in text and "No model has been evaluated yet." in text
    if stop == "training":
        assert "Training unfinished" in text and "student (unfinished)" in text and "900" in text


HOSTILE = (
    "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)> \" ' {{ 7*7 }} </pre></style>"
    f" & \u202eabc {'x' * 300}"
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The page of a run whose every text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    config, run, rng = fake_run.make_config(folder), RunDir(folder), random.Random(0)
    fake_run.add_problems(run, 6, 6)
    fake_run.add_traces(run, rng)
    traces = [
        dataclasses.replace(t, response=HOSTILE, teacher=HOSTILE, revision=HOSTILE)
        for t in read_records(run.traces, Trace)
    ]
    write_records(run.traces / "part-00000.parquet", Trace, traces)
    verdicts = [
        dataclasses.replace(v, kept=False, rejected_for=HOSTILE, reason=HOSTILE, extracted=HOSTILE)
        for v in read_records(run.verdicts, Verdict)
    ]
    write_records(run.verdicts / "part-00000.parquet", Verdict, verdicts)
    fake_run.add_evaluation(run, rng, models=("student", "answer_only"))
    held_out = [
        dataclasses.replace(p, prompt=HOSTILE, answer=HOSTILE) for p in read_records(run.problems / "heldout", Problem)
    ]
    write_records(run.problems / "heldout" / "problems.parquet", Problem, held_out)
    for model in ("student", "answer_only"):
        text = f"<think>{HOSTILE}</think>{HOSTILE}"
        scores = [
            dataclasses.replace(s, response=text, reason=HOSTILE, extracted=HOSTILE, outcome="incorrect")
            for s in read_records(run.evaluation / model, Score)
        ]
        fake_run.add_scores(run, model, scores)
    manifest = json.loads((run.evaluation / "manifest.json").read_text())
    manifest["counts"]["models"]["student"]["checkpoint"] = HOSTILE
    manifest["counts"]["skipped"] = {"teacher": HOSTILE}
    (run.evaluation / "manifest.json").write_text(json.dumps(manifest))
    return render(config, run)


def test_text_of_models_and_problems_is_escaped(hostile):
    parsed = Page(hostile)
    assert not {"script", "img"} & set(parsed.tags) and parsed.open == []
    assert [each for each in parsed.loads if not each.startswith("data:")] == []
    # held-out: question, gold, and twice thinking, content, reason, extracted; the revision; the checkpoint; the reason
    # of the skipped; the waterfall; two rejected traces with author, badge, response, reason, extracted
    assert "".join(parsed.text).count(HOSTILE) == 2 + 2 * 4 + 2 + 1 + 1 + 1 + 2 * 5
    assert hostile.count(html.escape("<script>")) == "".join(parsed.text).count("<script>")


def test_headline_in_words():
    def model(accuracy):
        return {"accuracy": accuracy}

    evaluated = {
        "heldout": 1500,
        "models": {"teacher": model(0.9), "student": model(0.71), "answer_only": model(0.2), "twin": model(0.7102)},
        "compared": {"teacher": {"p": 0.0}, "answer_only": {"p": 1e-9}, "twin": {"p": 0.8}},
    }
    result, doubt = headline(evaluated)
    assert result == (
        "The student answers 71.0% of 1,500 held-out problems correctly: 19.0 points below its teacher (90.0%), "
        "51.0 points above answer_only (20.0%) and level with twin."
    )
    assert doubt == "The difference from twin is within what chance explains (sign test, p ≥ 0.05)."
    del evaluated["compared"]["twin"], evaluated["models"]["twin"]
    assert headline(evaluated)[1].startswith("Every difference is more than chance explains")
    alone = {"heldout": 3, "models": {"student": model(1.0)}, "compared": {}}
    assert headline(alone) == ["The student answers 100.0% of 3 held-out problems correctly."]
    assert headline({"heldout": 3, "models": {"teacher": model(0.5)}, "compared": {}}) == [
        "teacher answers 50.0% of 3 held-out problems correctly; no student has been evaluated."
    ]
    assert headline(None) == ["No model has been evaluated yet."] and bars(None, {}) == []


def test_p_values_have_no_more_digits_than_they_are_worth():
    assert [p_value(p) for p in (0.0, 0.0009, 0.0491, 0.5, 1.0)] == ["< 0.001", "< 0.001", "0.049", "0.50", "1.00"]


def test_the_waterfall_ends_at_what_was_kept(full):
    _, run, page = full
    found = facts.read_yield(run)
    rows = waterfall(found)
    assert rows[0].count == found.total == 400 and rows[-1].count == found.kept
    assert rows[0].count - sum(r.count for r in rows[1:-1]) == rows[-1].count
    assert rows[-2].left == pytest.approx(rows[-1].width), "the last filter's bar begins where the kept one ends"
    assert len(found.kept_lengths) == found.kept and len(found.kept_lengths) + len(found.rejected_lengths) == 400
    for reason, count in found.rejected.items():
        assert reason in text_of(page) and f"{count:,}" in text_of(page)


def test_the_waterfall_gathers_what_is_rare(full):
    found = dataclasses.replace(
        facts.read_yield(full[1]), total=200, kept=200 - 120, rejected={f"r{i}": 8 for i in range(15)}
    )
    rows = waterfall(found)
    assert [r.label for r in rows[-2:]] == ["6 other reasons", "kept"] and rows[-2].count == 48


def test_imported_traces_are_measured_in_characters(tmp_path):
    run = RunDir(tmp_path)
    fake_run.add_problems(run, 10, 5)
    fake_run.add_traces(run, random.Random(0))
    imported = [
        dataclasses.replace(t, output_ids=[], finish_reason="imported") for t in read_records(run.traces, Trace)
    ]
    write_records(run.traces / "part-00000.parquet", Trace, imported)
    found = facts.read_yield(run)
    assert found.unit == "characters"
    assert sorted(found.kept_lengths + found.rejected_lengths) == sorted(len(t.response) for t in imported)
    assert "imported" in text_of(render(fake_run.make_config(tmp_path), run))


def test_a_log_with_repeated_and_torn_lines_is_read(tmp_path):
    run = RunDir(tmp_path)
    run.checkpoints.mkdir(parents=True)
    lines = [
        {"step": s, "loss": loss, "learning_rate": 0.1, "note": "x"}
        for s, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, 4.0))
    ]
    (run.checkpoints / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), '{"step": 4, "loss": 3.', "7"]))
    found = facts.read_metrics(run)
    assert found.steps == [1, 2, 3] and found.columns == {
        "step": [1, 2, 3],
        "loss": [9.0, 5.0, 4.0],
        "learning_rate": [0.1] * 3,
    }
    assert facts.read_metrics(RunDir(tmp_path / "none")) is None


def test_examples_are_the_first_of_their_pattern(full):
    _, run, _ = full
    models = ["teacher", "student", "answer_only"]
    right = {
        m: {s.problem_id for s in read_records(run.evaluation / m, Score) if s.outcome == "correct"} for m in models
    }
    found = samples.side_by_side(run, models)
    assert found[0].title == "Student right, answer_only wrong"
    count = len(right["student"] - right["answer_only"])
    assert found[0].note == f"{count} of 120 problems"
    first = next(
        p for p in read_records(run.problems / "heldout", Problem) if p.id in right["student"] - right["answer_only"]
    )
    assert found[0].problem == first.prompt
    assert [r.author for r in found[0].responses] == models
    assert [r.verdict == "correct" for r in found[0].responses] == [first.id in right[m] for m in models]
    assert len({e.problem for e in found}) == len(found) == 5


def test_examples_show_the_first_sample(tmp_path):
    run = RunDir(tmp_path)
    fake_run.add_problems(run, 2, 3)
    fake_run.add_evaluation(run, random.Random(0), models=("student",))
    first = list(read_records(run.evaluation / "student", Score))
    second = [dataclasses.replace(s, sample=1, response="second", outcome="incorrect") for s in first]
    fake_run.add_scores(run, "student", [*first, *second])
    shown = [r for e in samples.side_by_side(run, ["student"]) for r in e.responses]
    assert shown and all("second" not in r.content for r in shown)


def test_rejected_traces_show_every_filter(full):
    _, run, _ = full
    found = samples.rejected_traces(run)
    assert {e.responses[0].badge for e in found} == set(facts.read_yield(run).rejected)
    truncated = next(e.responses[0] for e in found if e.responses[0].badge == "truncated")
    assert truncated.thinking and not truncated.closed and truncated.verdict == "undecided"


def test_long_text_is_cut_in_the_middle_and_says_so():
    text = "".join(chr(97 + i % 26) for i in range(10_000))
    shown = samples.clip(text, 1000)
    assert "[… 9,000 characters left out …]" in shown
    assert shown.startswith(text[:750]) and shown.endswith(text[-250:])
    assert samples.clip(text, 10_000) == text


@pytest.mark.parametrize(
    "values", [[0.5], [1.0, 1.0], [5.0, 0.001], [0.0, 0.0, 0.0], [1.0, float("nan"), 2.0], [-1.0, 2.0]]
)
def test_a_chart_of_any_values_is_drawn_twice_alike(values):
    curve = charts.Curve(label="student", colour=0, x=list(range(len(values))), y=values)
    drawn = [
        charts.line_chart("loss", "Loss <&>", [curve], x_label="step", y_label="loss", smooth=True) for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert 'aria-label="Loss &lt;&amp;&gt;"' in drawn[0] and "var(--series-0)" in drawn[0]
    assert ">step</text>" in drawn[0], "text stays text"
    assert not re.search(r"#0[0-9a-f]{5}|DejaVu|http|<style|xlink", drawn[0])


def test_a_histogram_of_few_or_equal_lengths_is_drawn():
    for kept, rejected in (([5], []), ([], [7, 7]), ([3] * 100, [1000]), (list(range(500)), [])):
        assert "median" in charts.histogram("lengths", "Lengths", kept, rejected, x_label="tokens")


def test_a_running_mean_of_a_line_is_the_line():
    assert charts._running_mean([2.0] * 9, 3) == pytest.approx([2.0] * 9)
    assert charts._running_mean([0.0, 3.0, 6.0, 9.0], 1) == pytest.approx([1.5, 3.0, 6.0, 7.5])
    x, y = charts._thin(list(range(1000)), [float(v) for v in range(1000)])
    assert len(x) <= charts._MOST_POINTS and x == y and x[0] == 1.0


def test_numbers_for_people():
    assert [facts.short(n) for n in (0, 950, 12_345, 4_560_000, 7.6e9)] == ["0", "950", "12.3k", "4.56M", "7.6G"]
    assert [facts.duration(s) for s in (0.42, 37.4, 59.7, 245, 7620)] == [
        "0.4 s",
        "37 s",
        "1 min 00 s",
        "4 min 05 s",
        "2 h 07 min",
    ]


# ------------------------------------------------------------------------------------------- in a browser

PROBE = """<!doctype html><title>waiting</title><body style="margin:0">
<iframe id="frame" style="border:0;width:%dpx;height:3000px" srcdoc="%s"></iframe><script>
frame.onload = function () {
  const page = frame.contentDocument, width = frame.contentWindow.innerWidth;
  const scrolls = e => e.closest(".scroll, pre, svg");
  const wide = e => e.getBoundingClientRect().right > width + 1;
  const out = [...page.querySelectorAll("body *")].filter(e => !scrolls(e) && wide(e));
  const svg = page.querySelector("svg text");
  document.title = JSON.stringify({width, scroll: page.documentElement.scrollWidth, out: out.map(e => e.className),
    ink: svg ? getComputedStyle(svg).fill : null});
};</script>"""


def browse(tmp_path, page: str, *flags: str) -> subprocess.CompletedProcess:
    file = tmp_path / "page.html"
    file.write_text(page)
    command = [
        *(
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
        ),
        *("--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--enable-logging=stderr", "--log-level=0", *flags, "--dump-dom", file.as_uri()),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_has_nothing_to_say(full, tmp_path):
    done = browse(tmp_path, full[2])
    assert done.stdout.count("<svg") == CHARTS
    assert "CONSOLE" not in done.stderr
    # a check that cannot fail is a defect: the same page with a fault in it
    broken = full[2].replace("</body>", "<img src='https://example.invalid/x.png'></body>")
    assert "CONSOLE" in browse(tmp_path, broken).stderr


@pytest.mark.chromium
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("kind", ["full", "hostile"])
def test_nothing_is_wider_than_the_window(full, hostile, tmp_path, kind, width):
    page = {"full": full[2], "hostile": hostile}[kind]
    page = re.sub(r"<meta http-equiv[^>]*>", "", page)  # the policy would keep the probe out too
    done = browse(tmp_path, PROBE % (width, html.escape(page)), "--window-size=1400,3000", "--virtual-time-budget=5000")
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert found["width"] == width
    assert found["scroll"] <= width and found["out"] == []
    assert found["ink"].startswith("rgb(") and found["ink"] != "rgb(0, 0, 0)", "the page's colours reach the charts"


def test_plans_for_absent_devices_are_shown_with_their_assumptions(tmp_path):
    config, run = fake_run.make_config(tmp_path), RunDir(tmp_path)
    assert 'id="plans"' not in render(config, run)
    run.plans.mkdir()
    table = {"topology": "v5p:4x4x4", "columns": ["mesh", "MFU"], "rows": [["fsdp=64", "<b>"]], "assumptions": ["none"]}
    (run.plans / "1xv5p-4x4x4.json").write_text(json.dumps(table))
    page = render(config, run)
    for shown in ("<h3>v5p:4x4x4</h3>", "<td>fsdp=64</td>", "<td>&lt;b&gt;</td>", "Assumed: none."):
        assert shown in page
