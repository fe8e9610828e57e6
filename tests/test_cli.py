"""The command line: what it says, and how it fails."""

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxdistill import __version__, arguments, cli
from jaxdistill.config import build, differences, load, to_dict, with_baseline
from jaxdistill.records import read_manifest
from tests.helpers import TINY, tiny_config
from tests.traces.brought import write


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jaxdistill", *map(str, arguments)], capture_output=True, text=True, **options
    )


def fails(capsys, *arguments) -> str:
    assert cli.main([str(a) for a in arguments]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_help_has_examples():
    output = run("--help").stdout
    assert "jaxdistill run configs/quickstart.yaml" in output
    for command in cli.HELP:
        assert f"    {command} " in output


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert re.match(rf"jaxdistill {re.escape(__version__)}, Python 3\.\d+\.\d+, jax \d", capsys.readouterr().out)


@pytest.mark.parametrize("command", cli.HELP)
def test_the_help_of_a_command_has_its_own_examples_alone(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    examples = re.findall(r"^  jaxdistill (\w+) ", said, re.M)
    assert examples and set(examples) == {command}


def test_every_example_can_be_parsed():
    for command, found in arguments.EXAMPLES.items():
        for example in found:
            assert cli.parser().parse_args([command, *shlex.split(example)]).command == command


def test_a_run_stops_behind_the_stage_that_is_named(tmp_path):
    config = tiny_config(tmp_path)
    result = run("run", config, "--until", "verify")
    assert result.returncode == 0, result.stderr
    assert "stopped behind verify; the same command without --until goes on" in result.stdout
    done = {path.parent.name for path in (tmp_path / "run").glob("*/manifest.json")}
    assert done == {"problems", "traces", "verdicts"}
    plan = run("run", config, "--until", "prepare", "--dry-run").stdout
    assert re.search(r"^ prepare ", plan, re.M) and not re.search(r"^ (train|export) ", plan, re.M)
    refused = run("run", config, "--until", "prepare", "--redo", "train")
    assert refused.returncode == 1
    assert "--redo train would remove what --until prepare does not make again" in refused.stderr
    for option, name, near in (("--until", "training", "train"), ("--redo", "training", "train"),
                               ("--redo", "generation", "generate"), ("--redo", "xyz", None)):  # fmt: skip
        refused = run("run", config, option, name)
        assert refused.returncode == 1
        (line,) = refused.stderr.splitlines()
        assert line.startswith(f"jaxdistill run: {option} {name}: no such stage; ")
        assert (f"did you mean {near}?" in line) == (near is not None)


def test_a_report_of_no_folder_asks_for_one(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such folder; name the folder of a run, such as runs/quickstart" in fails(capsys, "report", "nowhere")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("")
    assert "there are runs/mine, or a YAML file" in fails(capsys, "report", "nowhere")
    assert "no such folder" in fails(capsys, "run", "runs/nowhere")


def test_no_such_file(capsys, tmp_path):
    line = fails(capsys, "run", tmp_path / "no.yaml")
    assert "no such file" in line


def test_broken_yaml(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1")
    assert "not valid YAML" in fails(capsys, "run", tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("just text")
    assert "expected a mapping" in fails(capsys, "run", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_row=3", "unknown key train.batch_row; did you mean train.batch_rows?"),
        ("trian.steps=3", "unknown key trian; did you mean train?"),
        ("train.batch_rows=many", "train.batch_rows is 'many'"),
        ("train.optimizer.learning_rate=0", "train.optimizer.learning_rate is 0.0; set it above 0"),
        ("traces.engine=llama", "input should be 'vllm', 'server', 'jax' or 'import'"),
        ("traces.engine=jax", "traces.engine: jax needs `traces.teacher`"),
        ("train.epochs=1", "exactly one of `epochs` and `steps`"),
        ("train.micro_batches=3", "not a multiple of train.micro_batches=3"),
        (
            "train={deterministic: true, attention: cudnn, steps: 1, batch_rows: 1, optimizer: {learning_rate: 1}}",
            "set attention: auto",
        ),
        ("student.init=x", "exactly one of `init`"),
        ("problems.count=0", "problems: count is 0"),
        ("nothing", "write it as key=value"),
    ],
)
def test_bad_config_is_one_line_and_leaves_nothing(capsys, tmp_path, override, message):
    assert message in fails(capsys, "run", tiny_config(tmp_path), "--set", override)
    assert not (tmp_path / "run").exists()


def test_an_empty_problem_set(capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    config = tiny_config(tmp_path, problems={"source": "jsonl", "path": str(tmp_path / "p.jsonl")})
    line = fails(capsys, "generate", config)
    assert "p.jsonl" in line
    assert not list((tmp_path / "run" / "problems").glob("*.parquet"))


def test_a_teacher_without_weights(capsys, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    config = tiny_config(tmp_path, traces={"engine": "jax", "teacher": str(tmp_path / "teacher")})
    assert "no weights" in fails(capsys, "generate", config)
    config = tiny_config(tmp_path, traces={"engine": "jax", "teacher": str(tmp_path / "nowhere")})
    assert "no such folder" in fails(capsys, "generate", config)


def test_a_stage_before_its_input(capsys, tmp_path):
    assert "train needs `prepare`, which has not been run yet" in fails(capsys, "train", tiny_config(tmp_path))
    assert "nothing prepared yet" in fails(capsys, "show", tiny_config(tmp_path))


@pytest.mark.parametrize(("command", "way"), [("train", "set train.remat: full"), ("generate", "lower traces.batch")])
def test_a_device_with_too_little_memory_is_one_line_with_a_way_out(capsys, tmp_path, monkeypatch, command, way):
    def allocate(command, config):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 21474836480 bytes.\nAnd more.")

    monkeypatch.setattr(cli.pipeline, "run_command", allocate)
    assert cli.main([command, str(tiny_config(tmp_path))]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"jaxdistill {command}: the device's memory is too small: {way}")
    assert "21474836480 bytes" in said and "\n" not in said


def test_dry_run_does_nothing(tmp_path):
    result = run("run", tiny_config(tmp_path), "--dry-run", "--set", "train.steps=7")
    assert result.returncode == 0
    assert "steps: 7" in result.stdout
    assert "to do" in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_dry_run_ends_with_its_checks_the_worst_last_and_shows_the_stages_that_are_asked_for(tmp_path, capsys):
    path = tiny_config(tmp_path, traces={"engine": "jax", "teacher": str(tmp_path / "nowhere")})
    stages = {"run": "problems generate verify prepare train export evaluate report", "train": "train",
              "generate": "problems generate"}  # fmt: skip
    for command, wanted in stages.items():
        assert cli.main([command, str(path), "--dry-run"]) == 1
        text = capsys.readouterr().out
        table, checks = text.split("checks:\n")
        names = re.findall(r"^ (\w+) ", table.split("status")[1], re.M)
        assert names == wanted.split()
        *found, last = checks.strip().splitlines()
        assert ": error: " in found[-1] and "nowhere" in found[-1]
        assert last == "  1 error, 1 warning; nothing was done"


def test_training_and_evaluation_end_with_a_line_of_their_own(tmp_path, capsys):
    train = TINY["train"] | {"steps": 3}
    path = tiny_config(tmp_path, train=train, evaluate=TINY["evaluate"] | {"max_tokens": 4})
    for command in ("generate", "verify", "prepare", "train"):
        assert cli.main([command, str(path)]) == 0
    counts = read_manifest(tmp_path / "run" / "checkpoints")["counts"]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"  step 3 of 3: loss {counts['final_loss']:.4g}, {counts['tokens']:,} tokens in ")
    assert last.endswith(" s of training")
    for command in ("export", "evaluate"):
        assert cli.main([command, str(path)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.fullmatch(r"  1 model\(s\) asked 12 problems each, [\d,]+ s of sampling", last)


def test_what_was_rejected_is_told_and_shown(tmp_path, capsys):
    def chat(question, response, gold):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
        return {"messages": turns, "answer": gold}

    good = "<think>\nHm.\n</think>\nIt is \\boxed{2}."
    rows = [chat("1 + 1?", good, "2"), chat("1 + 2?", good, "3"), chat("1 + 3?", good, "4"), chat("1 + 4?", "5", "5")]
    write(tmp_path / "p.jsonl", rows)
    problems = {"source": "messages", "path": str(tmp_path / "p.jsonl")}
    path = tiny_config(tmp_path, problems=problems, evaluate=None)
    assert "no verdicts yet; run `verify` first" in fails(capsys, "show", path, "--rejected", 2)
    for command in ("generate", "verify"):
        assert cli.main([command, str(path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--rejected" in line]
    command = shlex.split(line.split("jaxdistill ")[1])
    assert command == ["show", str(tmp_path / "run"), "--rejected", "3"]
    assert cli.main([*command[:-1], "2"]) == 0  # one of either filter, and not two of one
    shown = capsys.readouterr().out
    assert "rejected for incorrect" in shown and "gold answer: 3; read from the trace: '2'" in shown
    assert "question: 1 + 2?" in shown and "It is \\boxed{2}." in shown
    assert "question: 1 + 4?" in shown and "question: 1 + 3?" not in shown
    write(tmp_path / "p.jsonl", rows[:1])
    assert cli.main(["verify", str(path), "--redo", "problems"]) == 1
    for command in ("generate", "verify"):
        assert cli.main([command, str(path)]) == 0
    assert "--rejected" not in capsys.readouterr().out
    assert "every trace was kept" in fails(capsys, "show", path, "--rejected", 2)


def test_two_processes_do_not_share_a_run(capsys, tmp_path):
    from jaxdistill.pipeline import _locked

    with _locked(tmp_path / "run"):
        assert "another jaxdistill process" in fails(capsys, "generate", tiny_config(tmp_path))


def test_a_stage_dies_with_the_run_that_started_it(tmp_path):
    """SIGKILL to `run` alone: the stage's process must not work on unseen."""
    config = tiny_config(tmp_path, train=TINY["train"] | {"steps": 100_000})
    process = subprocess.Popen([sys.executable, "-m", "jaxdistill", "run", str(config)], stdout=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)
    size = metrics.stat().st_size
    time.sleep(1.5)
    assert metrics.stat().st_size == size


def test_config_round_trips_and_baselines_differ_where_they_say():
    data = TINY | {"run_dir": "x", "baselines": {"short": {"data.response": "answer", "train.steps": 5}}}
    config = build(data)
    assert build(to_dict(config)) == config
    baseline = with_baseline(config, "short")
    assert (baseline.data.response, baseline.train.steps) == ("answer", 5)
    assert baseline.problems == config.problems
    with pytest.raises(ValueError, match=r"baselines\.short: traces\.samples cannot differ"):
        build(data | {"baselines": {"short": {"traces.samples": 2}}})


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_recipe_is_valid(path):
    assert load(path).name == yaml.safe_load(path.read_text())["name"]
    assert path.read_text().startswith("#")


def test_the_readme_config_is_valid():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = readme[readme.index("    name: mine") :].split("\n\n")[0]
    config = build(yaml.safe_load("\n".join(line[4:] for line in block.splitlines())))
    assert config.student.init == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_key_that_is_newer_than_a_run_and_empty_is_no_difference():
    old = {"rows": 1, "edit": None, "take": [1]}
    assert list(differences(old, old | {"tasks": [], "extra": {}})) == []
    assert dict(differences(old, old | {"tasks": [2], "take": []})) == {"take": "[1] -> []", "tasks": "None -> [2]"}
