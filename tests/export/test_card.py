"""The model card: the hub parses it, and it says what was measured and what is not known."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from jaxdistill import hub
from jaxdistill.config import build, load, to_dict
from jaxdistill.export.card import model_card, refresh_cards
from jaxdistill.models import ModelConfig
from jaxdistill.records import RunDir, read_manifest, write_manifest
from tests.helpers import prepared_run


def finish(folder, counts):
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, stage=folder.name, config={}, config_hash="", inputs={}, counts=counts)


def score(accuracy):
    return {
        "accuracy": accuracy,
        "low": accuracy - 0.1,
        "high": accuracy + 0.1,
        "mean_output_tokens": 80,
        "truncated": 3,
    }


EVALUATION = {
    "heldout": 12,
    "samples": 1,
    "models": {"teacher": score(0.9), "student": score(0.75), "plain": score(0.2)},
}
SHAPE = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run up to its packed rows, with a baseline."""
    path = prepared_run(tmp_path_factory.mktemp("run"), baselines={"plain": {"data.response": "answer"}})
    return load(path)


@pytest.fixture
def exported(prepared, tmp_path):
    """The same run with stand-ins for training and export: configs and manifests, without weights."""
    shutil.copytree(prepared.run_dir, tmp_path / "run")
    config = build(to_dict(prepared) | {"run_dir": str(tmp_path / "run")})
    shared = RunDir(tmp_path / "run")
    for run in (shared, shared.baseline("plain")):
        finish(run.checkpoints, {"parameters": 12_345, "steps": 30, "epochs": 1.5, "final_loss": 0.25})
        (run.checkpoints / "model.json").write_text(json.dumps(SHAPE.to_hf()))
        finish(run.export, {"step": 30})
        (run.export / "README.md").write_text(model_card(config, run, shared, SHAPE, 30))
    return config, shared


def parsed(path):
    return ModelCard(path.read_text())


def test_before_the_evaluation(exported):
    config, shared = exported
    card = parsed(shared.export / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.eval_results is None
    assert "## Evaluation\n\nNot measured.\n" in card.text
    verdicts = read_manifest(shared.verdicts)["counts"]
    assert f"verifier yield: {verdicts['kept']} of {verdicts['traces']} traces kept" in card.text
    for reason, count in verdicts["rejected"].items():
        assert f"rejected, {reason}: {count}" in card.text
    assert "No model was asked" in card.text
    assert "(`jaxdistill.demo`); licence: mit" in card.text
    assert "30 of 8 x 160 tokens (1.50 epochs)" in card.text
    assert "12,345 parameters" in card.text
    assert refresh_cards(config, shared) == []


def test_rows_that_grew_for_overlong_traces_are_told_as_they_are(exported):
    config, shared = exported
    finish(shared.tokens, read_manifest(shared.tokens)["counts"] | {"row_tokens": 256})
    assert "30 of 8 x 256 tokens" in model_card(config, shared, shared, SHAPE, 30)


def test_the_recipe_is_one_that_loads(exported, tmp_path):
    import yaml

    config, shared = exported
    recipe = yaml.safe_load(parsed(shared.export / "README.md").text.partition("```yaml\n")[2].partition("```")[0])
    again = build(recipe | {"name": config.name, "run_dir": config.run_dir, "seed": config.seed})
    assert again == build(to_dict(config) | {"baselines": {}})


def test_after_the_evaluation(exported):
    config, shared = exported
    finish(shared.evaluation, EVALUATION)
    student, plain = shared.export / "README.md", shared.baseline("plain").export / "README.md"
    assert refresh_cards(config, shared) == [student, plain]
    for path, mine, other in ((student, "75.0%", "plain"), (plain, "20.0%", "student")):
        card = parsed(path)
        assert f"| **this model** | {mine} |" in card.text
        assert f"| {other} |" in card.text and "| teacher | 90.0% | 80.0% to 100.0% | 80 | 3 |" in card.text
        assert "Not measured" not in card.text
        (result,) = card.data.eval_results
        assert f"{result.metric_value:.1%}" == mine
        assert result.dataset_name == "demo"
        assert result.metric_name == "accuracy on 12 held-out problems"
    before = student.read_bytes()
    assert refresh_cards(config, shared) == [student, plain]
    assert student.read_bytes() == before


def test_a_student_that_was_not_evaluated_says_so(exported):
    config, shared = exported
    finish(shared.evaluation, EVALUATION | {"models": {"teacher": score(0.9)}})
    refresh_cards(config, shared)
    card = parsed(shared.export / "README.md")
    assert "Not measured." in card.text
    assert card.data.eval_results is None


def test_benchmarks_have_a_table_of_their_own(exported):
    config, shared = exported
    found = {"mmlu": {"title": "MMLU", "problems": 300, "samples": 4, "models": {"student": score(0.5)}}}
    finish(shared.evaluation, EVALUATION | {"heldout": 0, "models": {}, "benchmarks": found})
    refresh_cards(config, shared)
    assert "| MMLU | 300 | 4 | 50.0% | 40.0% to 60.0% |" in parsed(shared.export / "README.md").text
    assert "Not measured." in parsed(shared.baseline("plain").export / "README.md").text


def test_a_new_card_leaves_the_export_done(exported):
    """Its manifest, and what the evaluation calls the checkpoint's content, do not depend on the card."""
    config, shared = exported
    (shared.export / "config.json").write_text("{}")
    before = (hub.revision_of(shared.export), (shared.export / "manifest.json").read_bytes())
    finish(shared.evaluation, EVALUATION)
    refresh_cards(config, shared)
    assert (hub.revision_of(shared.export), (shared.export / "manifest.json").read_bytes()) == before


def with_sections(config, **sections):
    plain = to_dict(config) | {"baselines": {}}
    return build({name: plain[name] | sections.get(name, {}) if name in sections else plain[name] for name in plain})


def test_a_real_teacher_and_known_data(exported, tmp_path):
    config, shared = exported
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A teacher: with a colon\n")
    traces = {"engine": "vllm", "teacher": str(teacher), "samples": 4, "temperature": 0.6, "max_tokens": 4096}
    student = {"init": "Qwen/Qwen3-0.6B-Base", "architecture": None}
    problems = {"source": "gsm8k", "path": "/data/train.jsonl"}
    changed = with_sections(config, traces=traces, student=student, problems=problems)
    (tmp_path / "card.md").write_text(model_card(changed, shared, shared, SHAPE, 30))
    card = parsed(tmp_path / "card.md")
    assert card.data.base_model == "Qwen/Qwen3-0.6B-Base"
    assert card.data.datasets == ["openai/gsm8k"]
    assert f"model: `{teacher}`" in card.text
    assert "licence: apache-2.0" in card.text
    assert "4 a problem at temperature 0.6, top_p 1, up to 4,096 tokens" in card.text
    assert "arXiv:2110.14168); licence: mit" in card.text
    assert "started from: `Qwen/Qwen3-0.6B-Base`\n- its licence: not known here" in card.text


def test_unknown_data_is_said_to_be_unknown(exported, tmp_path):
    config, shared = exported
    changed = with_sections(config, problems={"source": "jsonl", "path": "/home/someone/mine.jsonl", "count": None})
    (tmp_path / "card.md").write_text(model_card(changed, shared, RunDir(tmp_path / "empty"), SHAPE, 30))
    card = parsed(tmp_path / "card.md")
    assert "? of `mine.jsonl`; licence: not known here" in card.text
    assert "verifier yield: ? of ? traces kept\n" in card.text
    assert card.data.datasets is None


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\ntext", "mit"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3"),
        ("---\ntags: [a]\n---\n", None),
        ("---\n: : [\n---\n", None),
        ("license: mit\n", None),
        ("# Title\n---\nlicense: mit\n---\n", None),
        ("", None),
    ],
)
def test_the_licence_that_a_card_states(tmp_path, text, licence):
    (tmp_path / "README.md").write_text(text)
    assert hub.licence_of(str(tmp_path)) == licence


def test_no_licence_is_known_of_what_is_not_here(tmp_path):
    assert hub.licence_of(str(tmp_path)) is None
    assert hub.licence_of("nobody/has-this-model") is None
    assert hub.licence_of("not a/valid/name") is None
