"""The journal of finished samples: what was written stays, whatever ends the process."""

import json
import signal
import subprocess
import sys

import pytest

from jaxdistill.traces.engines import Completion
from jaxdistill.traces.journal import Journal

HEADER = {"traces.temperature": 0.7, "the problems": "abc"}


def completion(number):
    return Completion(id=f"p{number}/plain/0", output_ids=[number, 2], finish_reason="stop")


def write(path, numbers):
    with Journal(path, HEADER) as journal:
        for number in numbers:
            journal.add(completion(number))


def read(path):
    with Journal(path, HEADER) as journal:
        return journal.done


def test_what_was_added_is_there_when_opened_again(tmp_path):
    write(tmp_path / "deep" / "journal.jsonl", range(3))
    write(tmp_path / "deep" / "journal.jsonl", range(3, 5))
    assert list(read(tmp_path / "deep" / "journal.jsonl").values()) == [completion(n) for n in range(5)]


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path):
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
        Journal(path, HEADER | {"traces.temperature": 1.0})
    assert "the problems" not in str(error.value)
    assert f"remove {tmp_path}" in str(error.value)
    with pytest.raises(ValueError, match=r"the problems changed\. Set them back"):
        Journal(path, HEADER | {"the problems": "xyz"})
    assert path.read_bytes() == before


def test_one_writer_at_a_time(tmp_path):
    with Journal(tmp_path / "journal.jsonl", HEADER), pytest.raises(ValueError, match="another process"):
        Journal(tmp_path / "journal.jsonl", HEADER)
    assert read(tmp_path / "journal.jsonl") == {}


def test_kill_9_loses_nothing_that_was_added(tmp_path):
    path = tmp_path / "journal.jsonl"
    script = (
        "import json, os, pathlib, signal, sys\n"
        "from jaxdistill.traces.engines import Completion\n"
        "from jaxdistill.traces.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        "for n in range(500):\n"
        "    journal.add(Completion(id=f'p{n}/plain/0', output_ids=[n, 2], finish_reason='stop'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, path, json.dumps(HEADER)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(read(path).values()) == [completion(n) for n in range(500)]
