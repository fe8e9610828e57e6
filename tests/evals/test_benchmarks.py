"""Benchmarks: every set's loader on a file of its form, GSM8K and HumanEval on real rows, every scorer both ways."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill.config import BenchmarkConfig, CodeConfig
from jaxdistill.evals import benchmarks
from jaxdistill.evals.benchmarks import describe, known, load
from jaxdistill.evals.scoring import Marker, mark_boolean, mark_choice

HUMANEVAL = {
    "task_id": "HumanEval/53",
    "prompt": 'def add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n    5\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return x + y\n",
    "test": "def check(candidate):\n    assert candidate(0, 1) == 1\n    assert candidate(2, 3) == 5\n",
}
GSM8K = {
    "question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total?",
    "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total is 2+1=<<2+1=3>>3 bolts of fabric\n#### 3",
}
LIVE = {
    "question_content": "Print the sum.",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": "[]",
    "starter_code": "",
    "metadata": "{}",
}
ROWS = {
    "gsm8k": [GSM8K],
    "math500": [{"problem": "$1+1$?", "solution": "...", "answer": "2", "subject": "Algebra", "level": 1}],
    "aime24": [{"id": 60, "problem": "Find $n$.", "solution": "", "answer": "204", "url": "", "year": "2024"}],
    "aime25": [{"question": "Find the sum.", "answer": "70"}],
    "amc": [{"id": 0, "problem": "What is $m+n$?", "answer": 142.0, "url": ""}],
    "olympiadbench": [{"question": "Solve.", "final_answer": ["$1$", "$2$"], "subfield": "Algebra"}],
    "minerva": [{"question": "How far?", "answer": "1.5 \\times 10^{3}"}],
    "arc_challenge": [
        {"question": "Which?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        {"question": "What?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"},
    ],
    "strategyqa": [{"qid": "1", "question": "Do cats eat?", "answer": True}, {"question": "Can it?", "answer": False}],
    "mmlu": [{"question": "Find it.", "subject": "abstract_algebra", "choices": ["0", "4", "2", "6"], "answer": 1}],
    "ifeval": [
        {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 2, "prompt": "In Hindi.", "instruction_id_list": ["language:response_language"], "kwargs": [{}]},
    ],
    "humaneval": [HUMANEVAL],
    "mbpp": [{"prompt": "Add.", "code": "", "test_imports": [], "test_list": ["assert add(1, 2) == 3"], "task_id": 2}],
    "livecodebench": [LIVE],
    "jsonl": [{"problem": "1+1", "answer": 2}],
}  # fmt: skip
GOLD = {
    "gsm8k": "3", "math500": "2", "aime24": "204", "aime25": "70", "amc": "142", "olympiadbench": "$1$, $2$",
    "minerva": "1.5 \\times 10^{3}", "arc_challenge": "B", "strategyqa": "yes", "mmlu": "B", "jsonl": "2",
}  # fmt: skip


def written(folder, name, rows):
    """Rows as a JSON-lines file, and as Parquet where the hub has them so."""
    if any(pattern.endswith("parquet") for pattern in describe(BenchmarkConfig(name=name)).files):
        path = folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_benchmark_has_a_file_that_is_read(tmp_path):
    assert set(known()) == set(ROWS)
    for name, rows in ROWS.items():
        items = load(BenchmarkConfig(name=name, path=str(written(tmp_path, name, rows))))
        assert len(items) == (1 if name == "ifeval" else len(rows)), name
        first = items[0].problem
        assert first.answer == GOLD.get(name), name
        assert first.id.startswith(f"{name}/") and len({i.problem.id for i in items}) == len(items)
        question = rows[0].get("question") or rows[0].get("problem") or rows[0].get("prompt") or ""
        assert question.strip() in first.prompt, name
        assert (first.tests is not None) == (items[0].scorer == "code"), name


def test_what_is_asked_and_of_which_domain(tmp_path):
    mmlu = load(BenchmarkConfig(name="mmlu", path=str(written(tmp_path, "mmlu", ROWS["mmlu"]))))[0].problem
    assert mmlu.prompt == (
        "Find it.\n\nA. 0\nB. 4\nC. 2\nD. 6\n\nAnswer with the letter of the right choice within \\boxed{}."
    )
    assert mmlu.domain == "abstract_algebra"
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": "1+1", "a": 2, "domain": "sums"}\n{"q": "2+1", "a": 3}\n')
    config = BenchmarkConfig(
        name="mine", kind="jsonl", path=str(path), fields={"problem": "q", "answer": "a"}, prompt="Say: {problem}"
    )
    assert [(i.problem.prompt, i.problem.answer, i.problem.domain) for i in load(config)] == [
        ("Say: 1+1", "2", "sums"),
        ("Say: 2+1", "3", "math"),
    ]


def test_a_count_takes_the_same_items_in_their_order(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"problem": f"p{i}", "answer": i}) + "\n" for i in range(50)))
    config = BenchmarkConfig(name="many", kind="jsonl", path=str(path), count=10)
    found = [int(i.problem.answer or "") for i in load(config)]
    assert found == [int(i.problem.answer or "") for i in load(config)] == sorted(found) and len(found) == 10
    assert found != list(range(10)), "not just the first ones"


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("jsonl", {"problem": "x"}, r"1: no gold answer: no field 'answer', this row has problem"),
        ("jsonl", {"problem": "x", "answer": " "}, "no gold answer in the field 'answer'"),
        ("jsonl", {"problem": "x", "answer": None}, "no gold answer in the field 'answer'"),
        ("gsm8k", {"question": "x", "answer": "no mark"}, "no gold answer behind"),
        ("mmlu", {"question": "x", "choices": ["a", "b"], "answer": 2}, "none of the 2 choices"),
        ("mmlu", {"question": "x", "choices": "ab", "answer": 0}, "no list of two to ten choices"),
        ("humaneval", {"prompt": "x"}, "it is no row of HumanEval"),
        ("ifeval", {"prompt": "x", "instruction_id_list": [], "kwargs": []}, "no gold"),
    ],
)
def test_a_row_without_gold_is_named(tmp_path, name, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        load(BenchmarkConfig(name=name, path=str(path)))
    assert "rows.jsonl:1" in str(error.value) and "\n" not in str(error.value)


def test_unknown_and_unreachable_benchmarks(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"gsm9k is not known; known are aime24.*kind: jsonl"):
        load(BenchmarkConfig(name="gsm9k"))
    with pytest.raises(ValueError, match="on no hub"):
        load(BenchmarkConfig(name="mine", kind="jsonl"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"openai/gsm8k: not to be had from the hub.*`path`"):
        load(BenchmarkConfig(name="gsm8k"))


def test_from_the_hubs_folder(monkeypatch, tmp_path):
    """What a download leaves: files in folders, of which the benchmark's patterns pick some."""
    for part, answer in (
        ("main/test-0.parquet", "#### 1"),
        ("main/train-0.parquet", "x"),
        ("socratic/test-0.parquet", "x"),
    ):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"question": "q", "answer": answer}]), tmp_path / part)
    asked = []
    monkeypatch.setattr(benchmarks.hub, "fetch_data", lambda *arguments: asked.append(arguments) or tmp_path)
    items = load(BenchmarkConfig(name="gsm8k", revision="abc"))
    assert [i.problem.answer for i in items] == ["1"] and asked == [("openai/gsm8k", ["main/test-*.parquet"], "abc")]


def test_a_question_that_was_trained_on_is_counted(tmp_path):
    items = load(
        BenchmarkConfig(name="gsm8k", path=str(written(tmp_path, "gsm8k", [GSM8K, GSM8K | {"question": "new"}])))
    )
    assert benchmarks.overlap(items, iter(["A ROBE takes 2  bolts" + GSM8K["question"][20:], "other"])) == 1


# ------------------------------------------------------------------------------------------------- scorers


def item(tmp_path, name, row=0):
    return load(BenchmarkConfig(name=name, path=str(written(tmp_path, name, ROWS[name]))))[row]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("\\boxed{B}", "correct"), ("The answer is (B).", "correct"), ("\\boxed{\\text{B}}", "correct"),
        ("\\boxed{4}", "correct"), ("\\boxed{B. 4}", "correct"), ("\\boxed{C}", "incorrect"),
        ("\\boxed{0}", "incorrect"), ("\\boxed{7}", "undecided"), ("\\boxed{A or B}", "undecided"), ("B", "undecided"),
    ],
)  # fmt: skip
def test_multiple_choice(tmp_path, answer, outcome):
    assert mark_choice(f"<think>\nperhaps A\n</think>\n{answer}", item(tmp_path, "mmlu")).outcome == outcome


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("\\boxed{yes}", "correct"), ("The answer is True.", "correct"), ("\\boxed{\\text{Yes}}", "correct"),
        ("\\boxed{no}", "incorrect"), ("Answer: false", "incorrect"), ("\\boxed{yes and no}", "undecided"),
        ("Yes, it can.", "undecided"),
    ],
)  # fmt: skip
def test_yes_or_no(tmp_path, answer, outcome):
    assert mark_boolean(answer, item(tmp_path, "strategyqa")).outcome == outcome


def test_one_marker_for_all_scorers(tmp_path):
    code = item(tmp_path, "humaneval")
    program = "<think>\nadd\n</think>\n```python\ndef add(x, y):\n    return x {} y\n```"
    pairs = [
        ("So \\boxed{3.0}.", item(tmp_path, "gsm8k")),
        (program.format("+"), code),
        ("So \\boxed{4}.", item(tmp_path, "gsm8k")),
        (program.format("-"), code),
        ("Sure no comma here", item(tmp_path, "ifeval")),
        ("\\boxed{C}", item(tmp_path, "mmlu")),
    ]
    with Marker(CodeConfig(isolation="limits"), workers=1) as marker:
        found = marker.mark(pairs)
    assert [c.outcome for c in found] == ["correct", "correct", "incorrect", "incorrect", "correct", "incorrect"]


# ------------------------------------------------------------------------------------------- the real data

DATA = Path(os.environ.get("JAXDISTILL_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="needs GSM8K in JAXDISTILL_DATA")
def test_gsm8k_as_published():
    items = load(BenchmarkConfig(name="gsm8k", path=str(DATA / "gsm8k" / "test.jsonl")))
    assert len(items) == 1319 and items[1].problem.answer == "3"
    right = [(f"<think>\nsome steps\n</think>\nThe answer is \\boxed{{{i.problem.answer}}}.", i) for i in items]
    shifted = [(text, items[n - 1]) for n, (text, _) in enumerate(right)]
    with Marker(CodeConfig(), workers=2) as marker:
        assert [c.outcome for c in marker.mark(right)] == ["correct"] * 1319
        wrong = marker.mark(shifted)
    same = sum(a.problem.answer == b.problem.answer for (_, a), (_, b) in zip(right, shifted, strict=True))
    assert sum(c.outcome == "correct" for c in wrong) == same < 50


@pytest.mark.skipif(not (DATA / "humaneval").is_dir(), reason="needs HumanEval in JAXDISTILL_DATA")
def test_humaneval_as_published():
    path = DATA / "humaneval" / "HumanEval.jsonl.gz"
    items = load(BenchmarkConfig(name="humaneval", path=str(path)))
    assert len(items) == 164
    solutions = []
    with gzip.open(path, "rt") as file:
        for item, row in zip(items, map(json.loads, file), strict=True):
            solutions.append((f"```python\n{row['prompt']}{row['canonical_solution']}\n```", item))
            solutions.append((f"```python\n{row['prompt']}    return None\n```", item))
    with Marker(CodeConfig(isolation="limits"), workers=2) as marker:
        found = marker.mark(solutions[:40])
    assert [c.outcome for c in found] == ["correct", "incorrect"] * 20
