"""What users of other projects reported of their imports, tried on ours. Each names project and number."""

import csv
import gzip
import io
import json

import pytest

from jaxdistill.config import ProblemsConfig
from jaxdistill.traces import hub_files
from jaxdistill.traces.problems import load_problems
from tests.traces.brought import responses

ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def load(path, **options):
    return load_problems(ProblemsConfig(path=str(path), **options))


def test_content_that_is_now_text_and_now_a_list(tmp_path):
    """huggingface/datasets#7322, #5955: one type a column, so that such a set does not load at all."""
    parts = {"role": "assistant", "content": [{"type": "text", "text": "4"}]}
    rows = [{"messages": [ASK, ANSWER]}, {"messages": [ASK, parts]}, {"messages": [ASK, ANSWER], "extra": {"a": [1]}}]
    assert responses(tmp_path, "messages", rows) == ([(None, "4")] * 3, [])


def test_a_gold_answer_that_is_now_a_number_and_now_text(tmp_path):
    """huggingface/datasets#5827: a `Nan` among numbers ends the import."""
    rows = [{"problem": "1?", "answer": 1}, {"problem": "2?", "answer": "NaN"}, {"problem": "3?", "answer": "3 m"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [p.answer for p in load(tmp_path / "a.json", source="jsonl")] == ["1", None, "3 m"]


def test_gzipped_json_lines_that_are_called_json(tmp_path):
    """huggingface/datasets#5088: `.json.gz` is read as 0 rows, without an error."""
    lines = "".join(json.dumps({"problem": f"{n}?", "answer": n}) + "\n" for n in range(5))
    (tmp_path / "test.json.gz").write_bytes(gzip.compress(lines.encode()))
    assert len(load(tmp_path / "test.json.gz", source="jsonl")) == 5


def test_several_objects_in_one_line_are_said(tmp_path):
    """huggingface/datasets#4107: the error speaks of `maximum rows`, not of the line with two objects."""
    line = '{"problem": "1?", "answer": 1}'
    (tmp_path / "a.jsonl").write_text(f"{line}{line}\n{line}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: several JSON objects in one line \(a second at column 31\)"):
        load(tmp_path / "a.jsonl", source="jsonl", bad_rows="stop")
    assert len(load(tmp_path / "a.jsonl", source="jsonl")) == 1


def test_one_malformed_line_does_not_end_the_import(tmp_path):
    """NVIDIA-NeMo/Automodel#1693, huggingface/datasets#5053: one bad line stops a set of millions."""
    lines = [json.dumps({"problem": f"{n}?", "answer": n}) for n in range(200)]
    lines[77] = lines[77][:-5]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert len(load(tmp_path / "a.jsonl", source="jsonl")) == 199


@pytest.mark.parametrize("role", ["function_call", "observation", "hummany", "narrator"])
def test_a_speaker_whom_nobody_knows_costs_one_row(tmp_path, role):
    """hiyouga/LlamaFactory#2529, #2481, #2381: `Invalid role tag` in one chat ends the import of the whole set."""
    odd = [{"from": role, "value": "x"}, {"from": "gpt", "value": "y"}]
    good = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    found, reasons = responses(tmp_path, "sharegpt", [{"conversations": odd}, {"conversations": good}])
    assert found == [(None, "4")]
    assert role in reasons[0]


def test_a_user_who_speaks_twice_costs_one_row(tmp_path):
    """hiyouga/LlamaFactory#2962: chats in which one says several things before the other answers."""
    found, reasons = responses(tmp_path, "messages", [{"messages": [ASK, ASK, ANSWER]}, {"messages": [ASK, ANSWER]}])
    assert (found, reasons) == ([(None, "4")], ["two questions, and no response between them"])


def test_an_entry_that_is_no_object_costs_one_row(tmp_path):
    """ai-dynamo/aiperf#828: `.get()` on a text in the list of turns ends the conversion of the whole set."""
    rows = [{"conversations": ["human: hello", {"from": "gpt", "value": "x"}]}, {"conversations": None}]
    rows += [{"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}]
    found, reasons = responses(tmp_path, "sharegpt", rows)
    assert (found, len(reasons)) == ([(None, "4")], 2)


def test_a_system_prompt_before_the_question_does_not_shift_the_turns(tmp_path):
    """Tencent/AngelSlim#345, ai-dynamo/aiperf#798: question and answer are taken by place, not by who speaks."""
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "2+2?"},
        {"from": "gpt", "value": "4"},
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns, "system": "Be brief."}]))
    (found,) = load(tmp_path / "a.json", source="sharegpt")
    assert found.prompt == "2+2?"
    assert responses(tmp_path, "sharegpt", [{"conversations": turns}]) == ([(None, "4")], [])


def test_calls_of_tools_are_not_read_as_answers(tmp_path):
    """axolotl-ai-cloud/axolotl#3824, meta-pytorch/torchtune#2405: null beside `tool_calls`, which are lost."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    rows = [{"messages": [ASK, call, {"role": "tool", "content": "4"}, ANSWER]}, {"messages": [ASK, ANSWER]}]
    assert responses(tmp_path, "messages", rows) == ([(None, "4")], ["the response calls a tool"])


def test_null_never_becomes_a_word(tmp_path):
    """huggingface/transformers#45422, PrimeIntellect-ai/renderers#131: null content is written as `None`."""
    rows = [{"messages": [ASK, {"role": "assistant", "content": None, "reasoning_content": None}]}]
    rows += [{"messages": [ASK, ANSWER | {"reasoning_content": None, "thinking": None, "name": None}]}]
    assert responses(tmp_path, "messages", rows) == ([(None, "4")], ["the response is null or empty"])


@pytest.mark.parametrize("thoughts", [None, "", "\n\n", "  \n "])
def test_thoughts_of_nothing_are_none(tmp_path, thoughts):
    """NVIDIA-NeMo/Nemotron#240: rows whose `reasoning_content` is null or blank are dropped without a word."""
    rows = [{"messages": [ASK, ANSWER | {"reasoning_content": thoughts}]}]
    assert responses(tmp_path, "messages", rows) == ([(None, "4")], [])


def test_thoughts_under_openrouters_name(tmp_path):
    """ConardLi/easy-dataset#381, AnswerDotAI/fastllm#61: thoughts in `reasoning` are lost."""
    details = [{"type": "reasoning.text", "text": "two and two", "format": "unknown", "index": 0}]
    rows = [{"messages": [ASK, ANSWER | {"refusal": None, "reasoning": "two and two", "reasoning_details": details}]}]
    assert responses(tmp_path, "messages", rows) == ([("two and two", "4")], [])


def test_a_response_that_only_closes_its_thoughts(tmp_path):
    """deepseek-ai/DeepSeek-R1#352, vllm-project/vllm#13125: the prompt had opened them, and they are read as answer."""
    rows = [{"problem": "2+2?", "generations": ["two and two\n</think>\n\n4"]}]
    assert responses(tmp_path, "r1", rows) == ([("two and two", "4")], [])


def test_half_an_emoji_costs_one_row(tmp_path):
    """daaain/claude-code-log#139, run-llama/llama_index#11788: half a pair of UTF-16 ends the run at its end."""
    rows = [{"messages": [ASK, {"role": "assistant", "content": "\udcb2"}]}, {"messages": [ASK, ANSWER]}]
    found, reasons = responses(tmp_path, "messages", rows)
    assert found == [(None, "4")]
    assert "half" in reasons[0] or "UTF-8" in reasons[0]


def test_a_quote_that_is_never_closed_is_said(tmp_path):
    """cldf/csvw#52, wireservice/csvkit#382: it takes in the rest of the file, or `field larger than field limit`."""
    text = 'problem,answer\n1?,1\n2?,"never closed\n' + "3?,3\n" * 50_000
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=r"a\.csv:2: a quote opens in line 3 and is never closed"):
        load(tmp_path / "a.csv", source="jsonl")


def test_a_row_of_a_csv_with_other_columns_costs_one_row(tmp_path):
    """ray-project/ray#28891: `Expected 18 columns, got 15` ends the import."""
    out = io.StringIO()
    csv.writer(out).writerows([["problem", "answer", "note"], ["1?", "1", "a"], ["2?", "2"], ["3?", "3", "c, d"]])
    (tmp_path / "a.csv").write_text(out.getvalue())
    assert [p.answer for p in load(tmp_path / "a.csv", source="jsonl")] == ["1", "3"]


def test_a_download_that_was_cut_off_is_no_shorter_set(tmp_path):
    """huggingface/datasets#3060, google-research-datasets/natural-questions#24: `Compressed file ended before ...`."""
    lines = "".join(json.dumps({"problem": f"{n}?" * 2000, "answer": n}) + "\n" for n in range(1000)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-1000])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: damaged or cut off after row [\d,]+ .*; fetch it again"):
        load(tmp_path / "a.jsonl.gz", source="jsonl")


def test_a_table_beside_the_data_of_a_hub_set_is_not_read_as_data():
    """huggingface/datasets#6315: a CSV of metadata in the repository is taken for the data."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: data/*.jsonl\n---\n"
    names = ["README.md", "all_annotations.csv", "data/a.jsonl", "data/b.jsonl"]
    assert list(hub_files.choose(names, card, None, None, "o/n").files) == ["data/a.jsonl", "data/b.jsonl"]
    with pytest.raises(ValueError, match="files of several kinds"):
        hub_files.choose(["a.csv", "b.jsonl"], "", None, None, "o/n")


def test_rows_that_are_lists_of_turns(tmp_path):
    """unslothai/unsloth#321: a list of lists of turns, `'list' object has no attribute 'keys'`."""
    rows = [[{"from": "human", "value": "foo"}, {"from": "gpt", "value": "bar"}]] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.json", "b.jsonl"):
        assert [p.prompt for p in load(tmp_path / name, source="sharegpt")] == ["foo"] * 3
    with pytest.raises(ValueError, match="no field 'generations'; this line has conversations, messages"):
        load(tmp_path / "a.json", source="r1", bad_rows="stop")
