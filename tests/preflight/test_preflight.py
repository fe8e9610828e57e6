"""What can be known before the teacher is asked: each check alone, and that no request is made where one fails."""

import dataclasses
import json
import venv
from types import SimpleNamespace

import pytest

from jaxdistill import cli, hub, preflight
from jaxdistill.config import ProblemsConfig, ServerConfig, TracesConfig, build
from jaxdistill.models import ModelConfig, abstract_model
from jaxdistill.preflight import devices, disk, interpreters, problems, repositories, students, teachers
from jaxdistill.preflight.finding import Finding
from jaxdistill.traces.problems import load_problems
from tests.helpers import TINY, tiny_config
from tests.traces.brought import write
from tests.traces.strict_server import StrictServer
from tests.traces.test_server import QUICK

CONFIG = {"run_dir": "run"}
DEMO_CONFIG = hub.demo_teacher() / "config.json"
IMPORT = TracesConfig(engine="import")
MESSAGES = ProblemsConfig(source="messages", path="chats.jsonl")


def levels(found) -> list[str]:
    return [finding.level for finding in found]


def only(found) -> Finding:
    (finding,) = found
    return finding


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------- nothing is paid for


def student_of(folder, edit):
    """The demo teacher's files, changed."""
    import shutil

    made = folder / "student"
    shutil.copytree(hub.demo_teacher(), made)
    edit(made)
    return str(made)


def change(name, **values):
    def edit(folder):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | values))

    return edit


def cut(name, data):
    """A pointer of Git LFS, or a download that was broken off."""
    return lambda folder: (folder / name).write_bytes(data)


def without(*names):
    def edit(folder):
        for name in names:
            (folder / name).unlink()

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("config.json", model_type="mixtral"), "model_type 'mixtral' is not supported"),
        (without("chat_template.jinja"), "no chat template, as base models' often have none; set data.chat_template"),
        (without("tokenizer.json"), "no tokenizer.json"),
        (without("model.safetensors"), "no weights"),
        (cut("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "not a whole safetensors file"),
        (change("config.json", vocab_size=100), "100 embeddings for a tokenizer of 414 tokens"),
        (
            change("config.json", model_type="gemma3", text_config=json.loads(DEMO_CONFIG.read_text())),
            "model_type 'gemma3' (its text part alone is gemma3_text) is not supported",
        ),
        (
            change("config.json", max_position_embeddings=64),
            "data.row_tokens=136 is beyond the student's context of 64",
        ),
    ],
)
def test_a_student_that_cannot_be_used_is_found_before_the_first_request(tmp_path, capsys, edit, message):
    """It was `prepare` that looked, when all was paid for. unslothai/unsloth 2096 and huggingface/open-r1 85: base
    models without a template.
    """
    with StrictServer() as server:
        traces = {"engine": "server", "teacher": "m", "server": {"urls": [server.url], "api": "chat", **QUICK}}
        student = {"init": student_of(tmp_path, edit)}
        path = tiny_config(tmp_path, traces=traces, student=student, data={"row_tokens": 136}, evaluate=None)
        for command in (["generate"], ["run"], ["run", "--dry-run"]):
            assert cli.main([command[0], str(path), *command[1:]]) == 1
        assert server.asked == []
    captured = capsys.readouterr()
    assert message in captured.err
    assert message in captured.out  # the dry run's
    assert not (tmp_path / "run" / "traces").exists()


def test_traces_are_not_removed_for_a_run_that_is_refused_then(tmp_path, capsys):
    made = tmp_path / "run" / "traces" / "manifest.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    path = tiny_config(tmp_path, student={"init": str(tmp_path / "nothing")}, evaluate=None)
    for command in ("generate", "run"):
        assert cli.main([command, str(path), "--redo", "generate"]) == 1
    assert "nothing" in capsys.readouterr().err
    assert made.is_file()


def test_a_student_that_is_not_there(tmp_path):
    for name in ("./nowhere", "/nowhere/at/all", "nowhere", f"{tmp_path}/nothing"):
        found = only(students.check(build(TINY | CONFIG | {"student": {"init": name}}), "student"))
        assert (found.what, found.level) == ("student.init", "error")
        assert "no such folder" in found.text


def test_a_name_of_the_hub_without_a_network_is_unchecked_and_the_run_goes_on(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    repositories._of_hub.cache_clear()
    repositories._why_silent.cache_clear()
    config = build(TINY | CONFIG | {"student": {"init": "owner/name"}})
    found = only(students.check(config, "student"))
    assert (found.what, found.level) == ("student.init", "unchecked")
    preflight.refuse(config)
    repositories._of_hub.cache_clear()
    repositories._why_silent.cache_clear()


def test_a_folder_that_is_missing_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    found = repositories.config_of("runs/base", None)
    assert isinstance(found, Finding) and found.level == "error" and "no such folder" in found.text


def test_baselines_are_checked_too(tmp_path):
    bad = student_of(tmp_path, without("chat_template.jinja"))
    baselines = {"bad": {"student.architecture": None, "student.tokenizer": None, "student.init": bad}}
    found = preflight.check(build(TINY | {"run_dir": str(tmp_path), "baselines": baselines}))
    assert [f.what for f in found if f.level == "error"] == ["baselines.bad"]


def test_traces_that_rows_cannot_hold_are_a_warning():
    traces = {"engine": "jax", "teacher": "demo", "max_tokens": 160}
    found = list(students.check_texts(build(TINY | CONFIG | {"traces": traces}), "student"))
    assert [(f.what, f.level) for f in found] == [("student", "ok"), ("data.overlong", "warning")]
    dropped = TINY | CONFIG | {"traces": traces, "data": {"row_tokens": 160, "overlong": "drop"}}
    assert levels(students.check_texts(build(dropped), "student")) == ["ok"]


# -------------------------------------------------------------------------------------------------------- the rows


def gold(rows, field="answer"):
    section = ProblemsConfig(source="jsonl", path="p.jsonl", answer_field=field)
    return only(problems.check_gold(rows, section, "problems"))


def test_gold_answers_under_another_field():
    rows = [{"problem": str(n), "solution": "Because.", "final_answer": n} for n in range(30)]
    found = gold(rows)
    assert found.level == "error"
    assert "none of the first 30 rows has a gold answer under 'answer'" in found.text
    assert "they have problem, solution, final_answer; set problems.answer_field: final_answer" in found.text
    assert gold(rows, "final_answer").level == "ok"
    assert gold([{"problem": "x", "answer": ""}] * 9).level == "warning"  # perhaps further down
    assert gold([{"problem": "x", "answer": "1"}, {"problem": "y"}]).level == "warning"
    assert "name the gold answers with" in gold([{"problem": "x"}]).text
    # a null or two of other rows do not make the wrong field the right one
    for value in (None, "", []):
        assert (
            gold([{"problem": "x", "answer": value}, *({"problem": "y", "gold": "1"} for _ in range(9))]).level
            == "error"
        )


@pytest.mark.parametrize("odd", ["{broken", '{"messages": [', "[1]", "\udcff"])
def test_an_odd_line_does_not_switch_the_checks_off(tmp_path, capsys, odd):
    rows = [json.dumps(chat("<think>\nHm.\n</think>\n2") | {"gold": "2"}) for _ in range(40)]
    rows[15] = odd
    (tmp_path / "p.jsonl").write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    problems_ = {"source": "messages", "path": str(tmp_path / "p.jsonl")}
    for more in ({}, {"answer_field": "final"}):
        path = tiny_config(tmp_path, problems=problems_ | more, evaluate=None)
        assert cli.main(["run", str(path), "--dry-run"]) == 1
        assert "set problems.answer_field: gold" in " ".join(capsys.readouterr().out.split())
    path = tiny_config(tmp_path, problems=problems_ | {"answer_field": "gold"}, evaluate=None)
    assert cli.main(["run", str(path), "--dry-run"]) == 0


def test_a_file_without_any_gold_answer_is_refused_when_all_of_it_was_seen(tmp_path):
    for rows, level in ((problems.SAMPLE, "error"), (problems.SAMPLE + 1, "warning")):
        path = jsonl(tmp_path / "p.jsonl", [{"problem": str(n), "answer": None} for n in range(rows)])
        config = build(TINY | CONFIG | {"evaluate": None, "problems": {"source": "jsonl", "path": path}})
        assert only(problems.check(config)).level == level


SHAPES = {
    "messages": {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "1?"}, {"from": "gpt", "value": "1"}]},
    "r1": {"problem": "1?", "generations": ["1"]},
    "prompt_completion": {"prompt": "1?", "completion": "1"},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("right", SHAPES)
@pytest.mark.parametrize("named", [*SHAPES, "jsonl"])
def test_rows_of_another_source_are_told_so_before_anything_else(tmp_path, named, right, suffix):
    """`source: messages` on rows with `conversations`: it was first said that none shows its thinking."""
    path = write(tmp_path / f"p{suffix}", [SHAPES[right] | {"answer": "1"}] * 9)
    if named == right or (named == "jsonl" and right == "r1"):  # whose rows have what jsonl needs
        return
    section = {"source": named, "path": str(path)}
    found = only(problems.check(build(TINY | CONFIG | {"evaluate": None, "problems": section})))
    assert (found.what, found.level) == ("problems.source", "error")
    assert f"set problems.source: {right}" in found.text
    # what a set of the hub, which is not looked at before, is told by the stage
    with pytest.raises(ValueError, match=rf"no (field|column) .*set source: {right}"):
        load_problems(ProblemsConfig(**section))


def test_a_question_under_another_name(tmp_path):
    for source, row in (
        ("jsonl", {"q": "1?", "answer": "1"}),
        ("r1", {"q": "1?", "generations": ["1"], "answer": "1"}),
    ):
        path = jsonl(tmp_path / "p.jsonl", [row] * 9)
        config = build(TINY | CONFIG | {"evaluate": None, "problems": {"source": source, "path": path}})
        assert "name the question with problems.problem_field" in only(problems.check(config)).text
        right = {"source": source, "path": path, "problem_field": "q"}
        assert levels(problems.check(build(TINY | CONFIG | {"evaluate": None, "problems": right})))[0] == "ok"


def test_the_first_rows_of_a_set_are_looked_at(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"problem": str(n), "gold": str(n)} for n in range(500)])
    for evaluated in (False, True):
        sets = {"problems": {"source": "jsonl", "path": path}}
        if evaluated:
            sets = {"problems": TINY["problems"], "evaluate": {"problems": sets["problems"]}}
        what = "evaluate.problems" if evaluated else "problems"
        found = only(problems.check(build(TINY | CONFIG | {"evaluate": None} | sets)))
        assert (found.what, found.level) == (f"{what}.answer_field", "error")
        assert f"set {what}.answer_field: gold" in found.text
    without = {"problems": {"source": "jsonl", "path": path}, "verify": {"answer": False}, "evaluate": None}
    assert list(problems.check(build(TINY | CONFIG | without))) == []


def test_a_set_that_cannot_be_read_is_for_the_stage_to_refuse(tmp_path):
    (tmp_path / "p.jsonl").write_text("{no json\n" * 3)
    config = build(
        TINY | CONFIG | {"problems": {"source": "jsonl", "path": str(tmp_path / "p.jsonl")}, "evaluate": None}
    )
    assert levels(problems.check(config)) == ["unchecked"]


def test_one_row_that_cannot_be_read_hides_nothing_of_the_others(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("{no json\n" + "".join(json.dumps({"problem": "x", "gold": "1"}) + "\n" for _ in range(9)))
    sets = {"problems": {"source": "jsonl", "path": str(path)}, "evaluate": None}
    assert "set problems.answer_field: gold" in only(problems.check(build(TINY | CONFIG | sets))).text
    sets["problems"]["bad_rows"] = "stop"
    assert levels(problems.check(build(TINY | CONFIG | sets))) == ["unchecked"]


@pytest.mark.parametrize(
    ("path", "level"),
    [("hf://datasets/owner/name", "unchecked"), ("hf://owner/name", "unchecked"), ("hf://name", "error")],
)
def test_an_address_of_the_hub_is_looked_at(path, level):
    sets = {"problems": {"source": "jsonl", "path": path}, "evaluate": None}
    assert levels(problems.check(build(TINY | CONFIG | sets))) == [level]


def test_a_set_without_rows_is_found(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    sets = {"problems": {"source": "jsonl", "path": str(tmp_path / "p.jsonl")}, "evaluate": None}
    assert "not one row" in only(problems.check(build(TINY | CONFIG | sets))).text


@pytest.mark.parametrize("value", [float("nan"), "  ", None, [], "nan"])
def test_what_the_stage_takes_for_no_gold_answer_is_none_here(value):
    assert gold([{"problem": "x", "answer": value}] * 9).level == "warning"


def chat(text, **more):
    return {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": text, **more}]}


@pytest.mark.parametrize(
    ("row", "level", "words"),
    [
        (chat("<think>\nHm.\n</think>\n2"), "ok", "show their thinking"),
        (chat("2", reasoning_content="Hm."), "ok", ""),
        (chat("2", reasoning=[{"type": "text", "text": "Hm."}]), "ok", ""),
        (chat([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "2"}]), "ok", ""),
        ({"messages": json.dumps(chat("2", thinking="Hm.")["messages"])}, "ok", ""),
        (chat("<scratchpad>Hm.</scratchpad>2"), "ok", ""),  # a form that the import knows
        (chat("<analysis>Hm.</analysis>2"), "ok", ""),
        # tags that the import knows where a response begins with them alone
        (chat("So: <analysis>Hm.</analysis>2"), "error", "set traces.think_tags: ['<analysis>', '</analysis>']"),
        (chat("So: <unused94>Hm.<unused95>2"), "error", "['<unused94>', '<unused95>']"),
        (chat("<my_thoughts>Hm.</my_thoughts>2"), "warning", ""),
        (chat("It is 2.<|end|>"), "warning", ""),  # the end of a turn
        (chat("2", thinking=True, reasoning="high"), "warning", ""),  # how hard to think
        (chat("It is 2."), "warning", "set verify.think: optional"),
    ],
)  # fmt: skip
def test_thinking_of_imported_rows(row, level, words):
    found = only(problems.check_thinking([row] * 20, MESSAGES, IMPORT, required=True))
    assert found.level == level
    assert words in found.text
    assert list(problems.check_thinking([row] * 20, MESSAGES, IMPORT, required=False)) == []


def test_rows_with_their_own_tags_are_well():
    config = dataclasses.replace(IMPORT, think_tags=("<scratchpad>", "</scratchpad>"))
    rows = [chat("<scratchpad>a</scratchpad>2")] * 9
    assert only(problems.check_thinking(rows, MESSAGES, config, required=True)).level == "ok"


def test_an_import_with_other_tags_is_refused_before_verify(tmp_path, capsys):
    path = jsonl(tmp_path / "p.jsonl", [chat("So: <analysis>Hm.</analysis>2") | {"answer": "2"}] * 20)
    more = {"problems": {"source": "messages", "path": path}, "evaluate": None}
    assert cli.main(["generate", str(tiny_config(tmp_path, **more))]) == 1
    assert "set traces.think_tags: ['<analysis>', '</analysis>']" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- teacher and disk


def test_a_teacher_that_is_not_there(tmp_path):
    traces = {"engine": "jax", "teacher": str(tmp_path / "nowhere")}
    assert only(teachers.check(build(TINY | CONFIG | {"traces": traces}))).level == "error"
    served = {"engine": "server", "teacher": "gpt-7", "server": {"urls": ["http://127.0.0.1:1/v1"], "api": "chat"}}
    assert list(teachers.check(build(TINY | CONFIG | {"traces": served}))) == []


def test_a_server_of_others_wants_a_key(monkeypatch):
    section = ServerConfig(urls=("https://api.example.com/v1",), api_key_env="MY_KEY")
    monkeypatch.delenv("MY_KEY", raising=False)
    assert "MY_KEY is not set" in only(teachers.check_key(section, "traces.server")).text
    monkeypatch.setenv("MY_KEY", "x")
    assert list(teachers.check_key(section, "traces.server")) == []
    assert list(teachers.check_key(dataclasses.replace(section, urls=("http://host:1/v1",)), "")) == []


def an_interpreter(folder, *, has_vllm):
    """An environment of its own, with what is named vllm in it, or without."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    if has_vllm:
        (packages / "vllm.py").write_text("raise ImportError('it is looked for, and not imported')")
    return str(folder / "bin" / "python")


def test_vllm_is_looked_for_where_it_will_run(tmp_path, capsys, monkeypatch):
    with_it, without_it = (an_interpreter(tmp_path / str(has), has_vllm=has) for has in (True, False))
    (tmp_path / "vllm").mkdir()  # a folder of that name is no package of the interpreter's
    monkeypatch.chdir(tmp_path)
    for python, level in ((with_it, "ok"), (without_it, "error"), ("/nowhere/python", "error")):
        traces = {"engine": "vllm", "teacher": "demo", "vllm": {"python": python}}
        found = only(interpreters.check(build(TINY | CONFIG | {"traces": traces})))
        assert (found.what, found.level) == ("traces.vllm.python", level)
    traces["vllm"] = {"python": without_it}
    for command in (["generate"], ["run", "--dry-run"]):
        path = tiny_config(tmp_path, traces=traces)
        assert cli.main([command[0], str(path), *command[1:]]) == 1
        said = " ".join("".join(capsys.readouterr()).split())
        assert f"{without_it} has no vLLM; " in said and "pip install 'jaxdistill[vllm]'" in said
        assert "traces.vllm.python" in said and "without a GPU" in said
    assert not (tmp_path / "run" / "traces").exists()


def test_every_section_that_starts_vllm_is_looked_at():
    def found(**sections):
        return set(interpreters.sections(build(TINY | CONFIG | sections)))

    server = {"engine": "server", "teacher": "demo", "server": {"start": 1}}
    evaluate = TINY["evaluate"]
    assert found() == set()
    assert found(traces={"engine": "jax", "teacher": "demo"}) == set()
    assert found(traces=server) == {"traces.vllm"}
    assert found(traces=server | {"server": {"urls": ["http://host:1/v1"]}}) == set()
    assert found(traces={"engine": "import", "teacher": "demo", "logprobs": 4}) == {"traces.vllm"}
    assert found(traces={"engine": "vllm", "teacher": "demo", "executor": "ray"}) == set()
    assert found(evaluate=evaluate | {"engine": "vllm"}) == {"evaluate.vllm"}
    assert found(evaluate=evaluate | {"engine": "server"}) == {"evaluate.vllm"}
    assert found(export={"serve": True}) == {"traces.vllm"}


def test_a_later_stage_without_vllm_is_a_warning(tmp_path):
    evaluate = TINY["evaluate"] | {"engine": "vllm", "vllm": {"python": "/nowhere/python"}}
    found = only(interpreters.check(build(TINY | CONFIG | {"evaluate": evaluate})))
    assert (found.what, found.level) == ("evaluate.vllm.python", "warning")


@pytest.mark.parametrize(
    ("mesh", "flags", "words"),
    [
        ({}, "", None),
        ({}, "--xla_force_host_platform_device_count=8", None),
        ({"data": 8}, "", "data=8, fsdp=-1, tensor=1, context=1 takes a multiple of 8 devices, and this machine has 1"),
        ({"data": 8, "fsdp": 1}, "", "takes 8 devices"),
        ({"fsdp": 4, "tensor": 2}, "--xla_force_host_platform_device_count=8", None),
        ({"fsdp": 4}, "--xla_force_host_platform_device_count=8", "takes 4 devices, and this machine has 8 (cpu)"),
        ({"tensor": 3}, "--xla_force_host_platform_device_count=8", "takes a multiple of 3"),
    ],
)
def test_a_mesh_that_this_machine_cannot_hold_is_a_warning(monkeypatch, mesh, flags, words):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    found = list(devices.check(build(TINY | CONFIG | {"train": TINY["train"] | {"mesh": mesh}})))
    assert levels(found) == ["warning"] * (words is not None)
    assert words is None or words in found[0].text


def test_gpus_are_counted_by_their_files_or_by_what_is_visible(tmp_path, monkeypatch):
    monkeypatch.setattr(devices.importlib.metadata, "entry_points", lambda group: [SimpleNamespace(name="xla_cuda13")])
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.count_devices(tmp_path) == (2, "gpu")
    for visible, expected in (("1", (1, "gpu")), ("", (1, "cpu")), ("MIG-1a", None)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert devices.count_devices(tmp_path) == expected
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert devices.count_devices(tmp_path) is None


def test_two_open_axes_of_a_mesh_are_refused_with_the_config():
    with pytest.raises(ValueError, match=r"data=-1, fsdp=-1.*only one axis may be -1"):
        build(TINY | CONFIG | {"train": TINY["train"] | {"mesh": {"data": -1}}})


def test_room_on_the_disk():
    def level(*sizes):
        return only(disk.compare(*sizes, "/here")).level

    assert level(100, 10, 20) == "ok"
    assert level(100, 90, 20) == "warning"
    assert level(100, 0, 101) == "error"
    assert level(100, None, 99) == "ok"
    assert level(100, 10, None) == "unchecked"
    assert "unknown" not in only(disk.compare(100, None, 10, "/here")).text
    assert list(disk.compare(100, None, None, "/here")) == []  # nobody learns from how much is free


def test_a_run_that_cannot_fit_is_refused(tmp_path):
    config = build(TINY | {"run_dir": str(tmp_path / "a" / "b")})
    assert only(disk.check(config)).level == "ok"
    huge = {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 100, "head_dim": 1 << 10}
    student = TINY["student"] | {"architecture": TINY["student"]["architecture"] | huge}
    with pytest.raises(ValueError, match=r"disk: .* of space are free at .*make room"):
        preflight.refuse(build(TINY | {"run_dir": str(tmp_path), "student": student}))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "smollm3", "gemma3_text"])
def test_parameters_are_those_of_the_model_within_a_percent(family):
    import jax

    shape = {"model_type": family, "vocab_size": 5000, "hidden_size": 512, "intermediate_size": 1600, "head_dim": 64,
             "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
             "tie_word_embeddings": family in ("smollm3", "gemma3_text")}  # fmt: skip
    model = abstract_model(ModelConfig.from_hf(shape))
    real = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert disk.parameters(shape) == pytest.approx(real, rel=0.01)


def test_problems_are_counted_by_the_size_of_their_file(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"problem": "x" * (n % 7), "answer": "1"} for n in range(5000)])
    section = ProblemsConfig(source="jsonl", path=path)
    assert disk.problems_of(section) == pytest.approx(5000, rel=0.02)
    assert disk.problems_of(dataclasses.replace(section, count=7)) == 7
    assert disk.problems_of(dataclasses.replace(section, path=str(tmp_path / "no.jsonl"))) is None
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    assert disk.problems_of(dataclasses.replace(section, path=str(tmp_path / "p.parquet"))) is None


def test_a_finished_generate_is_not_checked_again(tmp_path, capsys):
    path = tiny_config(tmp_path)
    assert cli.main(["generate", str(path)]) == 0
    assert cli.main(["generate", str(path), "--set", "student.tokenizer=./nowhere"]) == 0
    assert "done before" in capsys.readouterr().out
