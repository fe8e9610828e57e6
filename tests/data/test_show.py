"""`show`: what is graded, as a person sees it."""

import re

import pytest
from rich.console import Console

from jaxdistill import cli, progress
from jaxdistill.data.examples import ANSWER, PROMPT, THINKING
from jaxdistill.data.show import draw_segment, regions_of, style_of
from jaxdistill.hub import demo_teacher
from jaxdistill.tokenization import load_tokenizer
from tests.helpers import prepared_run

GREY, CYAN, GREEN, DIM = "38;5;244", "36", "1;32", "2;36"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return prepared_run(tmp_path_factory.mktemp("shown"), data={"row_tokens": 250})


def shown(monkeypatch, config, *arguments, **console):
    made = Console(highlight=False, soft_wrap=True, width=100, record=True, **console)
    monkeypatch.setattr(progress, "console", made)
    code = cli.main(["show", str(config), *arguments])
    return code, made.export_text(styles=console.get("force_terminal", False))


def test_colours_are_the_loss_weights(monkeypatch, config):
    code, text = shown(
        monkeypatch, config, "--set", "train.thinking_weight=0.5", force_terminal=True, color_system="256"
    )
    assert code == 0
    assert re.search(rf"\x1b\[{GREY}m<\|im_start\|>user", text)
    assert re.search(rf"\x1b\[{DIM}m<think>", text)
    assert re.search(rf"\x1b\[{GREEN}mThe answer is .*<\|im_end\|>", text)
    assert "thinking (weight 0.5)" in text
    _, text = shown(monkeypatch, config, "--set", "train.answer_weight=0", force_terminal=True, color_system="256")
    assert re.search(rf"\x1b\[{CYAN}m<think>", text)
    assert re.search(rf"\x1b\[{GREY}mThe answer is", text)
    assert "answer (not trained)" in text


@pytest.mark.parametrize("console", [{"color_system": None}, {"force_terminal": True, "no_color": True}])
def test_without_colours_every_line_has_a_mark(monkeypatch, config, console):
    _, text = shown(monkeypatch, config, "--row", "1", **console)
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    body = [line for line in text.splitlines() if line.strip() and not line.startswith(("---", "no mark", "row"))]
    answers = [line for line in body if "The answer is" in line]
    assert len(answers) >= 2  # several segments
    assert all(" = " in line for line in answers)
    assert all(" ~ " in line for line in body if "<think>" in line)
    assert not any("~" in line or "= " in line[:30] for line in body if "<|im_start|>" in line)
    assert text.count("--- segment") == len(answers)


def test_marks_follow_lines_that_are_folded(monkeypatch):
    monkeypatch.setattr(progress, "console", Console(width=60, record=True, color_system=None))
    tokenizer = load_tokenizer(str(demo_teacher()))
    ids = tokenizer.encode(" word" * 60, add_special_tokens=False)
    progress.console.print(draw_segment(tokenizer, ids, [THINKING] * len(ids), (0.0, 1.0, 1.0)))
    lines = [line for line in progress.console.export_text().splitlines() if "word" in line]
    assert len(lines) > 5
    assert all(" ~ " in line for line in lines)


def test_a_row_that_is_not_there_is_one_line(monkeypatch, config, capsys):
    assert cli.main(["show", str(config), "--row", "-1"]) == 1
    assert re.fullmatch(r"jaxdistill show: --row -1: there are rows 0 to \d+\.\n", capsys.readouterr().err)


def test_stretches_of_regions_and_styles():
    assert list(regions_of([5, 6, 7, 8], [0, 0, 1, 2])) == [(0, [5, 6]), (1, [7]), (2, [8])]
    assert style_of(PROMPT, (0, 1, 1)) == style_of(THINKING, (0, 0, 1)) == "grey50"
    assert style_of(ANSWER, (0, 2, 1)) == "bold green dim"
