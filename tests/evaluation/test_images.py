"""Pictures show every image where it belongs; files are whole; torchvision loads beside any torch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.evaluation import images
from pipeline.evaluation.images import image_grid, reconstruction_grid, to_uint8
from pipeline.storage.pictures import save_png

ROOT = Path(images.__file__).parents[2]


def cells(grid, side, columns, count):
    """Cut a grid apart again: (count, side, side, 3). make_grid puts no border around a single image."""
    pitch, border = side + 2, 2 if count > 1 else 0
    corners = [(border + pitch * (i // columns), border + pitch * (i % columns)) for i in range(count)]
    return np.stack([grid[y : y + side, x : x + side] for y, x in corners])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.sampled_from([7, 28, 32, 64, 70]),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_each_image_is_in_its_place(count, channels, side, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)
    grid = image_grid(pictures, columns)
    assert grid.dtype == np.uint8
    assert grid.shape[2] == 3
    factor = max(1, int(np.ceil(64 / side)))
    shown = cells(grid, side * factor, min(columns, count), count)[:, ::factor, ::factor]
    expected = pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    assert (shown == expected).all()


def test_floats_are_rounded_and_clipped():
    values = torch.tensor([0.0, 1.0, 0.5, 100 / 255, -0.2, 1.7, float("nan"), float("inf")])
    assert to_uint8(values).tolist() == [0, 255, 128, 100, 0, 255, 0, 0]
    assert to_uint8(values.to(torch.bfloat16))[1] == 255
    every = torch.arange(256, dtype=torch.uint8)
    assert (to_uint8(every / 255) == every).all()


def test_layout_and_gradients_do_not_matter():
    pictures = torch.rand(4, 3, 8, 8)
    other = pictures.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert (image_grid(pictures, 2) == image_grid(other, 2)).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8), (1, 2, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="B, 1 or 3, H, W"):
        image_grid(torch.zeros(shape), 2)


def test_reconstructions_lie_below_their_originals():
    originals = torch.arange(1, 6, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 64, 64)
    grid = reconstruction_grid(originals, originals + 100, columns=3)
    shown = cells(grid, 64, 3, 12)[:, 0, 0, 0].tolist()
    assert shown == [1, 2, 3, 101, 102, 103, 4, 5, 0, 104, 105, 0]
    with pytest.raises(ValueError, match="differ in shape"):
        reconstruction_grid(originals, originals[:4], 3)


def test_png_holds_the_grid_exactly(tmp_path):
    (tmp_path / "samples").mkdir()
    grid = image_grid(torch.rand(4, 3, 16, 16), 2)
    save_png(tmp_path / "samples" / "step_1.png", grid)
    assert (np.asarray(Image.open(tmp_path / "samples" / "step_1.png")) == grid).all()
    assert os.listdir(tmp_path / "samples") == ["step_1.png"]


def test_a_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    old, new = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)
    save_png(tmp_path / "a.png", old)

    def fail_midway(self, file, format):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail_midway)
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a.png", new)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == old).all()
    assert os.listdir(tmp_path) == ["a.png"]


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_torchvision_loads_beside_this_torch_and_is_left_alone_where_it_fits():
    """Whether the bare import works tells which case this machine is."""
    bare = subprocess.run([sys.executable, "-c", "import torchvision"], cwd=ROOT, capture_output=True).returncode == 0
    guarded = run_python(
        "import torch\n"
        "from pipeline.evaluation import images\n"
        "define, declared = torch.library.define, []\n"
        "torch.library.define = lambda *schema: (declared.append(schema), define(*schema))\n"
        "assert images.import_torchvision() is images.import_torchvision()\n"
        "from torchvision.transforms import v2\n"
        "assert v2.functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)\n"
        "print(bool(declared))"
    )
    assert guarded == str(not bare)


def test_other_faults_of_torchvision_are_not_hidden(tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from pipeline.evaluation import images; "
        "images.import_torchvision()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "RuntimeError: something else" in result.stderr


def test_torchvision_is_imported_only_for_a_grid():
    assert run_python("import sys, pipeline.evaluation.images; print('torchvision' in sys.modules)") == "False"
