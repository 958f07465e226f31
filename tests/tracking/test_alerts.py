"""Which metrics call for an alert, and how often."""

import pytest

from pipeline.tracking.alerts import Alerts


def titles(alerts: Alerts, records: list[dict[str, float]]) -> list[tuple[int, str]]:
    return [(step, alert.title) for step, record in enumerate(records, start=1) for alert in alerts.find(step, record)]


def test_steps_that_were_skipped_since_the_last_record():
    """Those of earlier attempts, which the counter includes, are no news."""
    counts = [3.0, 3.0, 5.0, 5.0, 6.0]
    alerts = Alerts(beta=1.0)
    assert titles(alerts, [{"train/skipped_steps": count} for count in counts]) == [
        (3, "Steps were skipped"),
        (5, "Steps were skipped"),
    ]
    (alert,) = alerts.find(6, {"train/skipped_steps": 8.0})
    assert "Step 6: 2 step(s)" in alert.text


def test_steps_that_the_skip_threshold_skipped_count_where_they_are_most():
    """Once, until they are few again; those with a NaN count by themselves."""
    alerts = Alerts(beta=1.0)
    found = []
    for step, skipped, by_norm in [(10, 4, 4), (20, 8, 8), (30, 14, 14), (40, 24, 24), (50, 25, 25), (60, 32, 31)]:
        found += alerts.find(step, {"train/skipped_steps": float(skipped), "train/skipped_by_norm": float(by_norm)})
    assert [alert.title for alert in found] == [
        "Most steps are skipped",
        "Steps were skipped",
        "Most steps are skipped",
    ]
    assert "Step 30: 6 of the last 10 steps had a gradient norm above optim.skip_threshold" in found[0].text
    assert "Step 60: 1 step(s) of the last interval had a loss or gradient that is not finite." in found[1].text


def test_a_group_without_active_units_counts_after_the_warm_up_and_once():
    def record(beta, first, second):
        units = {"active_units/8x8_group00": first, "active_units/16x16_group00": second}
        return {"train/beta": beta, **units}

    alerts = Alerts(beta=0.5)
    assert titles(alerts, [record(0.1, 0, 0), record(0.49, 0, 3), record(0.5, 4, 0), record(0.5, 4, 0)]) == [
        (3, "Latent groups are out of use")
    ]
    (alert,) = alerts.find(5, record(0.5, 0, 0))
    assert "8x8_group00" in alert.text
    assert "16x16_group00" not in alert.text
    assert alerts.find(6, {"val/elbo": 1.0}) == []


@pytest.mark.parametrize(
    ("speeds", "steps"),
    [
        ([100, 100, 100, 40, 40, 40, 40], [6]),  # for three intervals, and once
        ([100, 100, 100, 40, 40, 100, 40, 40], []),
        ([10, 100, 100, 100, 60, 60, 60], []),  # the first interval compiles
        ([100] * 5 + [30] * 3 + [100] * 6 + [30] * 3, [8, 17]),
        ([40, 40, 40], []),
        ([10] * 600 + [100] * 501 + [40] * 3, [1104]),  # usual is what the last intervals were
    ],
)
def test_half_the_usual_speed(speeds, steps):
    found = titles(Alerts(beta=1.0), [{"perf/images_per_second": float(speed)} for speed in speeds])
    assert found == [(step, "Training is at half its speed") for step in steps]
