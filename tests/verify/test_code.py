"""Code: extraction, the three kinds of tests, reasons, HumanEval, and the verify stage on code problems."""

from __future__ import annotations

import base64
import json
import os
import pickle
import platform
import sys
import zlib
from pathlib import Path

import pytest

from jaxdistill.config import ProblemsConfig
from jaxdistill.records import RunDir, Verdict, read_records
from jaxdistill.traces.problems import load_problems
from jaxdistill.verify.code import Limits, Sandbox, check_code, extract_code, seccomp
from jaxdistill.verify.code.output import same_output
from jaxdistill.verify.stage import verify
from tests.helpers import load_tool
from tests.verify.test_verify_stage import make_config, problem, trace, write_run

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("JAXDISTILL_DATA") or ROOT.parent / "shared" / "data")
HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl.gz"


@pytest.fixture(scope="module")
def sandbox():
    box = Sandbox()
    try:
        box.__enter__()
    except ValueError as error:
        pytest.skip(str(error))
    yield box
    box.__exit__()


def run(sandbox, code, tests, **limits):
    check = check_code(f"```python\n{code}\n```", tests, limits=Limits(**limits), sandbox=sandbox)
    return check.outcome, check.reason


def asserts(*tests, **more):
    return {"kind": "asserts", "tests": list(tests), **more}


def calls(entry, *cases):
    return {"kind": "calls", "entry": entry, "cases": [{"args": args, "expected": value} for args, value in cases]}


def stdio(*cases):
    return {"kind": "stdio", "cases": [{"input": i, "output": o} for i, o in cases]}


RIGHT = ("correct", "all tests pass")

# ------------------------------------------------------------------------------------------------ extraction


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("<think>```python\nno\n```</think>Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nfirst\n```\nBetter:\n```python\nsecond\n```", "second\n"),
        ("```python\nx = 1\n```\nIt prints\n```text\n1\n```\nRun it:\n```bash\npython x.py\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\n```\n1\n```", "x = 1\n"),
        ("1. So:\n   ```Python3\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("~~~python\nx = 1\n~~~", "x = 1\n"),
    ],
)
def test_the_last_python_block_is_the_program(response, code):
    assert extract_code(response).code == code


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "no code block"),
        ("def f(x): return x", "no code block"),
        ("<think>\n```python\nx = 1\n```\n</think>\nAs above.", "no code block"),
        ("<think>\n```python\nx = 1\n```\n", "truncated"),
        ("```python\nx = 1\n```\nOr:\n```python\nx = ", "unclosed code block"),
        ("```python\n\n```", "no code block"),
        ("```bash\nls\n```", "no code block"),
        ("```python\n" + "x = 1\n" * 30_000 + "```", "too long"),
    ],
)
def test_no_program_is_undecided(sandbox, response, reason):
    check = check_code(response, asserts("assert True"), sandbox=sandbox)
    assert (check.outcome, check.reason, check.extracted) == ("undecided", reason, None)


def test_extraction_is_linear(cpu_seconds):
    for text in ("```" * 200_000, "```python\n" * 100_000, "`" * 1_000_000, "```\n" * 200_000):
        assert cpu_seconds(lambda text=text: extract_code(text)) < 2


# --------------------------------------------------------------------------------------------------- asserts


def test_asserts(sandbox):
    tests = asserts("assert f(1) == 2", "assert f([1]) == [1, 1]")
    assert run(sandbox, "def f(x): return x * 2", tests) == RIGHT
    assert run(sandbox, "def f(x): return 2", tests) == ("incorrect", "assertion of test 2 failed")
    assert run(sandbox, "def f(x): return 1 / 0", tests) == ("incorrect", "raises ZeroDivisionError")
    assert run(sandbox, "def f(x) return", tests) == ("incorrect", "raises SyntaxError")
    assert run(sandbox, "def g(x): return x", tests) == ("incorrect", "raises KeyError")
    assert run(sandbox, "def g(x): return x", tests | {"entry": "f"})[1].endswith("is not defined")
    assert run(sandbox, "import numpy\ndef f(x): return x", tests) == ("undecided", "needs the module numpy")
    assert run(sandbox, "print(input())", tests) == ("incorrect", "raises EOFError")


def test_classes_of_the_program_can_be_made_and_used_by_tests(sandbox):
    tests = asserts("s = Stack(3)", "s.push(7)\ns.push(8)", "assert s.pop() == 8 and top(s) == 7")
    code = """
class Stack:
    def __init__(self, n): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
def top(stack): return stack.items[-1]"""
    assert run(sandbox, code, tests) == RIGHT


@pytest.mark.parametrize(
    "value",
    [
        "(1, 2)", "[1, [2]]", "{1: (2,)}", "{1, 2}", "frozenset({1})", "1.5", "2 ** 40000", "None", "True",
        "'\\ud800é'", "b'x'", "1 + 2j", "range(3)", "float('inf')", "[]", "{}", "''", "-0.0", "Fraction(1, 3)",
        "Decimal('0.1')", "Counter('aab')", "deque([1])",
    ],
)  # fmt: skip
def test_values_arrive_as_they_are(sandbox, value):
    setup = "from collections import Counter, deque\nfrom decimal import Decimal\nfrom fractions import Fraction"
    check = f"v = f()\nassert v == {value} and (isinstance(v, type({value})) or isinstance({value}, dict)), v"
    assert run(sandbox, f"{setup}\ndef f(): return {value}", asserts(check, setup=setup)) == RIGHT


def test_iterators_are_taken_out(sandbox):
    tests = asserts("assert list(f(3)) == [0, 1, 2]")
    assert run(sandbox, "def f(n): yield from range(n)", tests) == RIGHT
    assert run(sandbox, "def f(n): return {i: 1 for i in range(n)}.keys()", tests) == RIGHT


def test_exceptions_can_be_expected(sandbox):
    tests = asserts("try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass")
    assert run(sandbox, "def f(x): raise ValueError", tests) == RIGHT
    assert run(sandbox, "def f(x): return x", tests)[0] == "incorrect"
    assert (
        run(sandbox, "import os\ndef f(x): os._exit(0)", asserts("try: f(1)\nexcept Exception: pass"))[0] == "incorrect"
    )
    assert run(sandbox, "def f(x): raise StopIteration", asserts("for x in map(f, [1]): pass"))[0] == "incorrect"


# ----------------------------------------------------------------------------------------------------- calls


def test_calls(sandbox):
    tests = calls("f", ([1, 2], 3), ([[1], [2]], [1, 2]), ([0.1, 0.2], 0.3))
    assert run(sandbox, "def f(a, b): return a + b", tests) == RIGHT
    assert run(sandbox, "class Solution:\n    def f(self, a, b): return a + b", tests) == RIGHT
    assert run(sandbox, "def f(a, b): return a - b", tests)[1] == "another value than expected in case 1"
    some = {"kind": "calls", "entry": "f", "cases": [{"args": [], "expected_any": [[5], 5]}]}
    assert run(sandbox, "def f(): return 5", some) == run(sandbox, "def f(): return [5]", some) == RIGHT
    assert run(sandbox, "def f(): return 6", some)[0] == "incorrect"


@pytest.mark.parametrize(
    ("value", "expected", "equal"),
    [
        ("(1, 2)", [1, 2], True), ("{1: 2}", {"1": 2}, True), ("2.0", 2, True), ("0.1 + 0.2", 0.3, True),
        ("1e-40", 1e-41, False), ("1.001", 1.0, False), ("True", 1, False), ("1", True, False), ("'1'", 1, False),
        ("None", None, True), ("0", None, False), ("[1, 2]", [2, 1], False), ("[1]", [1, 2], False),
        ("'a'", "A", False), ("{}", [], False), ("10 ** 400", 1.5, False), ("object()", 1, False),
        ("[None] * 2", [None, None], True),
    ],
)  # fmt: skip
def test_values_of_calls(sandbox, value, expected, equal):
    found = run(sandbox, f"def f(): return {value}", calls("f", ([], expected)))
    assert found[0] == ("correct" if equal else "incorrect")


# ----------------------------------------------------------------------------------------------------- stdio


def test_every_case_of_standard_input_counts(sandbox):
    tests = stdio(("1 2\n", "3\n"), ("2 2\n", "4\n"), ("0 0", "0"))
    for code in (
        "print(sum(map(int, input().split())))",
        "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))",
        "import sys\nsys.stdout.write(str(sum(map(int, open(0).read().split()))))\nsys.exit(0)",
        "for line in open('/dev/stdin'): print(sum(map(int, line.split())))",
        "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())\nos._exit(0)",
        "import threading\ndef main(): print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()",
        "import atexit\n@atexit.register\ndef end(): print(sum(map(int, input().split())))",
        "def main(): print(sum(map(int, input().split())))\nif __name__ == '__main__': main()",
    ):
        assert run(sandbox, code, tests) == RIGHT, code
    assert run(sandbox, "input(); print(3)", tests) == ("incorrect", "another output than expected in case 2")
    assert run(sandbox, "print(sum(map(int, input().split())))\n1 / 0", tests)[1] == "raises ZeroDivisionError"
    assert run(sandbox, "print(3)\nexit(1)", tests) == ("incorrect", "exit status 1")


@pytest.mark.parametrize(
    ("printed", "expected", "equal"),
    [
        ("1 2 \n\n3", "1  2\n3\n", True), ("1\r\n2", "1\n2\n", True), ("1 2", "1\n2", False), ("12", "1 2", False),
        ("0.33333334", "0.33333333", True), ("0.334", "0.333", False), ("7.0", "7", False), ("7", "7.0", True),
        ("1e-41", "1e-40", False), ("1e-10", "0.0", True), ("nan", "0.0", False), ("yes", "YES", False),
        ("1_0", "10.0", False), ("", "1", False), ("1\n2", "1", False), ("1", "1\n2", False), ("inf", "1e999", False),
        ("9" * 99 + ".5", "1.5", False),
    ],
)  # fmt: skip
def test_output_is_compared_word_by_word(printed, expected, equal):
    assert same_output(printed, expected) is equal


def test_all_cases_together_have_a_limit(sandbox):
    tests = stdio(*[("", "1")] * 9)
    assert run(sandbox, "import time; time.sleep(0.2); print(1)", tests, total_s=0.3)[0] == "undecided"


# ------------------------------------------------------------------------------------------------- bad tests


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ({"kind": "quiz"}, "kind 'quiz' is none of asserts, calls, stdio"),
        ({"kind": []}, "kind [] is none of asserts, calls, stdio"),
        ({"kind": "asserts"}, "no tests"),
        (asserts(), "no tests"),
        (asserts(1), "tests is no list of texts"),
        ({"kind": "asserts", "tests": "assert f(1)"}, "tests is no list of texts"),
        (asserts("assert f(1)", color=1), "unknown key color"),
        (asserts("assert f(1)", setup=3), "setup is no text"),
        (stdio(), "no tests"),
        (stdio(("", " ")), "no output is expected in any case"),
        (stdio((1, "1")), "case 1 has no input or no output"),
        (
            {"kind": "calls", "entry": "f", "cases": [{"args": 1, "expected": 1}]},
            "case 1 has no args or nothing expected",
        ),
        ({"kind": "calls", "entry": "f", "cases": [{"args": [1]}]}, "case 1 has no args or nothing expected"),
        (asserts("assert f(1) =="), "SyntaxError before any test"),
        (asserts("assert f(1) == 1", setup="import numpy"), "ModuleNotFoundError before any test"),
        (asserts("assert all([])"), "nothing of the program is called"),
        (asserts("1 / 0"), "ZeroDivisionError before any call of the program"),
    ],
)
def test_bad_tests_are_undecided(sandbox, tests, reason):
    check = check_code("```python\ndef f(x): return x\n```", tests, sandbox=sandbox)
    assert (check.outcome, check.reason) == ("undecided", f"malformed tests: {reason}")


# --------------------------------------------------------------------------------------------------- sandbox


def test_the_tier_is_found_by_trying_and_a_weak_one_refused(sandbox, monkeypatch):
    assert sandbox.tier in ("full", "namespaces")
    assert check_code("```python\nprint(1)\n```", stdio(("", "1")), sandbox=sandbox).method == f"stdio ({sandbox.tier})"
    monkeypatch.setattr("jaxdistill.verify.code.sandbox._BOOT", WITHOUT_NAMESPACES)
    with pytest.raises(
        ValueError, match=r"only by 'filters' .namespaces cannot be had.*verify.code.isolation: filters"
    ):
        Sandbox().__enter__()
    with Sandbox(isolation="filters") as weak:
        assert weak.tier == "filters"
        assert run(weak, "def f(x): return x", asserts("assert f(1) == 1")) == RIGHT
        for attack in (
            "open('x', 'w')",
            "open('/etc/passwd')",
            "import os; os.fork()",
            "import socket; socket.socket()",
        ):
            assert run(weak, attack + "\nprint(1)", stdio(("", "1")))[0] == "incorrect", attack


WITHOUT_NAMESPACES = """
import sys, types
for name in ("jaxdistill", "jaxdistill.verify", "jaxdistill.verify.code"):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [sys.argv[1]] if name.endswith("code") else []
from jaxdistill.verify.code import confine, spawner
def refuse(): raise OSError("not here")
confine.enter_namespaces = refuse
spawner.main()
"""


def test_system_call_numbers_are_those_of_the_kernel():
    """By this machine's own headers, where they are installed."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if platform.machine() != "x86_64" or not header.is_file():
        pytest.skip("no kernel headers")
    lines = [line.split() for line in header.read_text().splitlines() if line.startswith("#define __NR_")]
    kernel = {line[1].removeprefix("__NR_"): int(line[2]) for line in lines}
    ours = seccomp.numbers(0)
    assert {name: kernel[name] for name in ours if name in kernel} == {n: v for n, v in ours.items() if n in kernel}
    assert len(ours) > 100
    refused = (
        "fork vfork execve execveat kill tkill tgkill ptrace socket connect mount unshare setns bpf setsid memfd_create"
    )
    assert not set(refused.split()) & set(ours)


def test_a_machine_without_a_table_is_named():
    with pytest.raises(ValueError, match="no system call table for sparc"):
        seccomp.program("sparc")
    assert len(seccomp.program("aarch64")) % 8 == 0


# ------------------------------------------------------------------------------------------------- humaneval


@pytest.fixture(scope="module")
def tool():
    return load_tool("check_humaneval")


needs_data = pytest.mark.skipif(
    not HUMANEVAL.is_file(),
    reason=f"no HumanEval at {DATA}; name the folder that holds humaneval/HumanEval.jsonl.gz with JAXDISTILL_DATA",
)


@needs_data
def test_all_solutions_of_humaneval_pass(sandbox):
    problems = load_problems(ProblemsConfig(source="humaneval", path=str(HUMANEVAL)))
    assert len(problems) == 164
    for one in problems:
        check = check_code(one.solution, one.tests, limits=Limits(cpu_s=10), sandbox=sandbox)
        assert check.outcome == "correct", (one.id, check.reason)


@needs_data
def test_a_changed_operator_or_constant_fails(tool, sandbox):
    """A sample; the tool does all 164."""
    problems = load_problems(ProblemsConfig(source="humaneval", path=str(HUMANEVAL)))[::8]
    assert tool.wrong_verdicts(problems, 1) == []


def test_a_mutant_differs_by_one_change(tool):
    found = list(tool.mutants("def g(): return 1\ndef f(x):\n    '''Doc.'''\n    return x + 2 < 3", "f"))
    bodies = [text.split("\n")[-2].strip() for text in found]
    assert sorted(bodies) == sorted(
        ["return x - 2 < 3", "return x + 3 < 3", "return x + 2 >= 3", "return x + 2 < 4", "return None"]
    )


# ----------------------------------------------------------------------------------------------- code sets


def pickled(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


ROWS = {
    "humaneval": {
        "prompt": 'def f(x):\n    """Doubles."""\n',
        "entry_point": "f",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    },
    "mbpp": {"text": "Double it.", "test_list": ["assert f(2) == 4"], "code": "def f(x): return 2 * x"},
    "apps": {
        "question": "Double it.",
        "input_output": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]}),
        "solutions": json.dumps(["print(2 * int(input()))"]),
    },
    "livecodebench": {
        "question_content": "Double it.",
        "starter_code": "class Solution:\n    def f(self, x):\n",
        "public_test_cases": json.dumps([{"input": "2", "output": "4", "testtype": "functional"}]),
        "private_test_cases": pickled(json.dumps([{"input": "0", "output": "0", "testtype": "functional"}])),
        "metadata": json.dumps({"func_name": "f"}),
    },
}


@pytest.mark.parametrize("source", ROWS)
def test_code_sets_become_problems_with_tests(sandbox, tmp_path, source):
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(ROWS[source]) + "\n")
    (found,) = load_problems(ProblemsConfig(source=source, path=str(file)))
    assert (found.id, found.domain, found.answer, found.source) == (f"{source}-set:1", "code", None, "set.jsonl:1")
    right = found.solution or "```python\nclass Solution:\n    def f(self, x): return 2 * x\n```"
    assert check_code(right, found.tests, sandbox=sandbox).outcome == "correct"
    wrong = right.replace("2 * ", "3 * ")
    assert check_code(wrong, found.tests, sandbox=sandbox).outcome == "incorrect"


def test_private_tests_count_and_a_pickle_that_is_more_than_text_is_refused(sandbox, tmp_path):
    file, row = tmp_path / "set.jsonl", ROWS["livecodebench"]
    file.write_text(json.dumps(row))
    (found,) = load_problems(ProblemsConfig(source="livecodebench", path=str(file)))
    only_public = "```python\ndef f(x): return 4\n```"
    assert check_code(only_public, found.tests, sandbox=sandbox).reason == "another value than expected in case 2"
    for private, what in ((pickled(os.system), "posix.system"), (pickled(3), "is no text"), ("eJx", "."), ("!", ".")):
        file.write_text(json.dumps(row | {"private_test_cases": private}))
        with pytest.raises(ValueError, match=f"set.jsonl:1: .*{what}"):
            load_problems(ProblemsConfig(source="livecodebench", path=str(file)))


def test_apps_with_a_function(sandbox, tmp_path):
    data = {"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], 6]}
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": "Double it.", "input_output": data}))
    (found,) = load_problems(ProblemsConfig(source="apps", path=str(tmp_path / "set.jsonl")))
    assert check_code("```python\ndef f(x): return 2 * x\n```", found.tests, sandbox=sandbox).outcome == "correct"


@pytest.mark.parametrize(
    ("source", "row", "what"),
    [
        ("humaneval", {"prompt": "x"}, "no field 'entry_point'"),
        ("mbpp", {"text": "x", "test_list": 3}, ".*not iterable"),
        ("apps", {"question": "x", "input_output": "{"}, "Expecting"),
    ],
)
def test_a_row_of_another_set_is_named(tmp_path, source, row, what):
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"set.jsonl:1: (no row of {source}: .*)?{what}"):
        load_problems(ProblemsConfig(source=source, path=str(tmp_path / "set.jsonl")))


# ------------------------------------------------------------------------------------------------- the stage


def code_problem(name, tests):
    from dataclasses import replace

    return replace(problem(name, None), domain="code", tests=tests if isinstance(tests, str) else json.dumps(tests))


def program(code):
    return f"<think>\nLet me see.\n</think>\n```python\n{code}\n```"


def test_the_stage_runs_programs_and_keeps_the_order(sandbox, tmp_path, capsys):
    problems = [
        problem("a", "54"),
        code_problem("c", asserts("assert f(1) == 2")),
        code_problem("d", "{broken"),
    ]
    traces = [
        trace("c", 0, program("def f(x): return 2 * x")),
        trace("a", 0, "<think>\n1\n</think>\n\\boxed{54}"),
        trace("c", 1, program("def f(x): return x")),
        trace("c", 2, program("def f(x): return x + 1"), "length"),
        trace("c", 3, "<think>\n1\n</think>\nNo program."),
        trace("d", 0, program("def f(x): return x")),
    ]
    run_dir = write_run(tmp_path, problems, traces)
    counts = verify(make_config(workers=2), run_dir)
    found = [(v.outcome, v.reason, v.rejected_for) for v in read_records(run_dir.verdicts, Verdict)]
    assert found == [
        ("correct", "all tests pass", None),
        ("correct", "equal", None),
        ("incorrect", "assertion of test 1 failed", "incorrect"),
        ("undecided", "truncated", "truncated"),
        ("undecided", "no code block", "undecided"),
        ("undecided", "malformed tests: not JSON", "undecided"),
    ]
    assert (counts["kept"], counts["problems_with_a_kept_trace"]) == (2, 2)
    assert next(iter(read_records(run_dir.verdicts, Verdict))).method == f"asserts ({sandbox.tier})"


def test_programs_are_not_run_where_only_the_form_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdistill.verify.examine.Sandbox", None)
    run_dir = write_run(tmp_path, [code_problem("c", asserts("assert f(1) == 2"))], [trace("c", 0, program("x = 1"))])
    assert verify(make_config(answer=False), run_dir)["undecided"] == {"not run": 1}


def test_records_from_before_there_were_tests_are_read(tmp_path):
    import pyarrow.parquet as pq

    from jaxdistill.records import Problem

    run_dir = write_run(tmp_path, [problem("a", "54")], [])
    file = RunDir(run_dir.root).problems / "problems.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["tests"]), file)
    assert list(read_records(run_dir.problems, Problem)) == [problem("a", "54")]
    pq.write_table(pq.read_table(file).drop_columns(["prompt"]), file)
    with pytest.raises(ValueError, match="no column prompt"):
        list(read_records(run_dir.problems, Problem))


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux's own means")
def test_a_sandbox_of_its_own_for_one_call(sandbox):
    assert check_code("```python\nprint(1)\n```", stdio(("", "1"))).outcome == "correct"
