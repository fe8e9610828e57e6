"""What the teacher is asked, as it is sent: `jaxdistill show CONFIG --prompts 2`."""

from __future__ import annotations

import json
from pathlib import Path

from jaxdistill import control, tokenization
from jaxdistill.config import RunConfig
from jaxdistill.progress import say
from jaxdistill.records import Problem, RunDir, read_records
from jaxdistill.traces.collect import find_teacher
from jaxdistill.traces.problems import load_problems
from jaxdistill.traces.work import WorkList


def show_prompts(config: RunConfig, count: int) -> None:
    """Prints the rendered prompts of the first problems, one for each style; needs no run to have been made.

    Raises:
      ValueError: the traces are imported, or a prompt cannot be rendered.
    """
    if config.traces.engine == "import":
        raise ValueError("traces.engine: import asks no teacher; set another engine to see prompts.")
    folder = RunDir(Path(config.run_dir)).problems
    known = any(folder.glob("*.parquet"))
    problems = list(read_records(folder, Problem)) if known else load_problems(config.problems)
    teacher = find_teacher(config.traces, RunDir(Path(config.run_dir)).first_day(note=False))
    work = WorkList(config.traces, problems[:count], teacher.tokenizer)
    for problem in work.problems:
        for style in work.styles:
            chat = work.messages(problem, style, teacher.tokenizer)
            if teacher.tokenizer is None:
                say(f"{problem.id}, style {style.name} (rendered by the server)")
                say(json.dumps(chat, indent=2, ensure_ascii=False))
                continue
            text = tokenization.render_chats(teacher.tokenizer, [chat])[0]
            tokens = len(tokenization.encode_prompts(teacher.tokenizer, [text])[0])
            say(f"{problem.id}, style {style.name}: {tokens} tokens ({style.source or 'no source given'})")
            say(control.clean(text))
