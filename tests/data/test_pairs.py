"""Pairs: a kept trace beside a wrong one of the same problem, in one row, and counted where there is none."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxdistill.data import pairs as pairing
from jaxdistill.data.examples import Text, tokenize
from jaxdistill.data.packing import unpack
from jaxdistill.data.pairs import PairRows, changed, first_step, match
from jaxdistill.data.prepare import prepare
from jaxdistill.data.templates import check_template
from jaxdistill.tokenization import load_tokenizer
from tests.data.made import config_of, thought, write_run

SAMPLES = [
    ("a", "math", thought(3), True),
    ("a", "math", thought(4, "2"), False),
    ("a", "math", thought(5), True),
    ("b", "math", thought(2), True),
    ("c", "math", thought(2, "7"), False),
    ("d", "math", thought(6, "9"), False),
    ("d", "math", thought(1), True),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    run = write_run(root, SAMPLES)
    return run, prepare(config_of(root, pairs={}), run, run)


def test_every_problem_with_both_kinds_has_a_pair_and_the_others_are_counted(made):
    run, counts = made
    table = pq.read_table(run.tokens / pairing.ORIGINS).to_pylist()
    assert sorted((line["chosen"], line["rejected"]) for line in table) == [
        ("a/plain/0", "a/plain/1"),
        ("d/plain/1", "d/plain/0"),
    ]
    assert counts["examples"] == 4  # the kept traces are all learned from as before
    assert {n: counts["pairs"][n] for n in ("pairs", "edited", "problems_without")} == {
        "pairs": 2,
        "edited": 0,
        "problems_without": 1,
    }


def test_a_row_holds_both_traces_of_a_pair_chosen_first(made):
    run, _ = made
    rows = PairRows(run.tokens, batch_rows=1, seed=0)
    tokenizer = load_tokenizer(str(run.tokenizer))
    texts = []
    for number in range(rows.rows):
        row = {name: array[0] for name, array in rows.stored([number]).items()}
        segments = unpack(row)
        assert len(segments) % 2 == 0
        texts += [(str(tokenizer.decode(t)), max(r)) for t, r in segments]
    assert rows.segments == max(2, len(texts) // rows.rows)
    for (chosen, _), (rejected, region) in zip(texts[::2], texts[1::2], strict=True):
        assert chosen.split("assistant")[0] == rejected.split("assistant")[0]
        assert "boxed{1}" in chosen
        assert "boxed{1}" not in rejected
        assert region == 2


def test_matching_uses_every_trace_at_most_once():
    chosen, wrong = {"p": ["p/2", "p/1"], "q": ["q/1"]}, {"p": ["p/3"], "r": ["r/1"]}
    assert match(chosen, wrong, 5) == [("p/1", "p/3")]
    wrong["p"] = ["p/4", "p/3", "p/5"]
    assert match(chosen, wrong, 5) == [("p/1", "p/3"), ("p/2", "p/4")]
    assert match(chosen, wrong, 1) == [("p/1", "p/3")]


def test_an_edit_changes_one_number_what_follows_from_it_and_the_answer():
    response = "<think>\n Ann=12\n Bob=12+3=15\n Cal=15*2=30\n</think>\nThe answer is \\boxed{30}."
    seen = set()
    for sample in range(12):
        text = changed(Text(f"p/plain/{sample}", "?", response, "The answer is \\boxed{30}."))
        assert text is not None
        assert text == changed(Text(f"p/plain/{sample}", "?", response, "The answer is \\boxed{30}."))
        assert "boxed{30}" not in text.response
        assert text.response.startswith("<think>\n Ann=12\n")
        assert text.content == text.response.rpartition("</think>")[2].strip()
        if "=15\n" not in text.response:  # the result was changed, and the next step takes it on
            value = text.response.split("Bob=12+3=")[1].split("\n")[0] if "Bob=12+3=" in text.response else None
            assert value is None or f"Cal={value}*2" in text.response
        seen.add(text.response)
    assert len(seen) > 3
    assert changed(Text("p", "?", "<think>\nwords\n</think>\nyes", "yes")) is None


def test_of_the_first_step_alone_nothing_before_or_behind_is_contrasted(made):
    run, _ = made
    tokenizer = load_tokenizer(str(run.tokenizer))

    def contrasted(right: str, wrong: str) -> list[str]:
        ending = check_template(tokenizer, "reasoning", None, "")
        texts = [Text(name, "?", x, x.rpartition("</think>")[2]) for name, x in (("r", right), ("w", wrong))]
        a, b = tokenize(tokenizer, texts, response="reasoning", ending=ending)
        found = [first_step(a, b), first_step(b, a)]
        for whole, part in zip((a, b), found, strict=True):
            assert list(part.tokens) == list(whole.tokens)
            assert all(now in (0, before) for now, before in zip(part.regions, whole.regions, strict=True))
        return [str(tokenizer.decode([t for t, r in zip(x.tokens, x.regions, strict=True) if r])) for x in found]

    start, end = "<think>\n a=1\n b=1+2=", "</think>\nso \\boxed{6}"
    assert contrasted(f"{start}3\n c=3*2=6\n{end}", f"{start}4\n c=4*2=8\n{end}") == ["3\n", "4\n"]
    # a step that is missing: what stands in its place
    assert contrasted(f"{start}3\n c=3*2=6\n{end}", f"{start}3\n{end}") == [" c=3*2=6\n", "</think>\n"]
    # the last line runs to the end, with the eos
    eos = tokenizer.eos_token
    assert contrasted(f"{start}3\n</think>\nso 6", f"{start}3\n</think>\nso 7") == [f" 6{eos}", f" 7{eos}"]
    # one stops where the other goes on
    assert contrasted(f"{start}3\n</think>\nso 6", f"{start}3\n</think>\nso 6!") == [f"{eos}", f"!{eos}"]
    assert contrasted(f"{start}3\n{end}", f"{start}3\n{end}") == ["", ""]


def test_a_run_contrasts_first_steps_and_counts_tokens_as_before(made, tmp_path):
    _, before = made
    run = write_run(tmp_path, SAMPLES)
    counts = prepare(config_of(tmp_path, pairs={"span": "step"}), run, run)["pairs"]
    assert counts == before["pairs"] | {"without_difference": 0}
    row = PairRows(run.tokens, batch_rows=1, seed=0).stored([0])
    used = [int(np.sum(row["regions"][0][row["segment_ids"][0] == s] > 0)) for s in (1, 2)]
    whole = [int(np.sum(row["segment_ids"][0] == s)) for s in (1, 2)]
    assert all(0 < part < everything // 3 for part, everything in zip(used, whole, strict=True))


def test_edits_make_pairs_where_the_teacher_made_no_mistake(tmp_path):
    run = write_run(tmp_path, SAMPLES)
    counts = prepare(config_of(tmp_path, pairs={"edits": True}), run, run)["pairs"]
    assert (counts["pairs"], counts["edited"], counts["problems_without"]) == (3, 1, 0)
    rejected = pq.read_table(run.tokens / pairing.ORIGINS)["rejected"].to_pylist()
    assert "b/plain/0#edited" in rejected


def test_what_does_not_fit_is_one_line(tmp_path):
    run = write_run(tmp_path, [s for s in SAMPLES if s[3]])
    with pytest.raises(ValueError, match="no problem has a kept trace and a wrong one"):
        prepare(config_of(tmp_path, pairs={}), run, run)
    run = write_run(tmp_path / "long", [("a", "math", thought(9), True), ("a", "math", thought(9, "2"), False)])
    with pytest.raises(ValueError, match="must fit into one row"):
        prepare(config_of(tmp_path / "long", pairs={}, row_tokens=100), run, run)


def test_batches_of_pairs_are_a_function_of_seed_and_step(made):
    run, _ = made
    rows = PairRows(run.tokens, batch_rows=2, seed=3)
    first = [rows.row_numbers(s) for s in range(4)]
    assert [PairRows(run.tokens, batch_rows=2, seed=3).row_numbers(s) for s in (3, 0)] == [first[3], first[0]]
    assert sorted(np.concatenate(first).tolist()) == sorted(list(range(rows.rows)) * (8 // rows.rows))
