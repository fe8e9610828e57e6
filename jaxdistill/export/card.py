"""The model card: teacher, data, verifier yield and recipe, as they were."""

from __future__ import annotations

import json

import yaml

from jaxdistill import __version__
from jaxdistill.config import RunConfig, to_dict
from jaxdistill.models import ModelConfig
from jaxdistill.records import RunDir, read_manifest


def model_card(config: RunConfig, run: RunDir, shared: RunDir, model: ModelConfig, step: int) -> str:
    """Markdown with the front matter that the hub reads."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["jaxdistill", "distillation", "reasoning"],
    }
    teacher = config.traces.teacher or config.problems.source
    if config.student.init:
        front["base_model"] = config.student.init
    traces, verdicts, tokens = (_counts(m) for m in (shared.traces, shared.verdicts, run.tokens))
    recipe = {name: to_dict(config)[name] for name in ("problems", "traces", "verify", "data", "student", "train")}
    lines = [
        f"# {config.name}",
        "",
        f"A {model.model_type} student of {model.num_layers} layers, width {model.hidden_size}, distilled from "
        f"`{teacher}` with jaxdistill {__version__}; the checkpoint of step {step:,}.",
        "",
        "## Data",
        "",
        f"- traces: {json.dumps({k: v for k, v in traces.items() if isinstance(v, int | float | str)})}",
        f"- verifier yield: {verdicts.get('kept', '?')} kept of {verdicts.get('traces', '?')}; "
        f"rejected: {json.dumps(verdicts.get('rejected', {}))}",
        f"- trained on: {tokens.get('examples', '?')} examples, {tokens.get('tokens', '?')} tokens an epoch",
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False).strip(),
        "```",
        "",
        "Held-out scores are in the run's report, measured after this card was written.",
    ]
    return "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n\n" + "\n".join(lines) + "\n"


def _counts(folder) -> dict:
    manifest = read_manifest(folder)
    return manifest["counts"] if manifest else {}
