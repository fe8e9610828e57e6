"""Runs made by hand, up to their verdicts, and tokenizers in the shapes of well-known families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdistill.config import RunConfig, build
from jaxdistill.data.tokenizer import train_tokenizer
from jaxdistill.records import Problem, RunDir, Trace, Verdict, split_response, write_manifest, write_records
from tests.helpers import TINY

# ------------------------------------------------------------------------------------------------- templates

# each in own words, after what the family's template does
QWEN3 = """\
{%- for m in messages %}
{%- if m.role == 'assistant' and not loop.last and '</think>' in m.content %}
{{- '<|im_start|>assistant\n' + m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
NO_THINKING = QWEN3.replace("assistant\n' }}{%- endif %}", "assistant\n<think>\n\n</think>\n\n' }}{%- endif %}")
LLAMA3 = """\
{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
GEMMA = """\
{{- bos_token }}{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('a system turn is not supported') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""
R1_DISTILL = """\
{{- bos_token }}{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<|User|>' + m.content }}
{%- else %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}"""
STRIPS_ALWAYS = QWEN3.replace("and not loop.last ", "")

FAMILIES: dict[str, tuple[str | None, list[str], dict[str, str]]] = {
    "qwen3": (QWEN3, [], {"eos_token": "<|im_end|>"}),
    "strips": (STRIPS_ALWAYS, [], {"eos_token": "<|im_end|>"}),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "gemma": (
        GEMMA,
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "r1_distill": (
        R1_DISTILL,
        ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"],
        {"bos_token": "<|begin|>", "eos_token": "<|end|>"},
    ),
    "no_thinking": (NO_THINKING, [], {"eos_token": "<|im_end|>"}),
    "base": (None, ["<|endoftext|>"], {"eos_token": "<|endoftext|>"}),
}
"""Template, special tokens and settings of a tokenizer in the shape of each family's."""


def make_tokenizer(folder: Path, family: str, texts: Sequence[str], *, special_tags: bool = False) -> Path:
    """A small tokenizer in a family's shape, with its template (or none).

    Args:
      special_tags: whether `<think>` and `</think>` are special tokens, as in some releases.
    """
    from tokenizers import AddedToken, Tokenizer

    template, special, settings = FAMILIES[family]
    folder.mkdir(parents=True)
    train_tokenizer(folder, texts, 320)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if special_tags:
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder


# ------------------------------------------------------------------------------------------------------ runs


def write_run(root: Path, samples: Sequence[tuple[str, str, str, bool]]) -> RunDir:
    """A run up to its verdicts.

    Args:
      samples: (problem id, domain, response, whether it is right and kept), one a trace, in order.
    """
    run = RunDir(root)
    domains = {problem: domain for problem, domain, _, _ in samples}
    problems = [Problem(id=p, prompt=f"Question {p}?", answer="1", domain=d, source="test") for p, d in domains.items()]
    write_records(run.problems / "problems.parquet", Problem, problems)
    seen: dict[str, int] = {}
    traces, verdicts = [], []
    for problem, _, response, right in samples:
        sample = seen[problem] = seen.get(problem, -1) + 1
        name = f"{problem}/plain/{sample}"
        traces.append(make_trace(name, problem, sample, response))
        verdicts.append(
            Verdict(
                trace_id=name,
                problem_id=problem,
                outcome="correct" if right else "incorrect",
                reason="equal" if right else "different",
                method="integer",
                extracted="1",
                kept=right,
                rejected_for=None if right else "incorrect",
            )
        )
    write_records(run.traces / "traces.parquet", Trace, traces)
    write_records(run.verdicts / "verdicts.parquet", Verdict, verdicts)
    write_manifest(run.verdicts, stage="verify", config={}, config_hash=str(len(samples)), inputs={}, counts={})
    return run


def make_trace(name: str, problem: str, sample: int, response: str) -> Trace:
    thinking, content = split_response(response)
    return Trace(
        id=name,
        problem_id=problem,
        style="plain",
        sample=sample,
        engine="import",
        teacher="t",
        revision="",
        temperature=1.0,
        top_p=1.0,
        max_tokens=9,
        seed=0,
        prompt_ids=[],
        output_ids=[],
        response=response,
        thinking=thinking,
        content=content,
        finish_reason="stop",
    )


def thought(steps: int, answer: str = "1") -> str:
    """A response with that many lines of thinking."""
    lines = "".join(f" Ann={i}\n" for i in range(steps))
    return f"<think>\n{lines}</think>\nThe answer is \\boxed{{{answer}}}."


def config_of(root: Path, **data: Any) -> RunConfig:
    """The tiny config on a run in `root`, with the demo teacher's tokenizer and these keys of `data`."""
    student = TINY["student"] | {"tokenizer": "demo"}
    return build(
        TINY | {"run_dir": str(root), "student": student, "data": {"row_tokens": 160} | data, "evaluate": None}
    )
