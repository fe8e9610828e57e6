"""The model card: teacher, data, verifier yield, recipe and measured scores; what is not known is said to be so.

It is written with the export, and again with the scores once they have been measured (`refresh_cards`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from jaxdistill import __version__, hub
from jaxdistill.config import ProblemsConfig, RunConfig, to_dict, with_baseline
from jaxdistill.models import ModelConfig
from jaxdistill.records import RunDir, Trace, atomic_file, read_manifest, read_records

CARD = "README.md"
DATA = {
    "demo": {"text": "arithmetic word problems that jaxdistill makes on the fly (`jaxdistill.demo`)", "licence": "mit"},
    "gsm8k": {
        "text": "[GSM8K](https://huggingface.co/datasets/openai/gsm8k) (Cobbe et al. 2021, arXiv:2110.14168)",
        "licence": "mit",
        "id": "openai/gsm8k",
    },
}
"""Sources of problems whose origin and licence are known."""
UNKNOWN = "not known here; see where it comes from before you publish this model"
SECTIONS = ("problems", "traces", "verify", "data", "student", "train", "export", "evaluate")


def model_card(
    config: RunConfig,
    run: RunDir,
    shared: RunDir,
    model: ModelConfig,
    step: int,
    evaluation: dict[str, Any] | None = None,
) -> str:
    """Markdown with the front matter that the hub reads.

    Args:
      run: the student's folder: the run's own, or a baseline's.
      shared: the run's own, with problems, traces and verdicts.
      step: of the exported checkpoint.
      evaluation: the evaluation's counts (`evals.evaluate`); None before it.
    """
    name = _name(run, shared)
    scores = (evaluation or {}).get("models", {})
    title = config.name if name == "student" else f"{config.name}: baseline {name}"
    trained = _counts(run.checkpoints)
    size = f"{trained['parameters']:,} parameters, " if "parameters" in trained else ""
    lines = [
        f"# {title}",
        "",
        f"A {model.model_type} student ({size}{model.num_layers} layers, width {model.hidden_size}), distilled with "
        f"jaxdistill {__version__}; the checkpoint of step {step:,}.",
        *_section("Teacher", _teacher(config, shared)),
        *_section("Data", _data(config, run, shared)),
        *_section("Training", _training(config, trained, _counts(run.tokens))),
        *_section("Evaluation", _evaluation(config, name, evaluation or {})),
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump({s: to_dict(config)[s] for s in SECTIONS}, sort_keys=False, allow_unicode=True).strip(),
        "```",
    ]
    front = _front(config, title, scores.get(name), (evaluation or {}).get("heldout"))
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n".join(lines) + "\n"


def refresh_cards(config: RunConfig, shared: RunDir) -> list[Path]:
    """Writes the measured scores into the cards of the run's exports, the baselines' too.

    Returns:
      The cards that were written anew: none before the evaluation is finished.
    """
    manifest = read_manifest(shared.evaluation)
    if manifest is None:
        return []
    written = []
    students = [(config, shared), *((with_baseline(config, b), shared.baseline(b)) for b in config.baselines)]
    for student, run in students:
        exported, shape = read_manifest(run.export), run.checkpoints / "model.json"
        if exported is None or not shape.is_file():
            continue
        model = ModelConfig.from_hf(json.loads(shape.read_text()), str(shape))
        card = model_card(student, run, shared, model, exported["counts"]["step"], manifest["counts"])
        with atomic_file(run.export / CARD) as temporary:
            temporary.write_text(card)
        written.append(run.export / CARD)
    return written


def _name(run: RunDir, shared: RunDir) -> str:
    """What the evaluation calls it."""
    return "student" if run == shared else run.root.name


def _counts(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return manifest["counts"] if manifest else {}


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _front(config: RunConfig, title: str, score: dict[str, Any] | None, heldout: int | None) -> dict[str, Any]:
    """Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md"""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxdistill", "distillation", "reasoning"],
    }
    init = config.student.init
    if init is not None and init.count("/") == 1 and not Path(init).exists() and init[0] not in "./~":
        front["base_model"] = init  # only a repository id means anything on the hub
    if "id" in DATA.get(config.problems.source, {}):
        front["datasets"] = [DATA[config.problems.source]["id"]]
    if score and config.evaluate and config.evaluate.problems:
        source = config.evaluate.problems.source
        metric = {"type": "accuracy", "name": f"accuracy on {heldout} held-out problems", "value": score["accuracy"]}
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"name": source, "type": DATA.get(source, {}).get("id", source)},
            "metrics": [metric],
        }
        front["model-index"] = [{"name": title, "results": [result]}]
    return front


def _teacher(config: RunConfig, shared: RunDir) -> list[str]:
    traces = config.traces
    if traces.engine == "import" or traces.teacher is None:
        return ["No model was asked: the traces are the solutions that came with the problems."]
    try:
        revision = next(iter(read_records(shared.traces, Trace))).revision
    except (ValueError, StopIteration):
        revision = traces.revision or "?"
    return [
        f"- model: `{traces.teacher}`, revision `{revision}`",
        f"- licence: {hub.licence_of(traces.teacher, traces.revision) or UNKNOWN}",
        f"- sampled: {traces.samples} a problem at temperature {traces.temperature:g}, top_p {traces.top_p:g}, "
        f"up to {traces.max_tokens:,} tokens",
    ]


def _data(config: RunConfig, run: RunDir, shared: RunDir) -> list[str]:
    problems, traces, verdicts, tokens = (
        _counts(folder) for folder in (shared.problems, shared.traces, shared.verdicts, run.tokens)
    )
    finished = ", ".join(f"{count:,} {reason}" for reason, count in traces.get("finished", {}).items())
    count, kept = verdicts.get("traces"), verdicts.get("kept")
    share = f" ({kept / count:.1%})" if count and kept is not None else ""
    lines = [
        f"- problems: {_number(problems.get('problems'))} of {_source(config.problems)}",
        f"- traces: {_number(traces.get('samples'))}" + (f" ({finished})" if finished else ""),
        f"- verifier yield: {_number(kept)} of {_number(count)} traces kept{share}",
    ]
    lines += [f"  - rejected, {reason}: {n:,}" for reason, n in verdicts.get("rejected", {}).items()]
    lines += [f"  - undecided, {reason}: {n:,}" for reason, n in verdicts.get("undecided", {}).items()]
    return [
        *lines,
        f"- trained on: {_number(tokens.get('examples'))} examples ({config.data.response}), "
        f"{_number(tokens.get('tokens'))} tokens an epoch",
    ]


def _source(problems: ProblemsConfig) -> str:
    known = DATA.get(problems.source, {})
    path = problems.path or ""
    name = path if path.startswith(("hf://", "https://huggingface.co/")) else Path(path).name or problems.source
    text = known.get("text") or f"`{name}`"
    return f"{text}; licence: {known.get('licence', UNKNOWN)}"


def _training(config: RunConfig, counts: dict[str, Any], tokens: dict[str, Any]) -> list[str]:
    start = f"`{config.student.init}`" if config.student.init else "random weights"
    revision = f" at revision `{config.student.revision}`" if config.student.init and config.student.revision else ""
    lines = [f"- started from: {start}{revision}"]
    if config.student.init:
        lines.append(f"- its licence: {hub.licence_of(config.student.init, config.student.revision) or UNKNOWN}")
        if config.student.lora is not None and config.export.lora == "adapter":
            lines.append(
                "- this is an adapter on it (LoRA), and `adapter_config.json` names the base's place; where it lies "
                "elsewhere, load it first, and give it to `PeftModel.from_pretrained(base, folder)`"
            )
    if "steps" in counts:
        epochs = f" ({counts['epochs']:.2f} epochs)" if "epochs" in counts else ""
        row_tokens = tokens.get("row_tokens", config.data.row_tokens)  # longer where overlong traces are kept
        lines.append(f"- steps: {counts['steps']:,} of {config.train.batch_rows} x {row_tokens:,} tokens{epochs}")
    if counts.get("final_loss") is not None:
        lines.append(f"- loss at the end: {counts['final_loss']:.4f} nats a trained token")
    return lines


def _evaluation(config: RunConfig, name: str, evaluation: dict[str, Any]) -> list[str]:
    scores, settings = evaluation.get("models", {}), config.evaluate
    measured = _benchmarks(name, evaluation.get("benchmarks", {}))
    if settings is None or settings.problems is None or name not in scores:
        return measured or ["Not measured."]
    sampled = f"temperature {settings.temperature:g}, up to {settings.max_tokens:,} tokens"
    lines = [
        f"{_number(evaluation.get('heldout'))} held-out problems of {_source(settings.problems)}.",
        f"{settings.samples} response(s) a problem ({settings.engine} engine, {sampled}), marked by the verifier; "
        "what it could not decide counts as wrong.",
        "",
        "| model | accuracy | 95% interval | tokens a response | truncated |",
        "|---|---:|---:|---:|---:|",
    ]
    for other, s in scores.items():
        who = "**this model**" if other == name else other
        lines.append(
            f"| {who} | {s['accuracy']:.1%} | {s['low']:.1%} to {s['high']:.1%} | {s['mean_output_tokens']:.0f} "
            f"| {s['truncated']:,} |"
        )
    return [*lines, *(["", *measured] if measured else [])]


def _benchmarks(name: str, found: dict[str, Any]) -> list[str]:
    """This model's benchmarks as a table; nothing where none was measured."""
    rows = [
        f"| {each['title']} | {each['problems']:,} | {each['samples']} | {s['accuracy']:.1%} "
        f"| {s['low']:.1%} to {s['high']:.1%} |"
        for each in found.values()
        if (s := each["models"].get(name))
    ]
    head = ["| benchmark | problems | responses a problem | accuracy | 95% interval |", "|---|---:|---:|---:|---:|"]
    return [*head, *rows] if rows else []


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
