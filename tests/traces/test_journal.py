"""The journal of finished samples: what was written stays, whatever ends the process."""

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxdistill.traces.engines import Completion
from jaxdistill.traces.journal import LOGPROBS, Journal
from jaxdistill.traces.logprobs import TopLogprobs

HEADER = {"traces.temperature": 0.7, "the problems": "abc"}


def completion(number):
    return Completion(id=f"p{number}/plain/0", output_ids=[number, 2], finish_reason="stop")


SIZE = 600


def number_of(name):
    number = int(name.split("/")[0][1:])
    return number if number < SIZE else None


def open_journal(path, header=HEADER, **options):
    return Journal(path, header, size=SIZE, number_of=number_of, **options)


def write(path, numbers, **options):
    with open_journal(path, **options) as journal:
        return [journal.add(n if isinstance(n, Completion) else completion(n)) for n in numbers]


def read(path, **options):
    with open_journal(path, **options) as journal:
        assert len(journal) == SIZE - len(journal.missing())
        return {n: journal.read(n) for n in range(SIZE) if journal.has(n)}


def test_what_was_added_is_there_when_opened_again(tmp_path):
    write(tmp_path / "deep" / "journal.jsonl", range(3))
    write(tmp_path / "deep" / "journal.jsonl", range(3, 5))
    assert list(read(tmp_path / "deep" / "journal.jsonl").values()) == [completion(n) for n in range(5)]


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "_sync", lambda self: None)  # hundreds of waits for the disk
    path = tmp_path / "journal.jsonl"
    write(path, range(3))
    whole = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        complete = max(0, sum(end <= cut for end in ends) - 1)  # less the header
        assert len(read(path)) == complete
        write(path, range(3))
        assert list(read(path).values()) == [completion(n) for n in range(3)]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, range(3))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1] + lines[2][:5] + "\n" + lines[3])
    with pytest.raises(ValueError, match=r"journal\.jsonl:3: broken line"):
        read(path)


def test_another_header_is_refused_with_what_changed(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, range(2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other settings: traces\.temperature was 0\.7, is 1\.0") as error:
        open_journal(path, HEADER | {"traces.temperature": 1.0})
    assert "the problems" not in str(error.value)
    assert f"remove {tmp_path}" in str(error.value)
    with pytest.raises(ValueError, match=r"the problems changed\. Set them back"):
        open_journal(path, HEADER | {"the problems": "xyz"})
    assert path.read_bytes() == before


def test_one_writer_at_a_time(tmp_path):
    with open_journal(tmp_path / "journal.jsonl"), pytest.raises(ValueError, match="another process"):
        open_journal(tmp_path / "journal.jsonl")
    assert read(tmp_path / "journal.jsonl") == {}


def test_kill_9_loses_nothing_that_was_added(tmp_path):
    path = tmp_path / "journal.jsonl"
    script = (
        "import json, os, pathlib, signal, sys\n"
        "from jaxdistill.traces.engines import Completion\n"
        "from jaxdistill.traces.journal import Journal\n"
        "number_of = lambda name: int(name.split('/')[0][1:])\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), size=600, number_of=number_of)\n"
        "for n in range(500):\n"
        "    journal.add(Completion(id=f'p{n}/plain/0', output_ids=[n, 2], finish_reason='stop'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, path, json.dumps(HEADER)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(read(path).values()) == [completion(n) for n in range(500)]


# ---------------------------------------------------------------------------------------- failures and logprobs


def failure(number, error="lost"):
    return Completion(id=f"p{number}/plain/0", output_ids=[], finish_reason="error", error=error)


def test_the_first_of_two_counts(tmp_path):
    path = tmp_path / "journal.jsonl"
    other = dataclasses.replace(completion(1), output_ids=[9, 9])
    assert write(path, [1, other]) == [True, False]
    assert read(path) == {1: completion(1)}


def test_a_failure_counts_until_it_is_to_be_drawn_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, [failure(0), 1, failure(2)])
    assert list(read(path)) == [0, 1, 2]
    assert list(read(path, retry_failed=True)) == [1]
    assert write(path, [completion(0), failure(2, "lost again")], retry_failed=True) == [True, True]
    assert list(read(path).values()) == [completion(0), completion(1), failure(2)]
    assert list(read(path, retry_failed=True)) == [0, 1]


def test_a_sample_that_is_no_longer_wanted_is_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, [0])
    with open(path, "a") as file:
        file.write(json.dumps({"id": "p700/plain/0", "output_ids": [1], "finish_reason": "stop"}) + "\n")
    assert list(read(path)) == [0]


def with_logprobs(number, tokens=3, k=2):
    values = np.full((tokens, k), -number, np.float32)
    found = TopLogprobs(np.arange(tokens * k, dtype=np.int32).reshape(tokens, k), values, values[:, 0])
    return dataclasses.replace(completion(number), logprobs=found)


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "logprobs", "sampled"))


def test_logprobs_come_back_and_a_torn_tail_of_theirs_is_cut_off(tmp_path):
    path, binary = tmp_path / "journal.jsonl", tmp_path / LOGPROBS
    write(path, [with_logprobs(1), completion(2), with_logprobs(3, tokens=5)])
    whole = binary.read_bytes()
    assert len(whole) == 8 * (3 + 5) * 2 + 4 * (3 + 5)
    binary.write_bytes(whole + b"of a sample that was killed")
    found = read(path)
    assert binary.read_bytes() == whole
    assert found[2].logprobs is None
    assert same(found[1].logprobs, with_logprobs(1).logprobs)
    assert same(found[3].logprobs, with_logprobs(3, tokens=5).logprobs)


def test_a_sample_whose_logprobs_a_power_cut_took_is_drawn_again(tmp_path):
    path, binary = tmp_path / "journal.jsonl", tmp_path / LOGPROBS
    write(path, [with_logprobs(1), with_logprobs(3)])
    binary.write_bytes(binary.read_bytes()[:-1])
    assert list(read(path)) == [1]
    write(path, [with_logprobs(3)])
    assert same(read(path)[3].logprobs, with_logprobs(3).logprobs)


def test_without_logprobs_there_is_no_file_of_them(tmp_path):
    write(tmp_path / "journal.jsonl", range(3))
    assert [file.name for file in tmp_path.iterdir()] == ["journal.jsonl"]
