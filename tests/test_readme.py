"""README's snippets run as they stand: its Python is run, its commands, files, options, keys and names are there."""

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxdistill.arguments import HELP, parser
from jaxdistill.config import keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [
    "\n".join(line[4:] for line in block.rstrip().splitlines())
    for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", README, re.M)
]
INLINE = re.findall(r"`([^`\n]+)`", README)
"""Code in a line of text."""
LINES = [line for block in BLOCKS for line in block.splitlines()]
PLACES = {"CONFIG": "configs/quickstart.yaml", "RUN": "runs/quickstart", "FOLDER": "folder", "N": "2", "I": "0"}
SECTIONS = keys.known_keys([])


def without_comment(line: str) -> str:
    """A shell line up to what explains it: a comment, or text behind several spaces."""
    return re.split(r"\s{2,}|\s#\s", line.strip().removeprefix("$ "))[0]


def commands() -> list[str]:
    """Every call of ours, its alternatives (`a|b`) taken apart."""
    found = []
    for line in [*LINES, *INLINE]:
        call = without_comment(line)
        if not call.startswith("jaxdistill ") or call.split()[1].startswith("["):
            continue
        name, *rest = call.split(maxsplit=2)[1:]
        found += [f"{each} {' '.join(rest)}".strip() for each in name.split("|")]
    return [call for call in dict.fromkeys(found) if re.fullmatch(r"[a-z]+", call.split()[0])]


def is_python(block: str) -> bool:
    return bool(re.search(r"^(from \w[\w.]* import |import \w)", block, re.M))


PYTHON = [block for block in BLOCKS if is_python(block)]


def test_the_walk_finds_what_there_is():
    assert len(BLOCKS) > 8
    assert len(commands()) > 12
    assert PYTHON


# ------------------------------------------------------------------------------------------------------ its Python


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_runs_as_it_stands(block, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_python_in_a_shell_line_can_be_compiled():
    """Those that read what the quickstart makes; it takes minutes."""
    calls = [shlex.split(without_comment(line)) for line in LINES if line.startswith("python -c ")]
    assert calls
    for call in calls:
        assert compile(call[2], "README.md", "exec")
        for module in re.findall(r"import (\w+)", call[2]):
            assert importlib.util.find_spec(module), module


# -------------------------------------------------------------------------------------------------------- its shell


@pytest.mark.parametrize("call", commands())
def test_commands_can_be_parsed(call, capsys):
    words = []
    for word in shlex.split(re.sub(r"\[[^\]]*\]|\.\.\.", "", call)):
        stem = word.split(":")[0].split("=")[-1]
        words.append(word.replace(stem, PLACES[stem]) if stem in PLACES else word)
    if len(words) == 1:  # the name of a command in a sentence
        assert words[0] in HELP
        return
    if words[1].startswith("-"):
        words.insert(1, PLACES["CONFIG"])
    try:
        parsed = parser().parse_args(words)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    assert isinstance(parsed, argparse.Namespace)


def test_files_are_there():
    named = {
        word.rstrip(".,;:)")
        for text in [*BLOCKS, *INLINE]
        for word in re.findall(r"(?<![\w/.])(?:tools|configs|tests|jaxdistill)/[\w./-]+", text)
    }
    assert len(named) > 15
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_tools_have_the_options_that_they_are_called_with():
    calls = [
        without_comment(text) for text in [*LINES, *INLINE] if re.match(r"(\$ )?(python|bash) tools/", text.strip())
    ]
    assert len(calls) > 10
    for call in calls:
        file, *rest = call.split()[1:]
        source = (ROOT / file).read_text()
        for option in re.findall(r"--[a-z][\w-]*", " ".join(rest)):
            assert option in source, f"{file} has no {option}"


# --------------------------------------------------------------------------------------------------------- its keys


def dotted(name: str) -> bool:
    """Whether there is such a key; elements of lists are sections of their own."""
    parts = name.split(".")
    return parts[-1] in keys.known_keys(parts[:-1])


def test_keys_with_dots_are_there():
    named = {
        match
        for text in [*BLOCKS, *INLINE]
        for match in re.findall(rf"(?<![\w/.])(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+(?![\w/(])", text)
    }
    files = {"problems.jsonl", "train.jsonl", "export.hf"}
    assert len(named - files) > 15
    assert [name for name in sorted(named - files) if not dotted(name)] == []


def walk(value: object, path: list[str]) -> list[str]:
    """Keys of a mapping that no section has."""
    if not isinstance(value, dict) or not keys.known_keys(path):
        return []
    missing = [".".join([*path, name]) for name in value if name not in keys.known_keys(path)]
    return missing + [key for name, below in value.items() for key in walk(below, [*path, name])]


def mappings() -> list[dict]:
    found = []
    for text in [*BLOCKS, *INLINE]:
        if re.match(rf"(?:name|{'|'.join(SECTIONS)}): +\S", text):
            try:
                found.append(yaml.safe_load(text))
            except yaml.YAMLError:
                continue
    return [each for each in found if isinstance(each, dict)]


def test_sections_that_are_written_out_have_these_keys():
    found = mappings()
    assert len(found) > 3
    assert [key for each in found for key in walk(each, [])] == []
