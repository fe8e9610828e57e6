"""Code problems from the files of well-known sets, with their tests as `Problem.tests` wants them.

Read are the files that `traces.tables` reads.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Callable
from typing import Any

from jaxdistill.config import ProblemsConfig
from jaxdistill.records import Problem
from jaxdistill.traces import tables, values
from jaxdistill.traces.values import BadRow

DOMAIN = "code"
_MAX_PRIVATE = 1 << 28
_FENCED = "Answer with one Python code block"


def problem_of(row: tables.Row, config: ProblemsConfig) -> tuple[Problem, list[BadRow], tuple[BadRow, ...]]:
    """The problem of a row of a code set; `source` names its layout, a key of `LAYOUTS`.

    Raises:
      BadRow: it is not of that layout.
    """
    assert not isinstance(row.data, BadRow)
    try:
        prompt, tests, solution = LAYOUTS[config.source](row.data)
        stored = json.dumps(tests)
        values.clean(prompt)
    except BadRow:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise BadRow(f"no row of {config.source}", f": {what}") from None
    problem = Problem(
        id=f"{config.source}-{row.file.stem.partition('.')[0]}:{row.number}",
        prompt=prompt,
        answer=None,
        domain=config.domain if config.domain != "math" else DOMAIN,
        source=f"{row.file.source}:{row.number}",
        solution=f"```python\n{values.clean(solution).rstrip()}\n```" if solution else None,
        tests=stored,
    )
    return problem, [], ()


Found = tuple[str, dict[str, Any], str | None]


def _humaneval(row: dict[str, Any]) -> Found:
    """HumanEval (Chen et al. 2021, arXiv:2107.03374): `prompt`, `entry_point`, `test` with a `check(candidate)`."""
    entry, begun = values.text(row, "entry_point"), values.text(row, "prompt")
    tests = {
        "kind": "asserts",
        "entry": entry,
        "context": begun,
        "tests": [f"{values.text(row, 'test')}\n\ncheck({entry})\n"],
    }
    prompt = f"Complete this function. {_FENCED} that holds all of it.\n\n```python\n{begun.strip()}\n```"
    solution = row.get("canonical_solution")
    return prompt, tests, begun + solution if solution else None


def _mbpp(row: dict[str, Any]) -> Found:
    """MBPP (Austin et al. 2021, arXiv:2108.07732), full or sanitized: `text` or `prompt`, `test_list`, `code`."""
    setup = "\n".join(row.get("test_imports") or []) or row.get("test_setup_code") or ""
    tests = {"kind": "asserts", "setup": setup, "tests": list(row["test_list"])}
    if not all(isinstance(test, str) for test in tests["tests"]):
        raise BadRow("a test is no text")
    question = values.text(row, "text" if "text" in row else "prompt")
    # the name of the function stands nowhere else
    prompt = f"{question}\n{_FENCED}. It has to pass:\n\n```python\n{tests['tests'][0]}\n```"
    return prompt, tests, row.get("code")


def _apps(row: dict[str, Any]) -> Found:
    """APPS (Hendrycks et al. 2021, arXiv:2105.09938) and TACO: `question`, `input_output` with `fn_name` or without."""
    data = row["input_output"]
    data = json.loads(data) if isinstance(data, str) else data
    pairs = list(zip(data["inputs"], data["outputs"], strict=True))
    name = data.get("fn_name")
    if name:
        tests = {"kind": "calls", "entry": name, "cases": [_call(args, output) for args, output in pairs]}
        how = f"{_FENCED} that defines `{name}`."
    else:
        tests = {"kind": "stdio", "cases": [{"input": _text(a), "output": _text(b)} for a, b in pairs]}
        how = f"{_FENCED}: a program that reads standard input and prints to standard output."
    starter = row.get("starter_code")
    given = f"\n\n```python\n{starter.rstrip()}\n```" if starter else ""
    solutions = row.get("solutions") or "[]"
    solutions = json.loads(solutions) if isinstance(solutions, str) else solutions
    return f"{values.text(row, 'question').strip()}{given}\n\n{how}", tests, solutions[0] if solutions else None


def _livecodebench(row: dict[str, Any]) -> Found:
    """LiveCodeBench (Jain et al. 2024, arXiv:2403.07974): `question_content`, public and private test cases."""
    cases = json.loads(row["public_test_cases"])
    cases += json.loads(_unpack_private(row.get("private_test_cases") or "[]"))
    starter = row.get("starter_code") or ""
    if cases and cases[0].get("testtype") == "functional":
        name = json.loads(row["metadata"])["func_name"]
        calls = [(_lines(case["input"]), json.loads(case["output"])) for case in cases]
        tests = {"kind": "calls", "entry": name, "cases": [{"args": a, "expected": b} for a, b in calls]}
        how = f"{_FENCED} that defines `{name}`.\n\n```python\n{starter.rstrip()}\n```"
    else:
        tests = {"kind": "stdio", "cases": [{"input": c["input"], "output": c["output"]} for c in cases]}
        how = f"{_FENCED}: a program that reads standard input and prints to standard output."
    return f"{values.text(row, 'question_content').strip()}\n\n{how}", tests, None


def _call(args: Any, output: Any) -> dict[str, Any]:
    """APPS puts an expected value into a list of one, but not everywhere, so that both are right."""
    accepted = [output, output[0]] if isinstance(output, list) and len(output) == 1 else [output]
    return {"args": args, "expected_any": accepted}


def _text(value: Any) -> str:
    """Input or output is a text, or a list of lines."""
    return value if isinstance(value, str) else "\n".join(str(line) for line in value)


class _TextOnly(pickle.Unpickler):
    """Reads a pickled text; a pickle that names any class or function is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"private_test_cases holds {module_name}.{global_name} and not just text")


def _unpack_private(text: str) -> str:
    """JSON of the private tests: as it stands, or pickled, deflated and in base64, as the set publishes it."""
    if text.lstrip().startswith("["):
        return text
    try:
        data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), _MAX_PRIVATE)
        found = _TextOnly(io.BytesIO(data)).load()
    except (zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"private_test_cases cannot be read ({error})") from None
    if not isinstance(found, str):
        raise ValueError("private_test_cases is no text")
    return found


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


LAYOUTS: dict[str, Callable[[dict[str, Any]], Found]] = {
    "humaneval": _humaneval,
    "mbpp": _mbpp,
    "apps": _apps,
    "livecodebench": _livecodebench,
}
"""Names for `problems.source`, and how a row is read: question, tests and a solution if there is one."""
