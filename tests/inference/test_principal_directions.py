"""Principal directions compared with NumPy's eigenvectors of the covariance, and labels around grids."""

import numpy as np
import pytest
import torch

from pipeline.inference.labels import Labels, labeled
from pipeline.inference.principal_directions import principal_directions


@pytest.mark.parametrize("shape", [(60, 2, 3, 2), (9, 4, 3, 3)])
def test_directions_are_eigenvectors_of_the_covariance(shape, monkeypatch):
    """Of more rows than elements, and of fewer."""
    monkeypatch.setattr("pipeline.inference.principal_directions.ELEMENTS", 7)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = rows * torch.linspace(1, 4, rows[0].numel(), dtype=torch.float64).view(shape[1:]) + 5
    found = principal_directions(rows, 3)
    flat = rows.flatten(1).numpy()
    variances, vectors = np.linalg.eigh(np.cov(flat.T))
    assert found.directions.shape == (3, *shape[1:])
    for d in range(3):
        direction = found.directions[d].flatten().numpy()
        vector = vectors[:, -1 - d] * np.sign(vectors[np.abs(vectors[:, -1 - d]).argmax(), -1 - d])
        np.testing.assert_allclose(direction, vector, atol=1e-9)
        np.testing.assert_allclose(found.deviations[d], (flat @ direction).std(ddof=1), rtol=1e-9)
        np.testing.assert_allclose(found.shares[d], variances[-1 - d] / variances.sum(), rtol=1e-9)


def test_there_are_only_so_many_directions():
    rows = torch.randn(5, 2, 3, 3)
    with pytest.raises(ValueError, match="--directions 5: 5 images have at most 4; read more with --images"):
        principal_directions(rows, 5)
    with pytest.raises(ValueError, match="--directions 3: 50 images have at most 2"):
        principal_directions(torch.randn(50, 2, 1, 1), 3)
    with pytest.raises(ValueError, match="the group's posterior is its prior for all images"):
        principal_directions(torch.zeros(50, 2, 1, 1), 1)


def test_labels_leave_the_grid_as_it_is():
    grid = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    assert np.array_equal(labeled(grid, Labels()), grid)
    page = labeled(grid, Labels(["a", "b\nc"], ["one", "two"], "A caption that is wider than the grid of images"))
    top = page.shape[0] - 100
    assert top > 40
    left = next(x for x in range(1, page.shape[1]) if np.array_equal(page[top:, x : x + 150], grid))
    assert page.shape[1] > left + 150
    text = page.copy()
    text[top:, left : left + 150] = 255
    assert all((edge == 255).all() for edge in (text[:, 0], text[0], text[:, -1]))  # margins
    dark = (text < 128).all(2)
    columns, rows = dark[top - 30 : top].any(0), dark[top:, :left].any(1)
    for half in (columns[left : left + 75], columns[left + 75 : left + 150], rows[:50], rows[50:]):
        middle = np.flatnonzero(half).mean()  # each label is in the middle of its column or row
        assert abs(middle - len(half) / 2) < 5
    assert dark[: top - 30].any()  # the caption
