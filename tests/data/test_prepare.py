"""The stage `prepare`: the same bytes from any number of processes, and one line for whatever does not fit."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from jaxdistill import hub, pipeline
from jaxdistill.config import build, load
from jaxdistill.data import rows, summary, workers
from jaxdistill.data.examples import ANSWER, PROMPT
from jaxdistill.data.packing import unpack
from jaxdistill.data.prepare import prepare
from jaxdistill.data.rows import Batches
from jaxdistill.records import RunDir, Trace, read_records, write_records
from jaxdistill.tokenization import load_tokenizer
from tests.data.made import config_of, make_trace, thought, write_run
from tests.helpers import TINY, tiny_config

FILES = (rows.FILE, rows.ORDER, "origins.parquet")


def samples_of(domain, count, steps=lambda i: 1 + i % 6, prefix="p"):
    return [(f"{prefix}-{domain}-{i}", domain, thought(steps(i)), True) for i in range(count)]


def prepared(root, samples, **data):
    run = write_run(root, samples)
    return run, prepare(config_of(root, **data), run, run)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


# -------------------------------------------------------------------------------------- processes and kills


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A run of 2,200 demo problems up to its verdicts, and its config."""
    root = tmp_path_factory.mktemp("verified")
    problems = {"source": "demo", "count": 2200, "seed": 5}
    student = TINY["student"] | {"tokenizer": "demo"}
    config = tiny_config(root, problems=problems, student=student, evaluate=None)
    for command in ("generate", "verify"):
        pipeline.run_command(command, load(config))
    return config


def start(config: Path, log: Path) -> subprocess.Popen:
    """`prepare` by two processes; not through a pipe, which a process left behind would hold open."""
    command = [sys.executable, "-m", "jaxdistill", "prepare", str(config), "--set", "data.workers=2"]
    with open(log, "w") as out:
        return subprocess.Popen(command, stdout=out, stderr=out)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    family = psutil.Process(process.pid).children(recursive=True)
    return [child for child in family if "spawn_main" in " ".join(child.cmdline())]


def test_processes_change_no_byte_and_a_kill_leaves_none_of_them_behind(verified, tmp_path):
    config = load(verified)
    tokens = RunDir(Path(config.run_dir)).tokens
    pipeline.run_command("prepare", config)
    want = contents(tokens)
    counts = json.loads((tokens / "manifest.json").read_text())["counts"]
    assert counts["examples"] == 2200
    pipeline.redo("prepare", config)

    process = start(verified, tmp_path / "log")
    deadline = time.monotonic() + 60
    scratch, children = tokens / "tokens.bin", []
    while (len(children) < 2 or not scratch.exists()) and process.poll() is None and time.monotonic() < deadline:
        children = workers_of(process)
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(children) == 2
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    assert not alive
    assert not (tokens / "manifest.json").exists()

    assert start(verified, tmp_path / "log").wait(timeout=120) == 0
    assert "2,200 examples" in (tmp_path / "log").read_text()
    assert contents(tokens) == want
    assert not scratch.exists()


def test_few_traces_are_not_worth_a_process(verified):
    traces = RunDir(Path(load(verified).run_dir)).traces
    assert workers.default_workers([traces]) == 1


def test_chunks_end_by_number_or_by_size(tmp_path, monkeypatch):
    from jaxdistill.data import sources

    run = write_run(tmp_path, samples_of("math", 10))
    taken = sources.select(config_of(tmp_path).data, run)
    monkeypatch.setattr(workers, "CHUNK_TRACES", 4)
    assert [len(c) for c in workers.chunks_of(sources.candidates(taken))] == [4, 4, 2]
    taken = sources.select(config_of(tmp_path).data, run)
    monkeypatch.setattr(workers, "CHUNK_CHARACTERS", 1)
    assert [len(c) for c in workers.chunks_of(sources.candidates(taken))] == [1] * 10


# ------------------------------------------------------------------------------------------------- contents


def segments_of(run):
    """(place, tokens, regions) of every segment."""
    batches = Batches(run.tokens, batch_rows=1, seed=0)
    for row in range(batches.rows):
        for number, (tokens, regions) in enumerate(unpack(batches.stored_row(row))):
            yield (row, number), [int(t) for t in tokens], regions


def check_rows(run: RunDir) -> list[str]:
    """Checks that every segment is its trace's response, to the letter; returns the traces' ids, sorted."""
    tokenizer = load_tokenizer(str(run.tokenizer))
    batches = Batches(run.tokens, batch_rows=1, seed=0)
    origins = pq.read_table(run.tokens / "origins.parquet").to_pylist()
    responses = {t.id: t.response for t in read_records(run.traces, Trace)}
    seen = []
    for row in range(batches.rows):
        segments = unpack(batches.stored_row(row))
        for origin, (tokens, regions) in zip([o for o in origins if o["row"] == row], segments, strict=True):
            text = tokenizer.decode([t for t, r in zip(tokens, regions, strict=True) if r != PROMPT])
            assert text == responses[origin["trace_id"]] + tokenizer.eos_token
            assert (tokens[-1], regions[-1]) == (tokenizer.eos_token_id, ANSWER)
            seen.append(origin["trace_id"])
    return sorted(seen)


def test_every_row_leads_back_to_its_traces(tmp_path):
    run, counts = prepared(tmp_path, samples_of("math", 40))
    assert check_rows(run) == sorted(f"p-math-{i}/plain/0" for i in range(40))
    assert counts["prompt_tokens"] + counts["thinking_tokens"] + counts["answer_tokens"] == counts["tokens"]


def test_histograms_count_every_example_in_shared_bins(tmp_path, capsys):
    _, counts = prepared(tmp_path, samples_of("math", 40))
    found = counts["length_histograms"]
    assert found["edges"] == sorted(set(found["edges"]))
    for name in ("prompt", "thinking", "answer"):
        assert sum(found[name]) == 40
        assert len(found[name]) == len(found["edges"]) - 1
    output = capsys.readouterr().out
    assert "of the positions are real" in output
    assert "█" in output
    assert f"prompt {counts['prompt_tokens'] / counts['tokens']:.1%}" in output


@pytest.mark.parametrize("most", [1, 2, 3, 7, 40, 32_767, 131_072])
def test_bins_hold_the_shortest_and_the_longest(most):
    lengths = np.array([[1, 0, 1], [most, most, 1]])
    found = summary.histograms(lengths)
    assert all(sum(found[name]) == 2 for name in ("prompt", "thinking", "answer"))
    assert len(found["edges"]) <= summary.MOST_BINS + 4


# ------------------------------------------------------------------------------------------------- overlong

LONG = ("p-long", "math", thought(60), True)


def test_an_overlong_trace_is_an_error_by_default(tmp_path):
    with pytest.raises(ValueError, match=r"p-long/plain/0: \d+ tokens > data\.row_tokens=160; raise it, or set"):
        prepared(tmp_path, [*samples_of("math", 3), LONG])


def test_or_dropped_and_counted(tmp_path, capsys):
    run, counts = prepared(tmp_path, [LONG, *samples_of("math", 3)], overlong="drop")
    assert (counts["examples"], counts["overlong_dropped"]) == (3, 1)
    assert check_rows(run) == [f"p-math-{i}/plain/0" for i in range(3)]
    assert "1 overlong dropped" in capsys.readouterr().out


def test_or_kept_whole_in_longer_rows_within_the_context(tmp_path):
    samples = [*samples_of("math", 3), ("p-long", "math", thought(60), True)]
    with pytest.raises(ValueError, match=r"row length=384 is beyond the student's context of 256"):
        prepared(tmp_path / "a", samples, overlong="keep")
    run = write_run(tmp_path / "b", samples)
    config = config_of(tmp_path / "b", overlong="keep")
    data = TINY["student"]["architecture"] | {"max_position_embeddings": 512}
    config = build(
        TINY
        | {
            "run_dir": config.run_dir,
            "data": {"row_tokens": 160, "overlong": "keep"},
            "student": {"tokenizer": "demo", "architecture": data},
        }
    )
    counts = prepare(config, run, run)
    assert (counts["examples"], counts["row_tokens"]) == (4, 384)
    assert Batches(run.tokens, batch_rows=1, seed=0).row_tokens == 384
    # nothing is longer: nothing changes
    short = write_run(tmp_path / "c", samples[:3])
    assert prepare(config_of(tmp_path / "c", overlong="keep"), short, short)["row_tokens"] == 160


def test_all_dropped_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"all 1 kept traces were dropped: 1 longer than data\.row_tokens=160"):
        prepared(tmp_path, [LONG], overlong="drop")


# ------------------------------------------------------------------------------------------------- mixtures

DOMAINS = [*samples_of("math", 30), *samples_of("code", 12), *samples_of("chat", 5)]


def test_shares_are_what_the_weights_say_and_what_is_left_out_is_told(tmp_path, capsys):
    mixture = [{"name": "m", "domains": ["math"], "weight": 1}, {"name": "c", "domains": ["code"], "weight": 1}]
    run, counts = prepared(tmp_path, DOMAINS, mixture=mixture)
    assert counts["left_out"] == {"chat": 5}
    assert "5 of chat" in capsys.readouterr().out
    math, code = counts["sources"]
    assert (math["examples"], code["examples"]) == (30, 12)
    assert math["wanted_share"] == code["wanted_share"] == 0.5
    assert abs(math["share"] - 0.5) <= 1 / counts["rows"]
    assert math["share"] + code["share"] == pytest.approx(1)
    # and the training reads just that: rows of one source each
    batches = Batches(run.tokens, batch_rows=1, seed=0)
    origins = pq.read_table(run.tokens / "origins.parquet").to_pylist()
    source = {o["row"]: o["source"] for o in origins}
    assert all(source[o["row"]] == o["source"] for o in origins)
    read = [source[batches.order.row_at(i)] for i in range(4 * counts["rows"])]
    assert read.count("m") / len(read) == pytest.approx(math["share"])


def test_without_weights_every_source_has_what_it_has(tmp_path):
    mixture = [{"name": "m", "domains": ["math"]}, {"name": "rest", "domains": ["code", "chat"]}]
    _, counts = prepared(tmp_path, DOMAINS, mixture=mixture)
    assert [s["passes_per_epoch"] for s in counts["sources"]] == [1, 1]
    assert [(d["domain"], d["examples"]) for d in counts["domains"]] == [("chat", 5), ("code", 12), ("math", 30)]


def test_another_runs_traces_and_prompts_of_their_own(tmp_path):
    other = write_run(tmp_path / "other", samples_of("math", 8))
    mixture = [
        {"name": "own", "weight": 3},
        {"name": "other", "run": str(other.root), "weight": 1, "suffix": " Be exact.", "max_examples": 5},
    ]
    run, counts = prepared(tmp_path / "own", samples_of("math", 20), mixture=mixture)  # the same ids in both
    assert [s["examples"] for s in counts["sources"]] == [20, 5]
    tokenizer = load_tokenizer(str(run.tokenizer))
    batches = Batches(run.tokens, batch_rows=1, seed=0)
    for origin in pq.read_table(run.tokens / "origins.parquet").to_pylist():
        tokens, _ = unpack(batches.stored_row(origin["row"]))[origin["segment"] - 1]
        assert ("Be exact." in tokenizer.decode(tokens)) == (origin["source"] == "other")


def test_a_cap_does_not_depend_on_the_order_of_the_traces(tmp_path):
    mixture = [{"name": "m", "domains": ["math"], "max_examples": 7}]
    taken = []
    for name, samples in (("a", DOMAINS), ("b", DOMAINS[::-1])):
        run, _ = prepared(tmp_path / name, samples, mixture=mixture)
        taken.append(sorted(pq.read_table(run.tokens / "origins.parquet")["trace_id"].to_pylist()))
    assert taken[0] == taken[1]
    assert len(taken[0]) == 7


def test_rows_from_another_runs_verdicts_are_stale_when_these_change(tmp_path):
    other = write_run(tmp_path / "other", samples_of("math", 8))
    write_run(tmp_path / "own", samples_of("code", 8))
    mixture = [{"name": "own"}, {"name": "other", "run": str(other.root)}]
    config = config_of(tmp_path / "own", mixture=mixture)
    pipeline.run_command("prepare", config)
    pipeline.run_command("prepare", config)  # done before
    write_run(tmp_path / "other", samples_of("math", 9))
    with pytest.raises(ValueError, match="was made from other verify output than is there now"):
        pipeline.run_command("prepare", config)


# ------------------------------------------------------------------------------------------------ curricula


@pytest.mark.parametrize("by", ["tokens", "steps"])
def test_a_curriculum_goes_from_short_to_long(tmp_path, by, capsys):
    run, counts = prepared(tmp_path, samples_of("math", 60), curriculum={"by": by, "parts": 3})
    batches = Batches(run.tokens, batch_rows=1, seed=0)
    steps = {f"p-math-{i}/plain/0": 1 + i % 6 for i in range(60)}
    of_row: dict[int, list[int]] = {}
    for origin in pq.read_table(run.tokens / "origins.parquet").to_pylist():
        of_row.setdefault(origin["row"], []).append(steps[origin["trace_id"]])
    phases = [
        [s for i in range(p["begins"], p["ends"]) for s in of_row[batches.order.row_at(i)]] for p in counts["phases"]
    ]
    assert sorted(s for phase in phases for s in phase) == sorted(steps.values())
    assert all(max(a) < min(b) for a, b in itertools.pairwise(phases))
    output = capsys.readouterr().out
    assert "then all" in output
    assert ("before the last phase" in output) == (counts["phases"][-1]["ends"] > 30 * 8)


def test_the_teachers_pass_rate_counts_every_sample(tmp_path):
    samples = []
    for i in range(8):
        rights = 1 + i % 4
        samples += [(f"p{i}", "math", thought(1 + k), k < rights) for k in range(4)]
    phases = [{"until": 0.75}, {"until": 0.5, "passes": 2}, {}]
    _, counts = prepared(tmp_path, samples, curriculum={"by": "pass_rate", "phases": phases})
    found = [(p["easiest"], p["hardest"], p["examples"], p["passes"]) for p in counts["phases"]]
    assert found == [(1.0, 0.75, 14, 1), (0.5, 0.5, 4, 2), (0.25, 0.25, 2, 1)]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixture": [{"name": "m", "domains": ["maths"]}]}, "m wants the domain maths, .* did you mean math?"),
        ({"mixture": [{"name": "m", "domains": ["xyz"]}]}, "known are chat, code, math"),
        ({"mixture": [{"name": "m"}, {"name": "c", "domains": ["code"]}]}, "both c and m want p-code-0/plain/0"),
        ({"mixture": [{"name": "m", "run": "/nowhere/x"}]}, "/nowhere/x has no finished verdicts"),
        ({"row_tokens": 300}, r"data\.row_tokens=300 is beyond the student's context of 256; lower it"),
        ({"curriculum": {"by": "pass_rate", "parts": 2}}, "same pass_rate"),
        ({"chat_template": "nope"}, "nope is no file; built in are plain, chatml"),
    ],
)
def test_what_does_not_fit_the_traces_is_one_line(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as caught:
        prepared(tmp_path, DOMAINS, **data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixture": [{"name": "m", "weight": 0}]}, r"the weight of m is 0\.0; set it above 0"),
        ({"mixture": [{"name": "m", "weight": -1}]}, r"the weight of m is -1\.0; set it above 0"),
        ({"mixture": [{"name": "m", "weight": float("inf")}]}, "the weight of m is inf"),
        ({"mixture": [{"name": "m", "weight": 1}, {"name": "n"}]}, "some sources have a weight and some have none"),
        ({"mixture": [{"name": "m"}, {"name": "m"}]}, "two sources have the same name"),
        (
            {"mixture": [{"name": "m", "wieght": 1}]},
            r"unknown key data\.mixture\.0\.wieght; did you mean data\.mixture\.0\.weight\?",
        ),
        ({"mixture": [{"weight": 1}]}, r"data\.mixture\.0\.name is missing"),
        ({"curriculum": {"by": "tokens"}}, "exactly one of `parts`"),
        ({"curriculum": {"by": "tokens", "parts": 1}}, "parts is 1; set at least 2"),
        ({"curriculum": {"by": "tokens", "phases": [{"until": 9}, {"until": 9}, {}]}}, "it has to rise"),
        ({"curriculum": {"by": "pass_rate", "phases": [{"until": 0.5}, {"until": 0.7}, {}]}}, "it has to fall"),
        ({"curriculum": {"by": "tokens", "phases": [{"until": 9}]}}, "each with an `until` but the last"),
        ({"curriculum": {"by": "tokens", "phases": [{"until": 9, "passes": 0}, {}]}}, "passes is 0"),
        ({"workers": 0}, "at least 1 process"),
        ({"overlong": "cut"}, r"data\.overlong is 'cut'"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_the_config(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **data)


def test_nothing_kept_is_said(tmp_path):
    with pytest.raises(ValueError, match="not one trace was kept"):
        prepared(tmp_path, [("p", "math", thought(2), False)])


def test_a_source_without_kept_traces_is_said(tmp_path):
    samples = [*samples_of("math", 3), ("q", "code", thought(1), False)]
    mixture = [{"name": "m", "domains": ["math"]}, {"name": "c", "domains": ["code"]}]
    with pytest.raises(ValueError, match=r"data\.mixture: c has no kept trace in .*; leave it out"):
        prepared(tmp_path, samples, mixture=mixture)


def test_ids_that_repeat_or_are_missing_are_said(tmp_path):
    run = write_run(tmp_path, samples_of("math", 3))
    traces = list(read_records(run.traces, Trace))
    write_records(run.traces / "more.parquet", Trace, traces[:1])
    with pytest.raises(ValueError, match="two traces have the id p-math-0/plain/0"):
        prepare(config_of(tmp_path), run, run)
    (run.traces / "more.parquet").unlink()
    write_records(run.traces / "traces.parquet", Trace, traces[1:])
    with pytest.raises(ValueError, match=r"1 traces with verdicts are not there \(p-math-0/plain/0 is one\)"):
        prepare(config_of(tmp_path), run, run)


def test_an_eos_inside_a_response_is_dropped_and_counted(tmp_path):
    run = write_run(tmp_path, samples_of("math", 3))
    bad = make_trace("p-math-0/plain/0", "p-math-0", 0, "<think>\n a<|im_end|>\n</think>\n1")
    write_records(run.traces / "traces.parquet", Trace, [bad, *list(read_records(run.traces, Trace))[1:]])
    counts = prepare(config_of(tmp_path), run, run)
    assert (counts["examples"], counts["early_eos_dropped"]) == (2, 1)
    assert check_rows(run) == ["p-math-1/plain/0", "p-math-2/plain/0"]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|endoftext|>"])
def test_a_stop_token_at_the_end_is_the_end_of_the_turn(tmp_path, end):
    """Raw samples have it: the turn ends once, and not a second time in text."""
    run = write_run(tmp_path, samples_of("math", 2))
    checkpoint = checkpoint_with_two_stops(tmp_path / "checkpoint")
    traces = list(read_records(run.traces, Trace))
    raw = [dataclasses.replace(trace, response=trace.response + end) for trace in traces]
    write_records(run.traces / "traces.parquet", Trace, raw)
    config = config_of(tmp_path)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, tokenizer=str(checkpoint)))
    counts = prepare(config, run, run)
    assert (counts["examples"], counts["early_eos_dropped"]) == (2, 0)
    tokenizer = load_tokenizer(str(run.tokenizer))
    for _, tokens, _ in segments_of(run):
        assert tokenizer.decode(tokens).endswith("}.<|im_end|>")


def test_every_stop_token_of_generation_ends_a_response_early(tmp_path):
    """An end is an end, whichever of the names it has."""
    run = write_run(tmp_path, samples_of("math", 3))
    bad = make_trace("p-math-0/plain/0", "p-math-0", 0, "<think>\n a<|endoftext|>\n</think>\n1")
    write_records(run.traces / "traces.parquet", Trace, [bad, *list(read_records(run.traces, Trace))[1:]])
    checkpoint = checkpoint_with_two_stops(tmp_path / "checkpoint")
    config = config_of(tmp_path)
    config = dataclasses.replace(config, student=dataclasses.replace(config.student, tokenizer=str(checkpoint)))
    counts = prepare(config, run, run)
    assert (counts["examples"], counts["early_eos_dropped"]) == (2, 1)


def checkpoint_with_two_stops(folder):
    """The demo teacher's tokenizer, with <|endoftext|> beside <|im_end|> in generation_config.json."""
    from tokenizers import AddedToken, Tokenizer

    folder.mkdir()
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(hub.demo_teacher() / name, folder / name)
    tokenizer = Tokenizer.from_file(str(hub.demo_teacher() / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    stops = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return folder


def test_a_dated_template_is_of_the_runs_first_day_on_every_day(tmp_path):
    template = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
    (tmp_path / "dated.jinja").write_text(template + (hub.demo_teacher() / "chat_template.jinja").read_text())
    run = write_run(tmp_path / "run", samples_of("math", 2))
    (tmp_path / "run" / "first_day.json").write_text('{"first_day": "2024-02-29"}')
    config = config_of(tmp_path / "run", chat_template=str(tmp_path / "dated.jinja"))
    counts = prepare(config, run, run)
    assert counts["day"] == "2024-02-29"
    tokenizer = load_tokenizer(str(run.tokenizer))
    for _, tokens, _ in segments_of(run):
        assert "Today: 29 Feb 2024<|im_end|>" in tokenizer.decode(tokens)
    baseline = run.baseline("answer_only")
    assert baseline.first_day() == run.first_day() == "2024-02-29"
    assert not (baseline.root / "first_day.json").exists()


def test_the_first_day_is_noted_once(tmp_path):
    day = RunDir(tmp_path / "run").first_day()
    assert json.loads((tmp_path / "run" / "first_day.json").read_text()) == {"first_day": day}
    (tmp_path / "run" / "first_day.json").write_text('{"first_day": "2000-01-01"}')
    assert RunDir(tmp_path / "run").first_day() == "2000-01-01"
    RunDir(tmp_path / "other").first_day(note=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_students_tokenizer_is_written_as_transformers_will_read_it(tmp_path, kind, capsys):
    from transformers import AutoTokenizer

    run = write_run(tmp_path, samples_of("math", 2))
    config = config_of(tmp_path)
    shape = dataclasses.replace(config.student.architecture, model_type=kind)
    prepare(dataclasses.replace(config, student=dataclasses.replace(config.student, architecture=shape)), run, run)
    said = " ".join("".join(capsys.readouterr()).split())
    assert ("the student's tokenizer: words are cut as transformers does it" in said) == (kind == "qwen2")
    place = tmp_path / "served"
    shutil.copytree(run.tokenizer, place)
    (place / "config.json").write_text(json.dumps({"model_type": kind}))
    auto, ours = AutoTokenizer.from_pretrained(place), load_tokenizer(str(run.tokenizer))
    for _, tokens, regions in segments_of(run):
        response = ours.decode([t for t, r in zip(tokens, regions, strict=True) if r != PROMPT][:-1])
        assert (
            auto.encode(response, add_special_tokens=False)
            == [t for t, r in zip(tokens, regions, strict=True) if r != PROMPT][:-1]
        )


def test_token_ids_without_an_embedding_are_said(tmp_path):
    from jaxdistill import hub

    run = write_run(tmp_path, samples_of("math", 3))
    student = tmp_path / "student"
    student.mkdir()
    for file in hub.demo_teacher().glob("*.j*"):
        (student / file.name).write_bytes(file.read_bytes())
    settings = json.loads((student / "config.json").read_text()) | {"vocab_size": 30}
    (student / "config.json").write_text(json.dumps(settings))
    config = build(TINY | {"run_dir": str(tmp_path), "student": {"init": str(student)}, "evaluate": None})
    with pytest.raises(ValueError, match=r"student: 30 embeddings, and the traces have the token id \d+"):
        prepare(config, run, run)
