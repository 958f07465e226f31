"""What `evaluate.py` prints."""

from math import nan

from pipeline.inference.text import figure_lines


def test_figures_for_the_same_parts_are_columns():
    figures = {"elbo": -95.8846, "kl/4x4_group00": 6.25, "kl/8x8_group01": 12, "active_units/8x8_group01": 20}
    figures |= {"active_units/4x4_group00": 3.0}
    assert figure_lines(figures) == [
        "elbo      -95.8846",
        "",
        "                     kl  active_units",
        "4x4_group00      6.2500        3.0000",
        "8x8_group01     12.0000       20.0000",
    ]


def test_what_the_kinds_share_is_said_once():
    figures = {"edit/set": 0.5, "edit/set/Smiling": 0.25, "edit/clear/Smiling": 1}
    assert figure_lines(figures) == [
        "edit/set        0.5000",
        "",
        "edit/           set       clear",
        "Smiling      0.2500      1.0000",
    ]


def test_one_kind_alone_has_a_line_for_each_part():
    assert figure_lines({"recognized/0": 1.0, "recognized/1": nan}) == [
        "recognized/0        1.0000",
        "recognized/1           nan",
    ]


def test_no_name_controls_the_terminal():
    lines = figure_lines({"a\x1b[2J": 1.0, "kl/\x1b]0;x": 1.0, "active_units/\x1b]0;x": 2.0})
    assert all(line.isprintable() for line in lines)
