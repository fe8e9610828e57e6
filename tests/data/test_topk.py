"""Stored distributions: what they cost, what rounding takes from them, and which token each of them stands beside."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxdistill.config import build
from jaxdistill.data import topk
from jaxdistill.data.packing import unpack
from jaxdistill.data.prepare import prepare
from jaxdistill.data.rows import Batches
from jaxdistill.data.teacher import align, check
from jaxdistill.data.topk import TopK, codes_of, encode, log_probabilities
from jaxdistill.hub import demo_teacher
from jaxdistill.records import Trace, read_records, write_records
from jaxdistill.tokenization import TokenMap, encode_response, load_tokenizer
from jaxdistill.traces.logprobs import FILE, FOLDER, Origin, TopLogprobs, write_logprobs
from tests.data.made import config_of, thought, write_run
from tests.helpers import TINY

QWEN = 151_936


@pytest.mark.parametrize(("k", "width"), [(8, 36), (16, 70), (32, 138), (64, 274)])
def test_bytes_a_token(k, width):
    assert TopK(k, QWEN).width == width
    assert TopK(k, QWEN).pack(*np.zeros((2, 3, k), np.int32), np.zeros(3, np.int32)).shape == (3, width)


@pytest.mark.parametrize("vocabulary", [1, 2, 37, 256, 257, QWEN, 1 << 20])
def test_what_is_packed_comes_back(vocabulary):
    rng = np.random.default_rng(0)
    k = min(5, vocabulary)
    ids = rng.integers(0, vocabulary, (40, k)).astype(np.int32)
    ids[0] = vocabulary - 1
    codes, tail = rng.integers(0, 1 << 16, (40, k)).astype(np.uint16), rng.integers(0, 1 << 16, 40).astype(np.uint16)
    found = TopK(k, vocabulary).unpack(TopK(k, vocabulary).pack(ids, codes, tail))
    for name, array in zip(topk.FIELDS, (ids, codes, tail), strict=True):
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def stored(log_q: np.ndarray, k: int, drawn: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distributions [T, V] through the codec: (ids, log-probabilities, mass of the tail)."""
    order = np.argsort(-log_q, 1)
    drawn = order[:, 0] if drawn is None else drawn
    own = np.take_along_axis(log_q, drawn[:, None], 1)[:, 0]
    codec = TopK(k, log_q.shape[1])
    found = codec.unpack(encode(order, np.take_along_axis(log_q, order, 1), drawn, own, codec))
    return found["topk_ids"], *log_probabilities(found["topk_codes"], found["topk_tail"])


def buckets(log_q: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities [T, k + 1] of the tokens `ids` and of all others."""
    named = np.take_along_axis(log_q, ids, 1)
    with np.errstate(divide="ignore"):
        return np.concatenate([named, np.log(np.maximum(1 - np.exp(named).sum(1, keepdims=True), 0))], 1)


def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(a), 0, np.exp(a) * (a - b)).sum(1)


@pytest.mark.parametrize("k", [1, 8, 32])
def test_rounding_costs_no_more_than_the_codec_says(k):
    rng = np.random.default_rng(k)
    sharpness = np.repeat([0.1, 1.0, 4.0, 12.0], 100)[:, None]
    logits = rng.normal(0, 1, (400, 60)) * sharpness
    # the worst there is: every logprob half a step from a code, in either direction
    logits[:50] = np.rint(logits[:50] / topk.STEP) * topk.STEP + topk.STEP * rng.choice([-0.499, 0.499], (50, 60))
    log_q = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    ids, logprobs, tail = stored(log_q, k)
    with np.errstate(divide="ignore"):
        found = np.concatenate([logprobs, np.log(tail)[:, None]], 1).astype(np.float64)
    want = buckets(log_q, ids)
    lost = kl(want, found)
    assert lost.max() < 2**-25 + 3e-7  # and what fp32 adds
    np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=2e-6)
    student = rng.normal(0, 2, want.shape)
    student -= np.logaddexp.reduce(student, 1, keepdims=True)
    D = kl(want, student)
    assert D.max() > 3
    assert (np.abs(kl(found, student) - D) <= (D + np.sqrt(2 * D)) / 2000 + 1e-6).all()


def test_the_drawn_token_is_always_there_and_the_tail_is_the_mass_of_all_others():
    log_q = np.log(np.tile([0.5, 0.3, 0.1, 0.06, 0.04], (5, 1)))
    ids, logprobs, tail = stored(log_q, 2, drawn=np.arange(5))
    assert ids.tolist() == [[0, 1], [0, 1], [0, 2], [0, 3], [0, 4]]
    np.testing.assert_allclose(np.exp(logprobs[:, 1]), [0.3, 0.3, 0.1, 0.06, 0.04], rtol=1e-3)
    np.testing.assert_allclose(tail, [0.2, 0.2, 0.4, 0.44, 0.46], rtol=1e-3)


def test_all_tokens_stored_leave_no_tail_and_zeros_are_no_distribution():
    log_q = np.log(np.full((1, 4), 0.25))
    assert stored(log_q, 4)[2] == 0
    logprobs, tail = log_probabilities(np.zeros((2, 3), np.uint16), np.zeros(2, np.uint16))
    assert np.isneginf(logprobs).all() and (tail == 0).all()


def test_codes_reach_from_certainty_to_what_is_no_more():
    assert codes_of(np.array([0.0, -topk.STEP, -31.99, -1e9, -np.inf])).tolist() == [1, 2, 65517, 65535, 0]


def test_more_tokens_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"data\.topk=6, of a vocabulary of 5 tokens"):
        TopK(6, 5)


# ---------------------------------------------------------------------------------------- which belongs to which


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


TEXT = "<think>\n Ann=7\n Ann=7\n Ann=7\n</think>\nThe answer is \\boxed{7}."


def test_a_response_that_is_cut_as_its_text_lines_up_token_by_token(tokenizer):
    ids = encode_response(tokenizer, TEXT)
    assert align(tokenizer, ids, ids).tolist() == list(range(len(ids)))


def test_another_beginning_moves_nothing_else(tokenizer):
    ids = encode_response(tokenizer, TEXT)
    teacher = encode_response(tokenizer, TEXT.removeprefix("<think>\n"))
    found = align(tokenizer, ids, teacher)
    matched = found >= 0
    assert matched.sum() >= len(teacher) - 2
    # from the end on they are the same tokens, although the lines in between repeat
    assert found[matched].tolist() == (np.flatnonzero(matched) - len(ids) + len(teacher)).tolist()
    back = align(tokenizer, teacher, ids)
    assert (back >= 0).sum() == matched.sum()


def test_a_word_cut_in_another_way_costs_its_own_tokens_alone(tokenizer):
    ids = encode_response(tokenizer, TEXT)
    at = next(i for i, t in enumerate(ids[:-1]) if i > 3 and len(tokenizer.convert_ids_to_tokens(t)) > 2)
    pieces = [tokenizer.convert_tokens_to_ids(c) for c in tokenizer.convert_ids_to_tokens(ids[at])]
    teacher = ids[:at] + pieces + ids[at + 1 :]
    found = align(tokenizer, ids, teacher)
    assert np.flatnonzero(found < 0).tolist() == [at]
    assert [teacher[i] for i in found if i >= 0] == ids[:at] + ids[at + 1 :]


def test_another_stop_token_is_not_the_eos_and_a_cut_response_has_none(tokenizer):
    ids = encode_response(tokenizer, TEXT)
    pad = tokenizer.pad_token_id
    assert align(tokenizer, ids, [*ids[:-1], pad]).tolist() == [*range(len(ids) - 1), -1]
    assert align(tokenizer, ids, ids[:-1]).tolist() == [*range(len(ids) - 1), -1]
    assert (align(tokenizer, ids, encode_response(tokenizer, "2 + 2 = 5?"))[:-1] < 0).all()


def rows_of(tokens, vocabulary, k=3, seed=0):
    """A teacher's logprobs at the tokens: peaked anywhere, [T, vocabulary], and their k likeliest."""
    rng = np.random.default_rng(seed)
    log_q = rng.normal(0, 3, (len(tokens), vocabulary))
    log_q -= np.logaddexp.reduce(log_q, 1, keepdims=True)
    ids = np.argsort(-log_q, 1)[:, :k].astype(np.int32)
    own = log_q[np.arange(len(tokens)), tokens].astype(np.float32)
    return log_q, TopLogprobs(ids, np.take_along_axis(log_q, ids, 1).astype(np.float32), own)


TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: {"logprobs": np.where(np.arange(3) == 1, np.nan, r.logprobs)}, "p/7: a logprob at position 0"),
        (lambda r: {"sampled": r.sampled + 40}, "p/7: a logprob at position 0 is no finite number"),
        (lambda r: {"ids": r.ids[1:], "logprobs": r.logprobs[1:], "sampled": r.sampled[1:]}, "at 7 positions for 8"),
        (lambda r: {"ids": r.ids[:, [0, 0, 1]]}, "p/7: token ids that repeat"),
        (lambda r: {"ids": r.ids + 10}, r"outside of 0\.\.9"),
        # off by one: the list of one position, the drawn token's logprob of another
        (lambda r: {"ids": np.roll(r.ids, 1, 0), "logprobs": np.roll(r.logprobs, 1, 0)}, "p/7: .* or are shifted"),
        (lambda r: {"logprobs": r.logprobs * 0.1}, "p/7: "),
    ],
)
def test_distributions_that_cannot_be_those_of_the_tokens_are_refused_with_the_id(change, match):
    found = rows_of(TOKENS, 10)[1]
    check("p/7", TOKENS, found, 10, 3)
    with pytest.raises(ValueError, match=match):
        check("p/7", TOKENS, dataclasses.replace(found, **change(found)), 10, 3)


def test_more_tokens_than_were_captured_are_refused():
    with pytest.raises(ValueError, match=r"p/7: logprobs of 3 tokens a position, and data\.topk=4"):
        check("p/7", TOKENS, rows_of(TOKENS, 10)[1], 10, 4)


def test_draws_are_kept_all_of_them_with_their_shares():
    with np.errstate(divide="ignore"):
        shares = np.log([[0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]]).astype(np.float32)
    drawn = TopLogprobs(np.array([[7, 2, 9, 0], [4, 0, 0, 0]], np.int32), shares, np.zeros(2, np.float32))
    check("p/7", [1, 1], drawn, 10, 3, random=True)
    codec = TopK(3, 10, random=True)
    found = codec.unpack(topk.encode_draws(drawn.ids, drawn.logprobs, codec))
    assert found["topk_ids"].tolist() == [[7, 2, 9], [4, 0, 0]]
    logprobs, tail = log_probabilities(found["topk_codes"], found["topk_tail"])
    np.testing.assert_allclose(np.exp(logprobs), np.exp(shares[:, :3]), rtol=1e-3)
    assert (tail == 0).all()
    with pytest.raises(ValueError, match=r"p/7: 3 different draws at a position, and data\.topk=2; raise it to 3"):
        check("p/7", [1, 1], drawn, 10, 2, random=True)
    with pytest.raises(ValueError, match="p/7: shares of draws that do not add up to 1"):
        check("p/7", [1, 1], dataclasses.replace(drawn, logprobs=shares - 1), 10, 3, random=True)


# ------------------------------------------------------------------------------------------------- the stage

SAMPLES = [(f"p{i}", "math", thought(1 + i % 4, str(i)), i != 2) for i in range(7)]


def write_teacher(run, student, *, revision="r1", change=lambda name, ids: ids, **origin):
    """Gives every trace of a run made by hand its tokens and a teacher's logprobs; returns the whole distributions."""
    tokens, whole, rows, traces = TokenMap.of(demo_teacher()), {}, [], []
    for trace in read_records(run.traces, Trace):
        ids = change(trace.id, encode_response(student, trace.response))
        whole[trace.id], found = rows_of(ids, tokens.size, k=6, seed=len(rows))
        rows.append((trace.id, found))
        traces.append(dataclasses.replace(trace, output_ids=ids, engine="vllm", revision="r1"))
    write_records(run.traces / "traces.parquet", Trace, traces)
    about = {"teacher": "t", "revision": revision, "tokenizer": tokens.fingerprint, "vocabulary": tokens.size}
    write_logprobs(run.traces / FOLDER, rows, Origin(**about | origin))
    return whole


def config_with_topk(root, k=4, **data):
    config = config_of(root)
    plain = dataclasses.asdict(config)
    plain["traces"] |= {"engine": "vllm", "teacher": "t", "logprobs": 6}
    plain["data"] |= {"topk": k} | data
    return build(plain)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_token_of_a_response_has_its_own_distribution_beside_it_and_no_other_has_one(
    tmp_path, tokenizer, workers
):
    run = write_run(tmp_path, SAMPLES)
    whole = write_teacher(run, tokenizer)
    counts = prepare(config_with_topk(tmp_path, workers=workers), run, run)
    assert counts["topk"] == {
        "k": 4,
        "bytes_per_token": TopK(4, TokenMap.of(demo_teacher()).size).width,
        "covered_share": 1.0,
    }
    batches = Batches(run.tokens, batch_rows=1, seed=0)
    assert batches.topk is not None and batches.topk_origin["origins"][0]["revision"] == "r1"
    origins = pq.read_table(run.tokens / "origins.parquet").to_pylist()
    checked = 0
    for number in range(batches.rows):
        row = batches.stored_row(number)
        beside = batches.topk.unpack(row["topk"])
        logprobs, tail = log_probabilities(beside["topk_codes"], beside["topk_tail"])
        names = {o["segment"]: o["trace_id"] for o in origins if o["row"] == number}
        place: dict[str, int] = {}
        for t, segment in enumerate(row["segment_ids"]):
            if row["regions"][t] == 0:
                assert not row["topk"][t].any()
                continue
            name = names[int(segment)]
            log_q = whole[name][place.setdefault(name, 0)]
            place[name] += 1
            assert row["tokens"][t] in beside["topk_ids"][t]
            np.testing.assert_allclose(logprobs[t], log_q[beside["topk_ids"][t]], atol=1e-3)
            np.testing.assert_allclose(tail[t], 1 - np.exp(log_q[beside["topk_ids"][t]]).sum(), atol=1e-3)
            checked += 1
        assert place == {n: len(whole[n]) for n in names.values()}
        assert sum(len(tokens) for tokens, _ in unpack(row)) == (row["segment_ids"] > 0).sum()
    assert checked == sum(len(log_q) for name, log_q in whole.items() if not name.startswith("p2/"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tokenizer": "0123"}, r"p0/plain/0: its logprobs are about the tokens of t \(0123\)"),
        ({"revision": "r2"}, r"p0/plain/0: drawn from revision r1 of t, .* of revision r2"),
        ({"change": lambda name, ids: [5] * 4 if name.startswith("p3") else ids}, "p3/plain/0: not one of the"),
    ],
)
def test_another_teachers_distributions_are_refused(tmp_path, tokenizer, options, match):
    run = write_run(tmp_path, SAMPLES)
    write_teacher(run, tokenizer, **options)
    with pytest.raises(ValueError, match=match):
        prepare(config_with_topk(tmp_path), run, run)


def test_a_trace_without_distributions_and_a_file_of_unknown_origin_are_refused(tmp_path, tokenizer):
    run = write_run(tmp_path, SAMPLES)
    write_teacher(run, tokenizer)
    table = pq.read_table(run.traces / FOLDER / FILE)
    pq.write_table(table.slice(0, 5), run.traces / FOLDER / FILE)
    with pytest.raises(ValueError, match="p5/plain/0: no logprobs in"):
        prepare(config_with_topk(tmp_path), run, run)
    pq.write_table(table.replace_schema_metadata(None), run.traces / FOLDER / FILE)
    with pytest.raises(ValueError, match="does not say which teacher's it is"):
        prepare(config_with_topk(tmp_path), run, run)


def test_another_tokenizers_probabilities_come_beside_the_tokens_that_begin_where_its_own_do(tmp_path, tokenizer):
    run = write_run(tmp_path, SAMPLES)
    whole = write_teacher(run, tokenizer, teacher="demo")
    texts = {trace.id: trace.response for trace in read_records(run.traces, Trace)}
    plain = dataclasses.asdict(config_with_topk(tmp_path, topk_align="spans"))
    plain["student"] |= {"tokenizer": "train", "tokenizer_vocab": 270}
    plain["train"]["distill"] = {"source": "stored", "divergence": "uld"}
    counts = prepare(build(plain), run, run)
    assert 0.3 < counts["topk"]["covered_share"] < 0.95
    student, batches = load_tokenizer(str(run.tokenizer)), Batches(run.tokens, batch_rows=1, seed=0)
    assert batches.topk is not None and batches.topk.spans
    origins = pq.read_table(run.tokens / "origins.parquet").to_pylist()
    checked = 0
    for origin in origins:
        row = batches.stored_row(origin["row"])
        where = np.flatnonzero((row["segment_ids"] == origin["segment"]) & (row["regions"] > 0))
        beside = batches.topk.unpack(row["topk"][where])
        logprobs, _ = log_probabilities(beside["topk_codes"], beside["topk_tail"])
        ids = encode_response(tokenizer, texts[origin["trace_id"]])
        # what is still to come at each of the teacher's tokens
        places = {tokenizer.decode(ids[j:-1]): j for j in range(len(ids))}
        for i, t in enumerate(where):
            j = places.get(student.decode(row["tokens"][t : where[-1]]))
            assert (j is not None) == row["topk"][t].any()
            if j is not None:
                want = np.sort(whole[origin["trace_id"]][j])[::-1][:4]
                np.testing.assert_allclose(logprobs[i], want, atol=1e-3)
                checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"data": {"row_tokens": 160, "topk": 4}}, r"data\.topk=4 > traces\.logprobs=0"),
        ({"data": {"row_tokens": 160, "topk": 4, "response": "answer"}}, "a reasoning that the student would not see"),
        ({"train": {"distill": {"source": "stored"}}}, "stored needs `data.topk`"),
        (
            {"data": {"row_tokens": 160, "topk": 4}, "train": {"distill": {"source": "stored", "temperature": 2.0}}},
            "do not say what the whole distribution",
        ),
        ({"train": {"distill": {"source": "stored", "divergence": "jsd"}}}, "jsd needs the teacher's whole"),
        ({"train": {"distill": {"source": "stored", "weight": 0}}}, "nothing is distilled"),
        ({"train": {"distill": {"source": "online", "ce_weight": 0, "final_weight": 0}}}, "nothing would be learned"),
        ({"train": {"distill": {"source": "online"}}}, "online needs a teacher"),
        (
            {"data": {"row_tokens": 160, "topk": 4}, "train": {"distill": {"source": "stored", "divergence": "uld"}}},
            "uld does not fit",
        ),
    ],
)
def test_configs_that_cannot_work_say_so(sections, match):
    train = TINY["train"] | sections.get("train", {})
    with pytest.raises(ValueError, match=match):
        build(json.loads(json.dumps(TINY | {"run_dir": "x"} | sections | {"train": train})))
