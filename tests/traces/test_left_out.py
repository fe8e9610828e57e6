"""Rows that cannot be read: counted, listed and shown, up to the share that is allowed."""

import json

import pytest

from jaxdistill import config as configs
from jaxdistill import pipeline
from jaxdistill.config import ProblemsConfig
from jaxdistill.evals import report
from jaxdistill.records import Problem, RunDir, Trace, read_manifest, read_records
from jaxdistill.traces import imports
from jaxdistill.traces.problems import load_problems, problems
from tests.traces.brought import make_config, write

GOOD = {"problem": "1?", "generations": ["<think>\nx\n</think>\n1"], "answer": 1}
BAD = {"problem": "2?", "generations": "<b>no list</b>", "answer": 2}
HALF = {"problem": "3?", "generations": ["3", None], "answer": 3}


def lines(path, rows):
    return write(path, rows)


def section(path, **options):
    return ProblemsConfig(source="r1", path=str(path), **options)


def test_they_are_counted_listed_and_shown(tmp_path):
    path = lines(tmp_path / "set.jsonl", [GOOD, BAD, HALF, GOOD, {"other": "x" * 5000}])
    path.write_text(path.read_text() + '{"problem": "6?", "gene')
    config = make_config(tmp_path / "run", "r1", path)
    run = RunDir(tmp_path / "run")
    pipeline.run_command("generate", config)
    counts = read_manifest(run.problems)["counts"]
    assert counts["problems"] == 3
    first = {"first": f"{path}:2", "detail": '"<b>no list</b>"'}
    assert counts["bad_rows"]["rows"] == 6
    assert counts["bad_rows"]["left_out"] == 3
    assert counts["bad_rows"]["reasons"]["field 'generations' is not a list of texts"] == {"count": 1} | first
    assert counts["bad_rows"]["responses"]["the response is null or empty"]["count"] == 1
    listed = [json.loads(line) for line in (run.problems / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["line"], row["left_out"]) for row in listed] == [(2, "row"), (3, "response"), (5, "row"), (6, "row")]
    assert {row["file"] for row in listed} == {str(path)}
    assert listed[0]["start"].startswith('{"problem": "2?"')
    assert len(listed[2]["start"]) == 200
    assert listed[3]["start"] == '{"problem": "6?", "gene'
    assert "ends within the line" in listed[3]["reason"]
    assert [t.id for t in read_records(run.traces, Trace)] == ["set:1/plain/0", "set:3/plain/0", "set:4/plain/0"]
    page = report.render(config, run)
    assert "3 rows could not be read" in page
    assert "field &#39;generations&#39; is not a list of texts" in page
    assert "&lt;b&gt;no list" in page and "<b>no list" not in page
    assert f"{path}:2" in page


ASK, ANSWER = {"role": "user", "content": "1?"}, {"role": "assistant", "content": "<think>\nx\n</think>\n1"}
SYSTEM = {"role": "system", "content": "Be <b>brief</b>."}


def test_turns_of_chats_that_are_not_taken_are_counted_said_and_shown(tmp_path, capsys):
    chats = [
        [SYSTEM, ASK, ANSWER],
        [{"role": "developer", "content": [{"type": "text", "text": "Hm."}]}, SYSTEM, ASK, ANSWER, ASK, ANSWER],
        [ASK, ANSWER, ASK],
        [SYSTEM | {"content": " "}, ASK, ANSWER, None, {"role": None, "content": None}],  # none of these says anything
        [ASK, ANSWER],
    ]
    rows = [{"messages": chat, "answer": "1"} for chat in chats]
    rows[4] |= {"system": "Be kind."}
    path = write(tmp_path / "set.jsonl", rows)
    config, run = make_config(tmp_path / "run", "messages", path), RunDir(tmp_path / "run")
    pipeline.run_command("generate", config)
    assert read_manifest(run.problems)["counts"]["left_turns"] == {
        imports.SYSTEM: {"count": 3, "first": f"{path}:1", "detail": '"Be <b>brief</b>."'},
        imports.BEHIND: {"count": 2, "first": f"{path}:2", "detail": "2 of 6"},
    }
    said = " ".join(capsys.readouterr().out.split())
    assert "3 rows: the system turn is left out; set data.system to train with one; first" in said
    assert "2 rows: turns behind the first response are left out; first" in said
    page = report.render(config, run)
    assert imports.SYSTEM in page and "Be &lt;b&gt;brief" in page


@pytest.mark.parametrize(
    ("source", "row"),
    [
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "1"}], "system": "S"},
        ),
        ("prompt_completion", {"prompt": [SYSTEM, ASK], "completion": [ANSWER, ASK]}),
        ("prompt_completion", {"prompt": "1?", "completion": "1", "system_prompt": "S"}),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_system_turns_of_every_shape_are_counted(tmp_path, source, row, suffix):
    path = write(tmp_path / f"set{suffix}", [row])
    counts = problems(make_config(tmp_path / "run", source, path), RunDir(tmp_path / "run"))
    assert counts["left_turns"][imports.SYSTEM]["count"] == 1
    assert (imports.BEHIND in counts["left_turns"]) == isinstance(row.get("prompt"), list)


def test_a_set_without_any_leaves_no_list_and_nothing_in_the_report(tmp_path):
    config = make_config(tmp_path / "run", "r1", lines(tmp_path / "set.jsonl", [BAD, GOOD]))
    run = RunDir(tmp_path / "run")
    problems(config, run)
    assert (run.problems / "bad_rows.jsonl").is_file()
    lines(tmp_path / "set.jsonl", [GOOD])
    assert "bad_rows" not in problems(config, run)
    assert not (run.problems / "bad_rows.jsonl").exists()
    assert "could not be read" not in report.render(config, run)


def test_up_to_a_share_of_at_least_a_hundred_rows(tmp_path):
    small = lines(tmp_path / "small.jsonl", [GOOD] + [BAD] * 10)
    assert len(load_problems(section(small))) == 1
    eleven = lines(tmp_path / "eleven.jsonl", [GOOD] + [BAD] * 11)
    with pytest.raises(
        ValueError, match=r"eleven\.jsonl: 11 of 12 rows cannot be read; most often \(11\): .*:2: field"
    ):
        load_problems(section(eleven))
    assert len(load_problems(section(eleven, bad_rows_share=1))) == 1
    large = lines(tmp_path / "large.jsonl", [GOOD] * 900 + [BAD] * 100)
    assert len(load_problems(section(large))) == 900
    with pytest.raises(ValueError, match=r"More than bad_rows_share=0.09 allows: .* raise problems.bad_rows_share"):
        load_problems(section(large, bad_rows_share=0.09))
    assert len(load_problems(section(large, count=5, bad_rows_share=0))) == 5  # the others were not looked at


def test_too_many_are_told_as_a_table_and_stay_listed(tmp_path, capsys):
    rows = [BAD] * 12 + [{"problem": "", "generations": ["x"]}] * 3 + [GOOD]
    config = make_config(tmp_path / "run", "r1", lines(tmp_path / "set.jsonl", rows))
    run = RunDir(tmp_path / "run")
    with pytest.raises(ValueError, match="15 of 16 rows cannot be read"):
        problems(config, run)
    said = capsys.readouterr().out
    assert "12  field 'generations' is not a list of texts; first " in said
    assert "3  field 'problem' is empty; first " in said
    assert len((run.problems / "bad_rows.jsonl").read_text().splitlines()) == 15
    assert not (run.problems / "problems.parquet").exists()


def test_a_set_of_another_shape_is_not_read_to_its_end(tmp_path):
    path = lines(tmp_path / "set.jsonl", [{"text": "x"}] * 1000 + [GOOD] * 20_000)
    with pytest.raises(ValueError, match="1,000 of 1,000 rows cannot be read"):
        load_problems(section(path))


def test_stop_names_the_first_one(tmp_path):
    path = lines(tmp_path / "set.jsonl", [GOOD, HALF, BAD])
    with pytest.raises(ValueError, match=r"set\.jsonl:3: field 'generations' is not a list of texts"):
        load_problems(section(path, bad_rows="stop"))
    assert len(load_problems(section(path, bad_rows="stop", count=2))) == 2  # a response is no row


def test_many_reasons_are_summed_up(tmp_path):
    rows = [{"messages": [{"role": f"r{n}", "content": "x"}]} for n in range(80)]
    rows += [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}] * 800
    path = lines(tmp_path / "set.jsonl", rows)
    config = make_config(tmp_path / "run", "messages", path)
    reasons = problems(config, RunDir(tmp_path / "run"))["bad_rows"]["reasons"]
    assert sum(each["count"] for each in reasons.values()) == 80
    assert len(reasons) <= 51


def test_held_out_sets_have_a_list_of_their_own(tmp_path):
    training = lines(tmp_path / "a.jsonl", [GOOD])
    heldout = lines(tmp_path / "b.jsonl", [BAD, {**GOOD, "problem": "9?"}])
    data = configs.to_dict(make_config(tmp_path / "run", "r1", training))
    data["evaluate"] = {"problems": {"source": "r1", "path": str(heldout)}}
    run = RunDir(tmp_path / "run")
    counts = problems(configs.build(data), run)
    assert "bad_rows" not in counts
    assert counts["heldout_bad_rows"]["left_out"] == 1
    assert (run.problems / "heldout" / "bad_rows.jsonl").is_file()
    assert [p.prompt for p in read_records(run.problems / "heldout", Problem)] == ["9?"]


def test_how_rows_are_left_out_does_not_make_a_finished_stage_stale(tmp_path):
    path = lines(tmp_path / "set.jsonl", [GOOD])
    pipeline.run_command("generate", make_config(tmp_path / "run", "r1", path))
    changed = make_config(tmp_path / "run", "r1", path, bad_rows="stop", bad_rows_share=0.5)
    assert {status for _, _, status in pipeline.plan(changed)[:2]} == {"done"}
    with pytest.raises(ValueError, match=r"bad_rows_share is 1\.5"):
        make_config(tmp_path / "run", "r1", path, bad_rows_share=1.5)


def test_data_that_changed_between_problems_and_traces_is_refused(tmp_path):
    """A response never goes to the question of another row."""
    from jaxdistill.traces import collect

    path = lines(tmp_path / "set.jsonl", [GOOD, HALF])
    config, run = make_config(tmp_path / "run", "r1", path), RunDir(tmp_path / "run")
    problems(config, run)
    lines(path, [HALF, GOOD])
    with pytest.raises(ValueError, match=r"set\.jsonl:1: another question than when the problems were made of it"):
        collect.generate(config, run)
    lines(path, [GOOD])
    with pytest.raises(ValueError, match="problem set:2 is no longer in it"):
        collect.generate(config, run)
    lines(path, [GOOD, HALF, GOOD])
    assert collect.generate(config, run)["samples"] == 2


def test_rows_of_code_sets_that_are_odd_in_any_way_are_left_out(tmp_path):
    good = {"text": "Double it.", "test_list": ["assert f(2) == 4"], "code": "def f(x): return 2 * x"}
    odd = [{}, {"text": None}, {**good, "test_list": []}, {**good, "test_list": None}, {**good, "test_imports": 7}]
    odd += [{**good, "text": None}, {**good, "test_list": [None]}]
    odd += [{**good, "text": "half \ud83d"}, {**good, "code": 12}, [], 7]
    path = lines(tmp_path / "set.jsonl", [*odd, good])
    (found,) = load_problems(ProblemsConfig(source="mbpp", path=str(path), bad_rows_share=1))
    assert found.id == "mbpp-set:12"
    cases = {"fn_name": "f", "inputs": [[2]], "outputs": [[4]]}
    apps = [
        {"question": "x", "input_output": json.dumps({**cases, "outputs": []})},
        {"question": None, "input_output": cases},
    ]
    apps += [{"question": "x", "input_output": ""}, {"question": "x", "input_output": cases}]
    (found,) = load_problems(ProblemsConfig(source="apps", path=str(lines(tmp_path / "apps.jsonl", apps))))
    assert found.id == "apps-apps:4"
