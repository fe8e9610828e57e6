"""Imports point downwards: what DESIGN calls the layers, read from the syntax tree of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxdistill"

# a part may import parts of a lower rank, itself, and what EXCEPTIONS names
RANKS = {
    "config": 0,
    "records": 0,
    "hub": 0,
    "progress": 0,
    "layouts": 0,
    "precision": 0,
    "cluster": 1,
    "control": 0,
    "tokenization": 1,
    "served": 2,
    "demo": 1,
    "edits": 1,
    "losses": 1,
    "parallel": 1,
    "models": 2,
    "generate": 3,
    "traces": 4,
    "verify": 4,
    "data": 4,
    "train": 4,
    "export": 4,
    "evals": 4,
    "methods": 5,
    "plan": 5,
    "preflight": 5,
    "pipeline": 6,
    "arguments": 7,
    "cli": 8,
    "__main__": 9,
}
# stages meet through files on disk, except where one needs the very same code as another
EXCEPTIONS = [
    ("evals", "traces.engines"),
    ("evals", "traces.tables"),
    ("evals", "traces.code_sets"),
    ("evals", "traces.values"),
    ("evals", "verify"),
    ("verify", "traces.engines"),  # the judge is asked as the teacher is
    ("verify", "traces.values"),
    ("verify", "traces.tags"),  # what models put around their thinking, as data
    ("verify", "traces.tables"),  # benchmarks come in the files that problems come in
    ("train", "data"),
    ("train", "traces.engines"),  # on policy, the student is sampled and the teacher asked as where traces are made
    ("train", "traces.vllm_engine"),
    ("train", "traces.server_engine"),
    ("train", "export.hf"),  # vLLM reads the student's weights as they are exported
    ("train", "export.writer"),
    ("data", "traces.logprobs"),  # the file's own reader, which knows nothing of engines
    ("train", "verify.check_math"),  # held-out accuracy while training is what the verifier says of an answer
]
# pure functions of arrays: no I/O, no model, nothing else of ours but what is as pure and below
PURE = {
    "layouts": {"__future__", "jax"},
    "precision": {"__future__", "jax"},
    "losses": {"__future__", "collections", "dataclasses", "functools", "jax", "jaxtyping", "math", "numpy", "typing"},
}
# packages that one module alone may import
ALONE = {"vllm": "traces.vllm_worker", "ray": "cluster"}
# what `jaxdistill --help` must not wait for
HEAVY = ["jax", "flax", "optax", "torch", "transformers", "vllm", "ray", "matplotlib", "sympy"]


@dataclass(frozen=True)
class Import:
    """`importer` (dotted, below the package) imports `target` (below the package if `ours`)."""

    importer: str
    target: str
    ours: bool
    line: int


def imports_of(source: str, importer: str) -> Iterator[Import]:
    """Every import in a module, those inside functions and `TYPE_CHECKING` blocks too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from jaxdistill import hub` imports the module hub; `from jaxdistill.hub import fetch` a name in it
            base = absolute(node, importer)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            yield Import(importer, rest if top == "jaxdistill" else name, top == "jaxdistill", node.lineno)


def absolute(node: ast.ImportFrom, importer: str) -> str:
    if not node.level:
        return node.module or ""
    parts = ["jaxdistill", *importer.split(".")][: -node.level]
    return ".".join([*parts, node.module] if node.module else parts)


def fault_of(found: Import) -> str | None:
    """Why an import is not allowed; None if it is."""
    part, target = found.importer.split(".")[0], found.target.split(".")[0]
    where = f"jaxdistill/{found.importer.replace('.', '/')}:{found.line} imports {found.target}"
    if not found.ours:
        if target in ALONE and found.importer != ALONE[target]:
            return f"{where}: only {ALONE[target]} may."
        if part in PURE and target not in PURE[part]:
            return f"{where}: {part} is pure, and may import {', '.join(sorted(PURE[part]))}."
        return None
    if part == target:
        return None
    if part in PURE and target not in PURE:
        return f"{where}: {part} is pure, and imports nothing of ours that is not."
    if part not in RANKS or (target not in RANKS and target != "__version__"):
        return f"{where}: give both a rank in {Path(__file__).name}."
    allowed = (found.target == to or found.target.startswith(f"{to}.") for by, to in EXCEPTIONS if by == part)
    if target == "__version__" or RANKS[target] < RANKS[part] or any(allowed):
        return None
    return f"{where}: {target} is not below {part}."


def all_imports() -> list[Import]:
    found: list[Import] = []
    for file in sorted(PACKAGE.rglob("*.py")):
        found += imports_of(file.read_text(), ".".join(file.relative_to(PACKAGE).with_suffix("").parts))
    return found


def test_imports_point_downwards():
    found = all_imports()
    assert len({i.importer for i in found}) > 30, "the walk has lost most of the package"
    assert [fault for i in found if (fault := fault_of(i))] == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("losses.sequence", "from jaxdistill.models import Decoder"),
        ("losses.sequence", "from jaxdistill import records"),
        ("losses.sequence", "import pathlib"),
        ("layouts", "from jaxdistill.losses import shift"),
        ("layouts", "from jaxdistill import progress"),
        ("models.layers", "import jaxdistill.train.loop"),
        ("models.layers", "from jaxdistill.generate import decode"),
        ("models.layers", "from ..generate import decode"),
        ("records", "from jaxdistill import config"),
        ("hub", "def f():\n    from jaxdistill.tokenization import load_tokenizer"),
        ("data.packing", "from jaxdistill.traces import engines"),
        ("data.packing", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxdistill.train import loop"),
        ("export.stage", "from jaxdistill.evals import evaluate"),
        ("evals.evaluate", "from jaxdistill.traces import collect"),
        ("evals.evaluate", "from jaxdistill.traces import engines_of_others"),
        ("train.loop", "from jaxdistill import pipeline"),
        ("pipeline", "from . import cli"),
        ("traces.engines", "from vllm import LLM"),
        ("evals.evaluate", "import vllm.entrypoints"),
        ("traces.ray_engine", "def f():\n    import ray"),
        ("traces.engines", "from jaxdistill.newcomer import x"),
        ("__init__", "from jaxdistill import config"),
    ],
)
def test_a_bad_import_is_caught(importer: str, source: str):
    assert [fault_of(i) for i in imports_of(source, importer) if fault_of(i)]


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("losses.__init__", "from .sequence import cross_entropy"),
        ("losses.sequence", "import jax.numpy as jnp\nfrom jaxtyping import Array, Float"),
        ("losses.products", "from jaxdistill.layouts import rows_first"),
        ("models.decoder", "from jaxdistill.parallel import constrain\nfrom . import layers"),
        ("evals.evaluate", "from jaxdistill.traces.engines import generate\nfrom jaxdistill import verify, hub"),
        ("train.loop", "from jaxdistill.data.rows import Rows"),
        ("traces.vllm_worker", "def f():\n    import vllm"),
        ("export.card", "from jaxdistill import __version__"),
        ("cli", "from jaxdistill import pipeline"),
    ],
)
def test_a_good_import_is_left_alone(importer: str, source: str):
    found = list(imports_of(source, importer))
    assert found
    assert [fault_of(i) for i in found if fault_of(i)] == []


def test_the_command_line_starts_without_heavy_imports():
    code = f"import sys, jaxdistill.cli, jaxdistill.pipeline; print([m for m in {HEAVY} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr
