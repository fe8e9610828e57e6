"""Problem sources: what they read, what they refuse, and that training and held-out sets never meet."""

import json

import pytest

from jaxdistill import config as configs
from jaxdistill.config import ProblemsConfig
from jaxdistill.records import Problem, RunDir, read_records
from jaxdistill.traces.problems import load_problems, problems

GSM8K_ROW = {
    "question": "A pen costs $2. What do 9 pens cost?",
    "answer": "Each pen is $2.\nSo 9*2 = $<<9*2=18>>18.\n#### 18",
}


def write_lines(path, rows):
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def jsonl(path, **options):
    return ProblemsConfig(source="jsonl", path=str(path), **options)


def run_config(training, heldout=None):
    data = {
        "name": "test",
        "run_dir": "unused",
        "problems": training,
        "traces": {"engine": "import"},
        "data": {"row_tokens": 64},
        "student": {"init": "demo"},
        "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
    }
    if heldout:
        data["evaluate"] = {"problems": heldout}
    return configs.build(data)


def test_demo_is_a_pure_function_of_its_section():
    section = ProblemsConfig(source="demo", count=20, seed=3)
    assert load_problems(section) == load_problems(section)
    assert load_problems(section) != load_problems(ProblemsConfig(source="demo", count=20, seed=4))
    assert [p.id for p in load_problems(section)][:2] == ["demo-3:0", "demo-3:1"]


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_demo_keeps_its_count_and_no_question_is_held_out_too(tmp_path, seeds):
    config = run_config(
        {"source": "demo", "count": 40, "seed": seeds[0]}, {"source": "demo", "count": 15, "seed": seeds[1]}
    )
    counts = problems(config, RunDir(tmp_path))
    training = list(read_records(tmp_path / "problems", Problem))
    heldout = list(read_records(tmp_path / "problems" / "heldout", Problem))
    assert (len(training), len(heldout)) == (40, 15) == (counts["problems"], counts["heldout"])
    assert not {p.prompt for p in training} & {p.prompt for p in heldout}
    assert len({p.prompt for p in training}) == len({p.id for p in training}) == 40
    if seeds == (0, 0):  # the same stream: the 15 held-out ones come first, and are passed over
        assert counts["in_heldout"] == 15
        assert training[0].id == "demo-0:15"


def test_gsm8k_row(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [GSM8K_ROW, "", GSM8K_ROW | {"question": "Another?"}])
    first, second = load_problems(ProblemsConfig(source="gsm8k", path=str(path)))
    assert first == Problem(
        id="gsm8k-train:1",
        prompt="A pen costs $2. What do 9 pens cost?",
        answer="18",
        domain="math",
        source="gsm8k/train.jsonl:1",
        solution="<think>\nEach pen is $2.\nSo 9*2 = $18.\n</think>\nThe answer is \\boxed{18}.",
    )
    assert second.id == "gsm8k-train:3"


def test_jsonl_reads_the_named_fields(tmp_path):
    rows = [
        {"key": "a", "text": "What is 1/10 in decimals?", "gold": 0.10},
        {"key": 7, "text": "1+1?", "gold": 2},
        {"key": "c", "text": "Prove it.", "gold": None},
    ]
    path = write_lines(tmp_path / "set.jsonl", ['{"key": "a", "text": "One tenth?", "gold": 0.10}', *rows[1:]])
    found = load_problems(jsonl(path, problem_field="text", answer_field="gold", id_field="key", domain="mixed"))
    assert [(p.id, p.answer) for p in found] == [("a", "0.10"), ("7", "2"), ("c", None)]
    assert {p.domain for p in found} == {"mixed"}
    assert found[1].source == "set.jsonl:2"
    plain = load_problems(jsonl(path, problem_field="text", answer_field="gold", count=2))
    assert [p.id for p in plain] == ["set:1", "set:2"]


def test_a_row_may_name_its_domain(tmp_path):
    rows = [{"problem": f"{n}?", "answer": n, "topic": topic} for n, topic in enumerate(("algebra", " ", None, 3))]
    found = load_problems(
        jsonl(write_lines(tmp_path / "set.jsonl", [*rows, {"problem": "5?", "answer": 5}]), domain_field="topic")
    )
    assert [p.domain for p in found] == ["algebra", "unknown", "unknown", "unknown", "unknown"]


def test_held_out_questions_are_dropped_from_files_and_counted(tmp_path):
    rows = [{"problem": f"{n}+1?", "answer": n + 1} for n in range(6)]
    training = write_lines(tmp_path / "train.jsonl", rows)
    heldout = write_lines(tmp_path / "test.jsonl", [rows[0], rows[4]])
    config = run_config(
        {"source": "jsonl", "path": str(training), "count": 4}, {"source": "jsonl", "path": str(heldout)}
    )
    counts = problems(config, RunDir(tmp_path))
    assert counts == {"problems": 4, "heldout": 2, "in_heldout": 2, "without_answer": 0}
    kept = list(read_records(tmp_path / "problems", Problem))
    assert [p.prompt for p in kept] == ["1+1?", "2+1?", "3+1?", "5+1?"]


def test_a_held_out_set_of_an_earlier_try_is_removed(tmp_path):
    training = {"source": "demo", "count": 3}
    problems(run_config(training, {"source": "demo", "count": 2}), RunDir(tmp_path))
    problems(run_config(training), RunDir(tmp_path))
    assert [path.name for path in (tmp_path / "problems").iterdir()] == ["problems.parquet"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (['{"problem": "1+1?", "answer": "2"}', '{"problem": '], {}, r"set\.jsonl:2: not valid JSON"),
        (['{"problem": "a\tb"}'], {}, r"not valid JSON \(Invalid control character at column 15\);"),
        (["[1, 2]"], {}, r"set\.jsonl:1: expected a JSON object, found int"),
        ([{"problem": "1?", "answer": 1}, "[1, 2]"], {}, r"set\.jsonl:2: expected a JSON object, found list"),
        ([{"question": "1+1?", "answer": 2}], {}, r"set\.jsonl:1: no field 'problem'; this line has answer, question"),
        ([{"problem": "1+1?"}], {}, r"set\.jsonl:1: no field 'answer'; this line has problem"),
        ([{"problem": " \n", "answer": 2}], {}, r"set\.jsonl:1: field 'problem' is empty"),
        ([{"problem": ["x"], "answer": 2}], {}, r"set\.jsonl:1: field 'problem' is a list; it must be text: \[\"x\"\]"),
        (
            [{"problem": "1?", "answer": 1, "n": "a"}] * 2,
            {"id_field": "n"},
            r"set\.jsonl:2: its id .*: id 'a' is that of .*l:1 ",
        ),
        ([], {}, r"set\.jsonl: no problems in it"),
        ([{"problem": "1?", "answer": 1}], {"count": 2}, r"set\.jsonl: 1 problems, but count is 2"),
    ],
)
def test_bad_lines_are_named(tmp_path, rows, options, message):
    path = write_lines(tmp_path / "set.jsonl", rows)
    with pytest.raises(ValueError, match=message) as error:
        load_problems(jsonl(path, bad_rows="stop", **options))
    assert "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.jsonl: no such file"):
        load_problems(jsonl(tmp_path / "missing.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é", "answer": 1}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl:1: not UTF-8 at byte 13"):
        load_problems(jsonl(tmp_path / "latin.jsonl", bad_rows="stop"))
    path = write_lines(tmp_path / "set.jsonl", [{"question": "1?", "answer": "one"}])
    with pytest.raises(ValueError, match=r"set\.jsonl:1: no answer behind `####`"):
        load_problems(ProblemsConfig(source="gsm8k", path=str(path)))


def test_nothing_left_besides_what_is_held_out(tmp_path):
    path = write_lines(tmp_path / "set.jsonl", [{"problem": "1?", "answer": 1}])
    with pytest.raises(ValueError, match="no problems in it besides 1 that are held out"):
        load_problems(jsonl(path), {"1?"})


def test_gold_answers_may_be_forgotten_of_training_problems_alone(tmp_path):
    config = run_config(
        {"source": "demo", "count": 6, "seed": 0, "forget_answers": True}, {"source": "demo", "count": 3, "seed": 1}
    )
    counts = problems(config, RunDir(tmp_path))
    assert counts["without_answer"] == 6
    known = load_problems(ProblemsConfig(source="demo", count=6, seed=0))
    assert [p.prompt for p in read_records(tmp_path / "problems", Problem)] == [p.prompt for p in known]
    assert all(p.answer is None for p in read_records(tmp_path / "problems", Problem))
    assert all(p.answer for p in read_records(tmp_path / "problems" / "heldout", Problem))
    with pytest.raises(ValueError, match="with the gold ones"):
        run_config({"source": "demo", "count": 6}, {"source": "demo", "count": 3, "forget_answers": True})
