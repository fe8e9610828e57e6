"""Global batch s is a pure function of (seed, epoch, s): plain, with a mixture, with a curriculum, on any hosts."""

from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.config import CurriculumConfig, PhaseConfig
from jaxdistill.data import packing, rows
from jaxdistill.data.curriculum import phases_of
from jaxdistill.data.examples import Example
from jaxdistill.data.order import Group, Layout, Order, shares_of, spread
from jaxdistill.records import write_json

MIXED = Layout((Group(0, 0, 0, 12), Group(1, 0, 12, 5), Group(2, 0, 17, 7)), ("a", "b", "c"), (1.0, 2.0, 1.0))
CURRICULUM = Layout((Group(0, 0, 0, 6), Group(0, 1, 6, 5), Group(0, 2, 11, 4)), passes=(1, 2, 1))
LAYOUTS = {
    "plain": Layout((Group(0, 0, 0, 19),)),
    "mixed": MIXED,
    "curriculum": CURRICULUM,
    "both": Layout(
        (Group(0, 0, 0, 3), Group(0, 1, 3, 4), Group(1, 0, 7, 2), Group(1, 1, 9, 6)), ("a", "b"), (3.0, 1.0), (1, 1)
    ),
}


@pytest.fixture(params=list(LAYOUTS))
def folder(request, tmp_path):
    """A prepared folder whose row r begins with token r + 1."""
    layout = LAYOUTS[request.param]
    stored = (packing.fill_row([Example(str(i), [i + 1], [2])], 4) for i in range(layout.rows))
    rows.write_rows(tmp_path / rows.FILE, stored)
    write_json(tmp_path / rows.ORDER, layout.to_dict())
    return tmp_path


def read(folder, batch_rows, steps, hosts=1, seed=1):
    """The first tokens of the rows of some batches, each read in parts by so many hosts, every host on its own."""
    own = [rows.Batches(folder, batch_rows=batch_rows, seed=seed) for _ in range(hosts)]
    bounds = np.linspace(0, batch_rows, hosts + 1).astype(int)
    return [
        [
            int(token)
            for host, batches in enumerate(own)
            for token in batches.rows_of(s, slice(int(bounds[host]), int(bounds[host + 1])))["tokens"][:, 0]
        ]
        for s in steps
    ]


@pytest.mark.parametrize("hosts", [2, 3, 12])
def test_any_number_of_hosts_reads_the_same_batches(folder, hosts):
    assert read(folder, 12, range(1, 4), hosts) == read(folder, 12, range(1, 4))


def test_any_step_may_be_asked_first(folder):
    forward = read(folder, 4, range(12))
    assert read(folder, 4, reversed(range(12))) == forward[::-1]
    assert read(folder, 4, range(7, 12)) == forward[7:]  # what a resumed run reads
    assert read(folder, 4, range(12), seed=2) != forward


def test_the_cut_into_batches_changes_no_position(folder):
    flat = [row for batch in read(folder, 1, range(30)) for row in batch]
    assert [row for batch in read(folder, 6, range(5)) for row in batch] == flat


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (2, 7), (40, 1), (100, 2**31 - 1)])
def test_plain_epochs_are_grains_shuffles_each_row_once(count, seed):
    order = Order(Layout((Group(0, 0, 0, count),)), seed)
    found = [order.row_at(i) for i in range(3 * count)]
    plain = grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat()
    assert found[-9:] == [plain[i] for i in range(3 * count)][-9:]
    epochs = [found[i : i + count] for i in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 8:
        assert epochs[0] != epochs[1] != epochs[2]


# -------------------------------------------------------------------------------------------------- mixtures


@given(
    st.lists(st.tuples(st.integers(0, 30), st.floats(0.01, 100)), min_size=1, max_size=5).filter(
        lambda parts: any(n for n, _ in parts)
    )
)
@settings(max_examples=200)
def test_shares_add_up_and_lie_next_to_the_weights(parts):
    sizes, weights = zip(*parts, strict=True)
    counts = shares_of(sizes, weights)
    total, held = sum(sizes), sum(w for n, w in parts if n)
    assert sum(counts) == total
    for count, size, weight in zip(counts, sizes, weights, strict=True):
        assert (count > 0) == (size > 0)
        if all(total * w / held >= 1 for n, w in parts if n):  # none too small for a row
            assert size == 0 or abs(count - total * weight / held) <= 1
    assert shares_of(sizes, None) == list(sizes)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any))
def test_sources_are_spread_evenly(counts):
    order = spread(counts)
    assert Counter(order.tolist()) == {k: n for k, n in enumerate(counts) if n}
    for start in range(0, len(order), 7):  # every beginning has about the whole's shares
        seen = Counter(order[:start].tolist())
        for source, count in enumerate(counts):
            assert abs(seen[source] - start * count / len(order)) <= len(counts)


def test_a_source_repeats_no_row_before_it_is_exhausted():
    order = Order(MIXED, seed=3)
    found = [order.row_at(i) for i in range(5 * MIXED.rows)]
    for group, per_epoch in zip(MIXED.groups, (6, 12, 6), strict=True):
        mine = [r for r in found if group.first <= r < group.first + group.rows]
        assert len(mine) == 5 * per_epoch
        for start in range(0, len(mine) - group.rows + 1, group.rows):
            assert sorted(mine[start : start + group.rows]) == list(range(group.first, group.first + group.rows))


def test_without_weights_a_mixture_is_every_row_once_an_epoch():
    layout = Layout(MIXED.groups, MIXED.sources)
    order = Order(layout, seed=0)
    for epoch in range(3):
        found = [order.row_at(epoch * layout.rows + i) for i in range(layout.rows)]
        assert sorted(found) == list(range(layout.rows))


# ------------------------------------------------------------------------------------------------- curricula


def test_phases_come_first_and_then_everything():
    order = Order(CURRICULUM, seed=0)
    assert order.starts == [0, 6, 16, 20]
    found = [order.row_at(i) for i in range(20 + 2 * 15)]
    assert sorted(found[:6]) == list(range(6))
    assert sorted(found[6:11]) == sorted(found[11:16]) == list(range(6, 11))
    assert sorted(found[16:20]) == list(range(11, 15))
    assert sorted(found[20:35]) == sorted(found[35:50]) == list(range(15))
    assert [order.phase_at(i) for i in (0, 5, 6, 15, 16, 19, 20, 10**9)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_cumulative_phases_keep_the_easier_rows():
    order = Order(Layout(CURRICULUM.groups, passes=(1, 1, 1), cumulative=True), seed=0)
    assert order.starts == [0, 6, 17, 32]
    assert sorted(order.row_at(i) for i in range(6, 17)) == list(range(11))


def test_weights_hold_in_every_phase():
    layout = LAYOUTS["both"]
    order = Order(layout, seed=0)
    first = [order.row_at(i) for i in range(5)]  # 3 + 2 rows at 3 : 1
    assert sum(r < 7 for r in first) == 4
    second = [order.row_at(i) for i in range(5, 15)]  # 4 + 6 rows
    assert sum(r < 7 for r in second) in (7, 8)
    assert all(r in (3, 4, 5, 6, 9, 10, 11, 12, 13, 14) for r in second)


def test_equal_parts_have_equal_tokens_and_keep_equals_together():
    values = np.array([5, 1, 1, 9, 7, 3, 3, 20])
    phases = phases_of(CurriculumConfig(by="steps", parts=2), values, np.full(8, 10))
    assert phases.tolist() == [1, 0, 0, 1, 1, 0, 0, 1]
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 3000, 5000)
    phases = phases_of(CurriculumConfig(by="tokens", parts=4), tokens, tokens)
    sums = np.bincount(phases, weights=tokens) / tokens.sum()
    np.testing.assert_allclose(sums, 0.25, atol=0.01)
    assert all(tokens[phases == p].max() <= tokens[phases == p + 1].min() for p in range(3))


def test_bounds_are_inclusive_and_a_high_pass_rate_is_easy():
    by_tokens = CurriculumConfig(by="tokens", phases=(PhaseConfig(until=10), PhaseConfig(until=20), PhaseConfig()))
    assert phases_of(by_tokens, np.array([20, 10, 11, 21]), np.ones(4)).tolist() == [1, 0, 1, 2]
    by_rate = CurriculumConfig(by="pass_rate", phases=(PhaseConfig(until=0.75), PhaseConfig()))
    assert phases_of(by_rate, np.array([1.0, 0.75, 0.5, 0.25]), np.ones(4)).tolist() == [0, 0, 1, 1]


def test_a_curriculum_without_differences_or_with_an_empty_phase_is_refused():
    with pytest.raises(ValueError, match=r"all 3 examples have the same pass_rate \(1\).*traces\.samples"):
        phases_of(CurriculumConfig(by="pass_rate", parts=2), np.ones(3), np.ones(3))
    bounds = CurriculumConfig(by="steps", phases=(PhaseConfig(until=1), PhaseConfig()))
    with pytest.raises(ValueError, match=r"no example falls into phase 1; steps of the 2 examples goes from 4 to 6"):
        phases_of(bounds, np.array([4, 6]), np.ones(2))


# ----------------------------------------------------------------------------------------------- the folder


def test_no_rows_is_said(tmp_path):
    rows.write_rows(tmp_path / rows.FILE, [])
    with pytest.raises(ValueError, match="no packed rows"):
        rows.Batches(tmp_path, batch_rows=1, seed=0)


def test_rows_that_are_not_those_of_the_order_are_refused(tmp_path):
    rows.write_rows(tmp_path / rows.FILE, [packing.fill_row([Example("a", [1], [2])], 4)])
    write_json(tmp_path / rows.ORDER, LAYOUTS["plain"].to_dict())
    with pytest.raises(ValueError, match=r"1 rows, and order\.json tells of 19; prepare again"):
        rows.Batches(tmp_path, batch_rows=1, seed=0)
