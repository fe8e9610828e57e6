"""Sets of the hub by name: which files are read, of which commit, and what is said where they cannot be had."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdistill import config as configs
from jaxdistill import pipeline
from jaxdistill.config import ProblemsConfig
from jaxdistill.evals import report
from jaxdistill.records import Problem, RunDir, Trace, read_manifest, read_records
from jaxdistill.traces import hub_files
from jaxdistill.traces.problems import load_problems
from tests.traces.brought import make_config
from tests.traces.fake_hub import COMMIT, LATER, FakeHub, cached

SET = "hf://datasets/owner/name"


def parquet(*questions):
    out = io.BytesIO()
    rows = [{"problem": q, "generations": [f"<think>\nof {q}\n</think>\n4"], "answer": "4"} for q in questions]
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def section(path=SET, **options):
    return ProblemsConfig(source="r1", path=path, **options)


def questions(**options):
    return [p.prompt for p in load_problems(section(**options))]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    found = FakeHub()
    found.use(monkeypatch, tmp_path / "cache")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield found
    found.close()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A machine without a network: nobody listens where the hub would be."""
    found = FakeHub()
    found.use(monkeypatch, tmp_path / "cache")
    found.close()
    return tmp_path / "cache"


TWO = {"data/train-00000-of-00002.parquet": parquet("a", "b"), "data/train-00001-of-00002.parquet": parquet("c")}


def test_the_cache_is_read_without_a_network(offline):
    cached(offline, "owner/name", TWO | {"README.md": b"# A set\n", ".gitattributes": b"x"})
    found = load_problems(section())
    assert [p.prompt for p in found] == ["a", "b", "c"]
    assert [p.id for p in found] == [f"data/train-0000{n}-of-00002:{i}" for n, i in ((0, 1), (0, 2), (1, 1))]
    assert found[2].source == f"owner/name@{COMMIT[:12]}/data/train-00001-of-00002.parquet:1"
    for same in ("hf://owner/name", "https://huggingface.co/datasets/owner/name", f"{SET}@main", f"{SET}@{COMMIT}"):
        assert questions(path=same) == ["a", "b", "c"]
    assert questions(path=f"{SET}/data/train-00001*") == ["c"]
    assert questions(path=f"{SET}/**/*1-of-00002.parquet") == ["c"]
    assert questions(path=f"{SET}/data") == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"no file x.csv; it has data/train-00000-of-00002.parquet, data/train-00001"):
        load_problems(section(f"{SET}/x.csv"))


def test_what_the_cache_does_not_hold(offline):
    with pytest.raises(ValueError, match=r"owner/name: the hub cannot be reached .*, and the cache does not have it"):
        load_problems(section())
    cached(offline, "owner/name", dict(list(TWO.items())[:1]))
    with pytest.raises(ValueError, match=r"data/train-00001-of-00002.parquet is missing, 1 of 2 are there"):
        load_problems(section())
    with pytest.raises(ValueError, match="owner/name at revision v2: the hub cannot be reached"):
        load_problems(section(revision="v2"))


def test_files_are_fetched_when_their_rows_are_wanted(hub):
    hub.repos["owner/name"] = {"main": (COMMIT, TWO)}
    assert questions(count=2) == ["a", "b"]
    assert not any("00001-of" in path for _, path in hub.asked)
    assert questions() == ["a", "b", "c"]
    before = len(hub.asked)
    assert questions(revision="main") == ["a", "b", "c"]
    assert len(hub.asked) == before + 1  # which commit `main` is; all else is in the cache


def test_a_run_goes_on_with_the_commit_that_it_began_with(tmp_path, hub):
    hub.repos["owner/name"] = {"main": (COMMIT, TWO)}
    config, run = make_config(tmp_path / "run", "r1", SET, split="train"), RunDir(tmp_path / "run")
    pipeline._run_stages(("problems",), config)
    counts = read_manifest(run.problems)["counts"]["hub"]
    assert counts["commit"] == COMMIT
    assert counts["files"] == list(TWO)
    assert (counts["repo"], counts["config"], counts["split"]) == ("owner/name", None, "train")
    moved = {"data/train-00000-of-00001.parquet": parquet("z", "y", "x")}
    hub.repos["owner/name"] = {"main": (LATER, moved), COMMIT: (COMMIT, TWO)}
    pipeline.run_command("generate", config)
    assert [t.thinking for t in read_records(run.traces, Trace)] == ["of a", "of b", "of c"]
    assert f"owner/name @ {COMMIT}" in report.render(config, run)
    assert "data/train-00001-of-00002.parquet:1" not in report.render(config, run)
    pipeline.redo("problems", config)
    pipeline.run_command("generate", config)
    assert [p.prompt for p in read_records(run.problems, Problem)] == ["z", "y", "x"]
    assert read_manifest(run.problems)["counts"]["hub"]["commit"] == LATER


def test_another_set_in_the_config_is_not_read_at_the_old_commit(tmp_path, hub):
    hub.repos["owner/name"] = {"main": (COMMIT, TWO), "v2": (LATER, {"b.jsonl.gz": gzip.compress(ROW)})}
    from jaxdistill.traces.problems import problems

    problems(make_config(tmp_path / "run", "r1", SET), RunDir(tmp_path / "run"))
    counts = problems(make_config(tmp_path / "run", "r1", SET, revision="v2"), RunDir(tmp_path / "run"))
    assert (counts["problems"], counts["hub"]["commit"]) == (1, LATER)
    (tmp_path / "a.jsonl").write_bytes(ROW)
    assert "hub" not in problems(make_config(tmp_path / "run", "r1", tmp_path / "a.jsonl"), RunDir(tmp_path / "run"))


def test_a_held_out_set_is_pinned_too(tmp_path, hub):
    from jaxdistill.traces.problems import problems

    test = {"test.parquet": parquet("a", "z")}
    hub.repos |= {"owner/name": {"main": (COMMIT, TWO)}, "owner/test": {"main": (LATER, test)}}
    data = configs.to_dict(make_config(tmp_path / "run", "r1", SET))
    data["evaluate"] = {"problems": {"source": "r1", "path": "hf://datasets/owner/test"}}
    for _ in range(2):
        counts = problems(configs.build(data), RunDir(tmp_path / "run"))
        assert (counts["problems"], counts["heldout"], counts["in_heldout"]) == (2, 2, 1)
        assert (counts["hub"]["commit"], counts["heldout_hub"]["commit"]) == (COMMIT, LATER)
        hub.repos["owner/test"] = {"main": (COMMIT, {}), LATER: (LATER, test)}


ROW = json.dumps({"problem": "j", "generations": ["4"]}).encode()


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (None, "owner/name: no such data set on the hub, or a private one; check the name, or set HF_TOKEN"),
        ((401, "RepoNotFound"), "owner/name: no such data set on the hub, or a private one"),
        (
            (403, "GatedRepo"),
            r"a gated data set; ask for access at https://huggingface.co/datasets/owner/name, and set",
        ),
        ((403, ""), "owner/name: the hub refuses it"),
        ((503, ""), "the hub cannot be reached"),
    ],
)
def test_refusals_say_what_to_do(hub, refusal, message):
    if refusal:
        hub.refused["owner/name"] = refusal
    with pytest.raises(ValueError, match=message) as error:
        load_problems(section())
    assert "\n" not in str(error.value)


def test_a_token_comes_from_the_environment_alone(hub, monkeypatch):
    hub.repos["owner/name"] = {"main": (COMMIT, TWO)}
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    questions()
    assert "Bearer hf_of_the_test" in hub.tokens


def test_revisions_and_names_that_are_none(hub):
    hub.repos["owner/name"] = {"main": (COMMIT, TWO)}
    with pytest.raises(ValueError, match=r"owner/name: no revision 'v9'; name a commit, branch or tag"):
        load_problems(section(revision="v9"))
    with pytest.raises(ValueError, match=r"it names another revision than problems.revision=v1"):
        load_problems(section(f"{SET}@v2", revision="v1"))
    for path in ("hf://datasets/name", "hf://", "hf://models/owner/name"):
        with pytest.raises(ValueError, match="no data set of the hub; write hf://datasets/OWNER/NAME"):
            load_problems(section(path))
    with pytest.raises(ValueError, match="no name of a data set of the hub"):
        load_problems(section("hf://datasets/owner/a--b"))


def test_the_config_says_how_a_set_is_named():
    with pytest.raises(ValueError, match=r"name a set of the hub in path: hf://datasets/OWNER/NAME"):
        configs.build(_data({"source": "hub", "path": "owner/name"}))
    with pytest.raises(ValueError, match=r"revision is for a set of the hub \(path: hf://datasets/OWNER/NAME\)"):
        configs.build(_data({"source": "r1", "path": "owner/name", "revision": "main"}))


def test_a_copy_of_a_hub_set_in_a_folder(tmp_path):
    for name, data in TWO.items() | {("data/test-00000-of-00001.parquet", parquet("t"))}:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    path = str(tmp_path / "set")
    assert questions(path=path, split="train") == ["a", "b", "c"]
    assert questions(path=path, split="test") == ["t"]
    with pytest.raises(ValueError, match=r"it has the splits test, train; name one with problems\.split"):
        load_problems(section(path))
    (tmp_path / "empty" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match="no data in it"):
        load_problems(section(str(tmp_path / "empty")))


def _data(problems):
    return configs.to_dict(make_config("run", "r1", "x.jsonl")) | {"problems": problems}


README = b"""---
configs:
- config_name: all
  data_files:
  - split: train
    path: ["all/a-*.parquet", "all/b.parquet"]
  - split: extra
    path: more/*
- config_name: small
  data_files: small/*.jsonl
- config_name: folder
  data_dir: sub
license: mit
---
# A set
"""
NAMES = ["README.md", "all/a-1.parquet", "all/a-2.parquet", "all/b.parquet", "all/c.parquet", "more/x.parquet"]
NAMES += ["small/s.jsonl", "small/notes.md", "sub/train.csv", "sub/test.csv", "other.py"]


def chosen(names, readme="", config=None, split=None):
    found = hub_files.choose(names, readme, config, split, "owner/name")
    return found.config, found.split, list(found.files)


def test_configurations_that_the_card_names():
    card = README.decode()
    files = ["all/a-1.parquet", "all/a-2.parquet", "all/b.parquet"]
    assert chosen(NAMES, card, "all", "train") == ("all", "train", files)
    assert chosen(NAMES, card, "all", "extra") == ("all", "extra", ["more/x.parquet"])
    assert chosen(NAMES, card, "small") == ("small", "train", ["small/s.jsonl"])
    assert chosen(NAMES, card, "folder", "test") == ("folder", "test", ["sub/test.csv"])
    with_default = card.replace("config_name: small\n", "config_name: small\n  default: true\n")
    assert chosen(NAMES, with_default) == ("small", "train", ["small/s.jsonl"])
    for config, split, message in (
        (None, None, "it has the configurations all, small, folder; name one with problems.config"),
        ("large", None, "no configuration 'large'; it has all, small, folder"),
        ("all", None, "it has the splits train, extra; name one with problems.split"),
        ("all", "test", "no split 'test'; it has train, extra"),
        ("all", "train[:100]", r"no split 'train\[:100\]'; it has train, extra; for a part of one set count"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(NAMES, card, config, split)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data/train-00000-of-00001-abc.parquet", "x.csv"], {"train": ["data/train-00000-of-00001-abc.parquet"]}),
        (["data/sft-00000-of-00001.parquet"], {"sft": ["data/sft-00000-of-00001.parquet"]}),
        (["a.jsonl", "b.jsonl"], {"train": ["a.jsonl", "b.jsonl"]}),
        (["my_train.json", "my_test.json"], {"train": ["my_train.json"], "test": ["my_test.json"]}),
        (["train/1.csv", "dev/1.csv"], {"validation": ["dev/1.csv"], "train": ["train/1.csv"]}),
        (["contest.jsonl", "retrained.jsonl"], {"train": ["contest.jsonl", "retrained.jsonl"]}),
        (["a.jsonl.gz", "dataset_infos.json", "README.md", ".x/train.json", "__s/test.csv"], {"train": ["a.jsonl.gz"]}),
    ],
)
def test_splits_that_names_tell(names, expected):
    for split, files in expected.items():
        assert chosen(names, split=split)[1:] == (split, files)
    with pytest.raises(ValueError, match=f"no split 'none'; it has {', '.join(sorted(expected))}|no split 'none'"):
        chosen(names, split="none")


def test_the_hubs_own_parquet_has_configurations_too():
    names = [
        "main/train/0000.parquet",
        "main/train/0001.parquet",
        "main/test/0000.parquet",
        "socratic/train/0000.parquet",
    ]
    assert chosen(names, config="main", split="train")[2] == names[:2]
    with pytest.raises(ValueError, match="it has the configurations main, socratic"):
        chosen(names)


def test_sets_that_are_not_files():
    with pytest.raises(
        ValueError, match=r"its data comes from a script, which is not run; try problems.revision: refs/"
    ):
        chosen(["name.py", "README.md"])
    with pytest.raises(ValueError, match=r"no data in it; expected files that end in .*, and it has README.md, a.tar"):
        chosen(["README.md", "a.tar"])
    with pytest.raises(ValueError, match=r"several kinds \(.jsonl, .parquet\); name those to read in path"):
        chosen(["a.jsonl", "b.parquet"])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.csv", ["a.csv"]),
        ("**/*.csv", ["a.csv", "d/b.csv", "d/e/c.csv"]),
        ("**", ["a.csv", "d/b.csv", "d/e/c.csv"]),
        ("d/*", ["d/b.csv"]),
        ("d", ["d/b.csv", "d/e/c.csv"]),
        ("./d/e/?.csv", ["d/e/c.csv"]),
        ("[ab].csv", ["a.csv"]),
        ("[!a].csv", []),
        ("a+csv", []),
    ],
)
def test_patterns(pattern, expected):
    assert hub_files.matching(["a.csv", "d/b.csv", "d/e/c.csv", "d/x.md"], [pattern]) == expected
