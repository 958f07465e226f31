"""Thinned series against all values at once: extremes are kept, whatever the order of merging."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.reporting.thinning import Envelope, HeatMap, evenly

VALUES = st.floats(-1e6, 1e6).map(lambda value: round(value, 1))
SERIES = st.dictionaries(st.integers(0, 5000), VALUES, min_size=1, max_size=300).map(lambda d: sorted(d.items()))


def envelope(series, max_ranges):
    curve = Envelope(max_ranges)
    for step, value in series:
        curve.add(step, value)
    return curve


def by_range(series, shift):
    ranges = {}
    for step, value in series:
        ranges.setdefault(step >> shift, []).append((step, value))
    return ranges


@given(SERIES, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_every_range_keeps_its_extremes_and_nothing_is_invented(series, max_ranges):
    curve = envelope(series, max_ranges)
    kept = curve.points()
    assert set(kept) <= set(series)
    assert kept == sorted(kept)
    assert kept[0] == series[0]
    assert kept[-1] == series[-1]
    drawn = by_range(kept, curve.shift)
    for number, points in by_range(series, curve.shift).items():
        values = [value for _, value in points]
        assert min(values) in [value for _, value in drawn[number]]
        assert max(values) in [value for _, value in drawn[number]]


@given(SERIES, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_as_few_points_as_asked_and_no_wider_ranges_than_needed(series, max_ranges):
    curve = envelope(series, max_ranges)
    assert len(curve.points()) <= 2 * max_ranges + 2
    assert len(by_range(series, curve.shift)) <= max_ranges
    assert curve.shift == 0 or len(by_range(series, curve.shift - 1)) > max_ranges


@given(SERIES, st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_thinning_twice_is_thinning_once(series, max_ranges):
    assert envelope(series, 64).points(max_ranges) == envelope(series, max_ranges).points()


def test_values_that_are_not_finite_are_counted():
    curve = envelope([(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 0.5)], 8)
    assert curve.points() == [(1, 1.0), (4, 0.5)]
    assert (curve.not_finite, curve.first_not_finite) == (2, 2)


@given(SERIES, st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_heat_map_shows_the_mean_of_each_range(series, max_columns):
    table = HeatMap(max_columns)
    for step, value in series:
        table.add(step, {"row": value, "later": value} if step > 2500 else {"row": value})
    rows, steps, means = table.table()
    expected = by_range(series, table.shift)
    assert steps == [number << table.shift for number in sorted(expected)]
    assert len(steps) <= max_columns
    for mean, number in zip(means[rows.index("row")], sorted(expected), strict=True):
        values = [value for _, value in expected[number]]
        assert abs(mean - sum(values) / len(values)) <= 1e-6 * max(1, *map(abs, values))


@given(st.integers(0, 100), st.integers(1, 30))
def test_evenly_spaced_items_include_both_ends(num_items, count):
    items = list(range(num_items))
    chosen = evenly(items, count)
    assert len(chosen) == min(num_items, count)
    assert chosen == sorted(set(chosen))
    if count > 1 and num_items > 1:
        assert (chosen[0], chosen[-1]) == (0, num_items - 1)
        gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
        assert max(gaps) - min(gaps) <= 1
