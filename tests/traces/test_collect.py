"""Collection: one row a sample in the order of work, and a killed run that only asks for what is missing."""

import dataclasses

import pytest

from jaxdistill import config as configs
from jaxdistill import hub, tokenization
from jaxdistill.records import Problem, RunDir, Trace, read_records, write_records
from jaxdistill.traces import collect, engines, output, work
from jaxdistill.traces.engines import Completion
from tests.traces.tiny import checkpoint  # noqa: F401  (a fixture)

RESPONSE = "<think>\nAnn=5\n</think>\nThe answer is \\boxed{5}."


class FakeEngine:
    """Answers in reverse order with tokens that depend on the request alone; can fail after some."""

    def __init__(self, tokenizer, *, fail_after=None, broken=()):
        self.response = tokenization.encode_response(tokenizer, RESPONSE)
        self.fail_after, self.broken = fail_after, broken
        self.asked = []

    def __call__(self, folder, requests, sampling, *, vllm, batch, log, ready):
        ready()
        for number, request in enumerate(reversed(requests)):
            if number == self.fail_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            if request.id in self.broken:
                yield Completion(id=request.id, output_ids=[], finish_reason="error", error="lost")
            else:
                ids = [request.seed % 100 + 10, *self.response]
                yield Completion(id=request.id, output_ids=ids, finish_reason="stop")


def make_config(folder, **traces):
    return configs.build(
        {
            "name": "test",
            "run_dir": "unused",
            "problems": {"source": "demo", "count": 4},
            "traces": {"engine": "jax", "teacher": str(folder), "samples": 2, "max_tokens": 32, **traces},
            "data": {"row_tokens": 64},
            "student": {"init": "demo"},
            "train": {"batch_rows": 1, "steps": 1, "optimizer": {"learning_rate": 0.1}},
        }
    )


@pytest.fixture
def run(tmp_path):
    """A run directory with four problems in it, one of them without a solution."""
    run = RunDir(tmp_path / "run")
    problems = [
        Problem(
            id=f"set:{n}",
            prompt=f"Ann has {n} pens.",
            answer=str(n),
            domain="math",
            source=f"set.jsonl:{n}",
            solution=RESPONSE if n else None,
        )
        for n in range(4)
    ]
    write_records(run.problems / "problems.parquet", Problem, problems)
    return run


@pytest.fixture
def engine(checkpoint, monkeypatch):  # noqa: F811
    """Puts a fake engine in the place of `jax`; gives the function that does so."""
    tokenizer = tokenization.load_tokenizer(str(checkpoint))

    def install(**options):
        fake = FakeEngine(tokenizer, **options)
        monkeypatch.setitem(engines.ENGINES, "jax", fake)
        return fake

    return install


def read(run):
    return list(read_records(run.traces, Trace))


def test_traces_come_in_the_order_of_work_and_tell_where_they_are_from(run, checkpoint, engine):  # noqa: F811
    fake = engine()
    counts = collect.generate(make_config(checkpoint, system="Be brief.", suffix=" Box it."), run)
    traces = read(run)
    assert [trace.id for trace in traces] == [f"set:{n}/plain/{sample}" for n in range(4) for sample in range(2)]
    assert [request.id for request in fake.asked] == [trace.id for trace in reversed(traces)]
    tokenizer = tokenization.load_tokenizer(str(checkpoint))
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAnn has 1 pens. Box it.<|im_end|>\n"
    assert tokenizer.decode(traces[2].prompt_ids) == prompt + "<|im_start|>assistant\n"
    assert traces[2].teacher == str(checkpoint)
    assert traces[2].revision == hub.revision_of(checkpoint)
    assert (traces[2].thinking, traces[2].content) == ("Ann=5", "The answer is \\boxed{5}.")
    assert traces[2].output_ids[-1] == tokenizer.eos_token_id
    assert traces[2].seed == work.sample_seed(0, "set:1/plain/0")
    assert counts["samples"] == 8
    assert counts["finished"] == {"stop": 8}
    assert counts["output_tokens"] == sum(len(trace.output_ids) for trace in traces)
    assert counts["resumed"] == 0


@pytest.mark.parametrize("done", [0, 3, 8])
def test_resuming_asks_for_what_is_missing_and_ends_the_same(tmp_path, run, checkpoint, engine, done):  # noqa: F811
    config = make_config(checkpoint)
    engine()
    collect.generate(config, run)
    expected = read(run)

    again = RunDir(tmp_path / "again")
    write_records(again.problems / "problems.parquet", Problem, list(read_records(run.problems, Problem)))
    engine(fail_after=done)
    if done < 8:
        with pytest.raises(KeyboardInterrupt):
            collect.generate(config, again)
        assert not (again.traces / output.TRACES).exists()
        with open(again.traces / collect.JOURNAL, "ab") as journal:
            journal.write(b'{"id":"set:0/plain/0","outp')  # the kill came in the middle of a line
    else:
        collect.generate(config, again)
    second = engine()
    counts = collect.generate(config, again)
    assert [request.id for request in second.asked] == [trace.id for trace in reversed(expected)][done:]
    assert counts["resumed"] == done
    assert read(again) == expected


def test_what_changed_since_the_journal_was_begun_is_named(run, checkpoint, engine):  # noqa: F811
    engine()
    collect.generate(make_config(checkpoint), run)
    with pytest.raises(ValueError, match=r"traces\.temperature was 1\.0, is 0\.5\. Set them back"):
        collect.generate(make_config(checkpoint, temperature=0.5), run)
    with pytest.raises(ValueError, match=r"traces\.suffix was .*; the rendered prompts changed"):
        collect.generate(make_config(checkpoint, suffix=" Think."), run)
    fake = engine()
    # how it is computed is no reason to lose what there is
    collect.generate(make_config(checkpoint, batch=8, vllm={"max_num_seqs": 4, "kv_cache_gib": 1}), run)
    assert fake.asked == []
    problems = [dataclasses.replace(p, prompt=p.prompt + "!") for p in read_records(run.problems, Problem)]
    write_records(run.problems / "problems.parquet", Problem, problems)
    with pytest.raises(ValueError, match="the problems changed"):
        collect.generate(make_config(checkpoint), run)


def test_a_prompt_that_cannot_fit_is_named_before_anything_is_drawn(run, checkpoint, engine):  # noqa: F811
    fake = engine()
    with pytest.raises(ValueError, match=r"set:\d/plain/0: a prompt of \d+ tokens \+ max_tokens=240 > 256") as error:
        collect.generate(make_config(checkpoint, max_tokens=240), run)
    assert "8 of 8 requests" in str(error.value)
    assert fake.asked == []


def test_vllm_is_held_to_its_own_limit(checkpoint):  # noqa: F811
    config = make_config(checkpoint, vllm={"max_model_len": 40}).traces
    request = engines.Request("set:1/plain/0", list(range(20)), 0)
    sampling = engines.Sampling(temperature=1.0, top_p=1.0, max_tokens=32, stop_ids=[2])
    with pytest.raises(ValueError, match=r"a prompt of 20 tokens .* > 40"):
        engines.generate("vllm", checkpoint, [request], sampling, vllm=config.vllm, batch=1)
    assert list(engines.generate("vllm", checkpoint, [], sampling, vllm=config.vllm, batch=1)) == []
    with pytest.raises(ValueError, match="engine 'llama' is not known; known are jax, server, vllm"):
        engines.generate("llama", checkpoint, [request], sampling, vllm=config.vllm, batch=1)


def test_a_failed_request_is_a_trace_that_says_so(run, checkpoint, engine):  # noqa: F811
    engine(broken={"set:2/plain/1"})
    counts = collect.generate(make_config(checkpoint), run)
    failed = [trace for trace in read(run) if trace.finish_reason == "error"]
    assert [(trace.id, trace.error, trace.response) for trace in failed] == [("set:2/plain/1", "lost", "")]
    assert counts["finished"] == {"error": 1, "stop": 7}


def test_import_takes_the_problems_own_solutions(run):
    counts = collect.generate(make_config("nowhere", engine="import"), run)
    traces = read(run)
    assert counts == {"samples": 3, "finished": {"imported": 3}, "output_tokens": 0, "without_solution": 1}
    assert [trace.problem_id for trace in traces] == ["set:1", "set:2", "set:3"]
    assert traces[0].teacher == "set.jsonl:1"
    assert traces[0].response == RESPONSE
    assert (traces[0].thinking, traces[0].content) == ("Ann=5", "The answer is \\boxed{5}.")
    assert traces[0].prompt_ids == traces[0].output_ids == []


def test_import_without_any_solution_is_refused(run):
    problems = [dataclasses.replace(p, solution=None) for p in read_records(run.problems, Problem)]
    write_records(run.problems / "problems.parquet", Problem, problems)
    with pytest.raises(ValueError, match="none of 4 problems has one"):
        collect.generate(make_config("nowhere", engine="import"), run)


def test_seeds_are_stable_and_differ():
    assert work.sample_seed(0, "set:1/plain/0") == 654571170
    seeds = {work.sample_seed(seed, f"set:{n}/plain/0") for seed in range(2) for n in range(500)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, run, checkpoint, monkeypatch):  # noqa: F811
    """Neither what has been drawn nor what is to be drawn is held; a sample has about 10,000 bytes of ids here."""
    import tracemalloc

    def engine(folder, requests, sampling, **options):
        for request in requests:
            yield Completion(id=request.id, output_ids=[300 + request.seed % 99] * 300, finish_reason="stop")

    monkeypatch.setitem(engines.ENGINES, "jax", engine)

    def peak(samples):
        there = RunDir(tmp_path / str(samples))
        write_records(there.problems / "problems.parquet", Problem, list(read_records(run.problems, Problem)))
        tracemalloc.start()
        collect.generate(make_config(checkpoint, samples=samples), there)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    monkeypatch.setattr(output, "ROWS", 32)
    peak(2)  # what is loaded once
    few, many = peak(10), peak(60)
    assert (many - few) / (4 * 50) < 500


def test_a_missing_gold_answer_is_said_before_anything_is_drawn(run, checkpoint, engine, capsys):  # noqa: F811
    fake = engine()
    found = list(read_records(run.problems, Problem))
    some = [dataclasses.replace(problem, answer=None if n < 2 else "5") for n, problem in enumerate(found)]
    write_records(run.problems / "problems.parquet", Problem, some)
    collect.generate(make_config(checkpoint), run)
    assert "2 of 4 problems have no gold answer (the first is set:0)" in capsys.readouterr().out
    fake.asked.clear()
    write_records(run.problems / "problems.parquet", Problem, [dataclasses.replace(p, answer=" ") for p in found])
    with pytest.raises(ValueError, match="none of 4 problems has a gold answer"):
        collect.generate(make_config(checkpoint), run)
    assert fake.asked == []


def test_the_summary_tells_lengths_and_what_a_finished_trace_costs(run, checkpoint, monkeypatch):  # noqa: F811
    def engine(folder, requests, sampling, **options):
        for number, request in enumerate(requests):
            cut = number % 4 == 0
            ids = [5] * (32 if cut else 8)
            yield Completion(id=request.id, output_ids=ids, finish_reason="length" if cut else "stop")

    monkeypatch.setitem(engines.ENGINES, "jax", engine)
    counts = collect.generate(make_config(checkpoint), run)
    assert counts["output_length"] == {"mean": 14.0, "p10": 8, "p50": 8, "p90": 32, "max": 32}
    assert counts["truncated_share"] == 0.25
    assert counts["tokens_per_finished_trace"] == round((2 * 32 + 6 * 8) / 6, 1)
