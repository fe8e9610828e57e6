"""IFEval's checks, each by a response that follows the instruction and one that does not."""

import pytest

from jaxdistill.evals.instructions import CHECKS, follows

CASES = [
    ("punctuation:no_comma", {}, "no comma", "one, two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a *** *** b"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
     "So it is.\n\nWeekend, at last", "Weekend\n\nSo it is."),
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "Cat and dog", "cat and bird"),
    ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "at least"}, "so and so", "so"),
    ("keywords:frequency", {"keyword": "so", "frequency": 2, "relation": "less than"}, "so", "so and so"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a Cat."),
    ("keywords:letter_frequency", {"letter": "x", "let_frequency": 2, "let_relation": "at least"}, "Xx", "x"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b c*", "*a* and **"),
    ("detectable_format:multiple_sections", {"section_spliter": "PART", "num_sections": 2}, "PART 1\na\nPART 2\nb",
     "PART 1\na\nPART\nb"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<My day>>\ntext", "<< >>\n<My day>"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "My answer is perhaps."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name] at (place)"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Text.\nP.S. more", "Text.\nPS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Text.\nP.P.S more", "Text.\nP.S. more"),
    ("startend:end_checker", {"end_phrase": "That is all"}, 'Good. "That is all"', "That is all, folks"),
    ("startend:quotation", {}, ' "quoted" ', '"half'),
    ("combination:two_responses", {}, "one******two", "one******one"),
    ("combination:two_responses", {}, "one******two******", "one******two******three"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say this"}, "say this, then that", "then say this"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "good", "bad"), CASES)
def test_each_way_round(name, given, good, bad):
    assert follows(good, [(name, given)]) == []
    assert follows(bad, [(name, given)]) == [name]


def test_all_checks_have_a_case():
    assert {name for name, *_ in CASES} == set(CHECKS)


def test_thinking_is_not_looked_at_and_all_instructions_count():
    both = [("punctuation:no_comma", {}), ("startend:quotation", {})]
    assert follows('<think>\na, b\n</think>\n"done"', both) == []
    assert follows("a, b", both) == ["punctuation:no_comma", "startend:quotation"]
    assert follows("<think>\nonly\n</think>\n", both) == ["punctuation:no_comma", "startend:quotation"]
