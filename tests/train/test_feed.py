"""What training reads: rows held out never come up, nothing else changes, and bad tokens are refused."""

import jax
import numpy as np
import pytest

from jaxdistill.data.packing import fill_row
from jaxdistill.data.rows import FILE, Batches, write_rows
from jaxdistill.parallel.mesh import make_mesh
from jaxdistill.train.feed import AHEAD, TrainRows, in_batches, read_ahead
from tests.train.test_step import examples

ROWS, BATCH = 40, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    write_rows(root / FILE, [fill_row([e], 32) for e in examples(ROWS)])
    return root


def rows_of(folder, **more):
    return TrainRows(Batches(folder, batch_rows=BATCH, seed=3), seed=3, **{"vocabulary": 98} | more)


def test_held_out_rows_never_come_up_and_the_others_keep_their_places(folder):
    whole, part = rows_of(folder), rows_of(folder, held_out=6)
    held = set(part.held_out)
    assert len(held) == 6 and part.held_out == rows_of(folder, held_out=6).held_out
    replaced = 0
    for step in range(10):
        before, after = whole.row_numbers(step), part.row_numbers(step)
        assert not held & set(after)
        assert [b for a, b in zip(before, after, strict=True) if a not in held] == [a for a in before if a not in held]
        replaced += sum(a in held for a in before)
        # part of a batch is that part of the batch, whoever asks for it
        assert part.row_numbers(step, slice(2, 5)) == after[2:5]
    assert replaced == 6 * 10 * BATCH // ROWS


def test_more_than_half_is_not_held_out(folder):
    with pytest.raises(ValueError, match=r"train\.evaluate\.rows=21 would hold out more than half of 40"):
        rows_of(folder, held_out=21)


def test_a_token_outside_of_the_vocabulary_is_refused_with_its_row(folder):
    with pytest.raises(ValueError, match=r"packed row \d+: token 9\d is outside of the student's vocabulary of 90"):
        rows_of(folder, vocabulary=90).stored(range(ROWS))


def test_every_batch_comes_once_in_order_from_any_step_on(folder):
    rows, mesh, late = rows_of(folder), make_mesh({"fsdp": 8}), []
    for first, last in ((0, 5), (3, 7), (4, 4), (2, 2 + AHEAD - 1)):
        steps = []
        for step, batch in read_ahead(rows, range(first, last), (BATCH, 32), mesh, late.append):
            steps.append(step)
            np.testing.assert_array_equal(batch["tokens"], rows.rows_of(step)["tokens"])
        assert steps == list(range(first, last))
    assert len(late) == 5 + 4 + AHEAD - 1 and min(late) >= 0


def test_an_error_while_reading_ahead_arrives(folder):
    feed = read_ahead(rows_of(folder, vocabulary=5), range(3), (BATCH, 32), make_mesh({"fsdp": 8}), lambda _: None)
    with pytest.raises(ValueError, match="outside of the student's vocabulary"):
        list(feed)


def test_the_last_evaluation_batch_is_filled_up_with_what_counts_for_nothing(folder):
    rows = rows_of(folder).stored(range(11))
    batches = [jax.device_get(b) for b in in_batches(rows, BATCH, make_mesh({"fsdp": 8}))]
    assert [len(b["tokens"]) for b in batches] == [BATCH, BATCH]
    for name, array in rows.items():
        joined = np.concatenate([b[name] for b in batches])
        np.testing.assert_array_equal(joined[:11], array)
        assert (joined[11:] == 0).all()
