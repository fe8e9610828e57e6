"""The store of results: what was flushed outlives a kill, what other code found is not used."""

from __future__ import annotations

import pytest

from jaxdistill.verify.store import Store, hash_of_code, key_of

A, B, C = (key_of("kind", text) for text in "abc")


def test_results_are_there_when_it_is_opened_again(tmp_path):
    path = tmp_path / "cache" / "x.jsonl"
    with Store(path, "code") as store:
        store.put(A, {"x": "\ud800\n"})
        assert store.get(A) == {"x": "\ud800\n"} and not store.is_old(A)
        store.flush()
        store.put(B, [1])
        assert store.get(A) == {"x": "\ud800\n"}
    with Store(path, "code") as store:
        assert (store.get(A), store.get(B), store.get(C)) == ({"x": "\ud800\n"}, [1], None)
        assert store.is_old(A) and len(store) == 2
    with Store(path, "other code") as store:
        assert store.get(A) is None and len(store) == 0


@pytest.mark.parametrize("cut", range(1, 20))
def test_the_line_that_a_kill_cut_short_is_dropped(tmp_path, cut):
    path = tmp_path / "x.jsonl"
    with Store(path, "code") as store:
        store.put(A, 1)
        store.flush()
        store.put(B, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Store(path, "code") as store:
        assert (store.get(A), store.get(B)) == (1, None)
        store.put(B, 2)
    assert path.read_bytes() == whole


def test_a_line_that_is_no_result_is_passed_over(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(f"code\n{A} 1\nrubbish\n{B} [\n{C} 3\n")
    with Store(path, "code") as store:
        assert [store.get(key) for key in (A, B, C)] == [1, None, 3]


def test_a_key_tells_all_parts_apart():
    keys = [key_of(), key_of(""), key_of("", ""), key_of("ab"), key_of("a", "b"), key_of("a", "", "b"), key_of(None)]
    assert len(set(keys)) == len(keys)


def test_code_is_known_by_its_text():
    assert hash_of_code(["quality.py"]) == hash_of_code(["quality.py"]) != hash_of_code(["texts.py"])
    assert hash_of_code(["code"], ["lark"]) != hash_of_code(["code"])
