"""toy_faces: independent factors, one hair color, honest labels: what is labeled shows, what is hidden does not."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_data import DataError, ToyFaces
from shard_data.sources.face_drawing import draw_face
from shard_data.sources.face_factors import (
    ATTRIBUTES,
    HAIR_COLORS,
    PRESENCE,
    RED,
    attributes,
    edit,
    hidden,
    sample_factors,
)

CELEBA = """
5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair Blurry
Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male
Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
Wearing_Necktie Young
"""

faces = st.builds(sample_factors, st.integers(0, 2**40), st.integers(0, 30_000_000))
changes = st.dictionaries(st.sampled_from(ATTRIBUTES), st.booleans(), max_size=5).filter(
    lambda change: sum(change.get(name, False) for name in HAIR_COLORS) < 2
)


def test_attributes_are_named_as_celeba_names_them_and_sorted():
    assert set(ATTRIBUTES) <= set(CELEBA.split())
    assert list(ATTRIBUTES) == sorted(ATTRIBUTES)
    assert len(ATTRIBUTES) >= 12


@given(seed=st.integers(0, 2**40), index=st.integers(0, 30_000_000), size=st.sampled_from([16, 32, 64]))
@settings(max_examples=20, deadline=None)
def test_a_face_is_a_pure_function_of_seed_and_index(seed, index, size):
    image = draw_face(sample_factors(seed, index), size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    draw_face(sample_factors(seed + 1, index), 32)
    assert np.array_equal(draw_face(sample_factors(seed, index), size), image)
    assert not np.array_equal(draw_face(sample_factors(seed, index + 1), size), image)
    assert not np.array_equal(draw_face(sample_factors(seed + 1, index), size), image)


@given(face=faces, change=changes)
def test_editing_sets_what_it_says_and_clears_only_rivals(face, change):
    before, after = attributes(face), attributes(edit(face, **change))
    assert all(after[name] == value for name, value in change.items())
    rivals = set(HAIR_COLORS) if any(change.get(name) for name in HAIR_COLORS) else set()
    assert all(after[name] == before[name] for name in ATTRIBUTES if name not in change and name not in rivals)
    assert sum(after[name] for name in HAIR_COLORS) <= 1
    edited = edit(face, **change)
    assert replace(edited, present=face.present, hair_color=face.hair_color) == face  # pose and colors stay


@given(face=faces)
def test_clearing_the_hair_color_leaves_a_fifth(face):
    cleared = edit(face, **dict.fromkeys(HAIR_COLORS, False))
    assert cleared.hair_color == RED
    assert sum(attributes(cleared)[name] for name in HAIR_COLORS) == 0


def test_edits_that_make_no_sense_are_refused():
    face = sample_factors(0, 0)
    with pytest.raises(DataError, match="Eyeglass: unknown attribute; did you mean Eyeglasses"):
        edit(face, Eyeglass=True)
    with pytest.raises(DataError, match="Blond_Hair and Gray_Hair: hair has one color"):
        edit(face, Gray_Hair=True, Blond_Hair=True)


def test_factors_have_their_frequencies_and_are_independent():
    rows = np.array([list(attributes(sample_factors(3, i)).values()) for i in range(4000)])  # (N, A)
    expected = np.array([PRESENCE.get(name, 1 / 5) for name in ATTRIBUTES])
    deviation = np.sqrt(expected * (1 - expected) / len(rows))
    assert (np.abs(rows.mean(0) - expected) < 4.5 * deviation).all()
    correlation = np.corrcoef(rows.T)
    colors = [ATTRIBUTES.index(name) for name in HAIR_COLORS]
    correlation[np.ix_(colors, colors)] = 0  # those exclude each other
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(rows))


def difference(face, name, size=32):
    """Per pixel, how much the attribute changes the picture: (size, size), of 255."""
    pictures = [draw_face(edit(face, **{name: value}), size).astype(int) for value in (False, True)]
    return np.abs(pictures[0] - pictures[1]).max(axis=2)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_what_is_labeled_shows_at_32_pixels(name):
    sampled = [sample_factors(1, i) for i in range(40)]
    changed = [difference(face, name) for face in sampled if name not in hidden(face)]
    assert len(changed) > 25
    assert min(change.max() for change in changed) >= 20  # in the least favourable face
    assert np.median([(change > 24).sum() for change in changed]) >= 8  # pixels, of 1,024


def test_what_is_hidden_does_not_show():
    sampled = [edit(sample_factors(2, i), Wearing_Hat=True) for i in range(25)]
    assert all(hidden(face) == {"Bangs"} for face in sampled)
    assert all(difference(face, "Bangs", size=64).max() == 0 for face in sampled)
    assert hidden(edit(sampled[0], Wearing_Hat=False)) == set()


@pytest.mark.parametrize("index", range(6))
def test_the_same_face_at_any_size(index):
    face = sample_factors(4, index)
    small = draw_face(face, 32).astype(float)
    for factor in (2, 4, 8):
        large = draw_face(face, 32 * factor).astype(float)
        reduced = large.reshape(32, factor, 32, factor, 3).mean(axis=(1, 3))
        assert np.abs(reduced - small).mean() < 4  # of 255: edges fall between pixels


def test_edges_are_smooth():
    image = draw_face(edit(sample_factors(0, 3), Wearing_Hat=False, Black_Hair=True), 64)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 400


def test_splits_share_no_face_and_have_distinct_keys():
    source = ToyFaces(size=16, train=50, val=40, test=30)
    records = [record for split in source.splits for record in source.records(split)]
    assert len({record.where for record in records}) == len({record.key for record in records}) == 120
    assert source.records("train") == ToyFaces(size=16, train=90).records("train")[:50]


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"size": 8}, "size 8"),
        ({"size": 512}, "size 512"),
        ({"train": -1}, "train -1"),
        ({"train": 0, "val": 0, "test": 0}, "at least one"),
        ({"seed": -1}, "seed -1"),
    ):
        with pytest.raises(DataError, match=message):
            ToyFaces(**options)
