"""Our safetensors files against the library's own."""

import hashlib

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.safetensors_writer import DTYPES, write_tensors
from tests.helpers.checkpoints import same_bits


def filled(dtype, shape, seed):
    """Any bits, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, 8), dtype=torch.uint8, generator=generator)
    return (raw[..., 0] > 127 if dtype == torch.bool else raw.view(dtype)[..., 0]).contiguous()


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
tensors = st.builds(
    filled, st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**32)
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, tensors, max_size=6))
def test_the_bytes_are_those_of_the_library(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    digest, size = write_tensors(path, content)
    written = path.read_bytes()
    assert written == safetensors.torch.save(content, metadata={"format": "pt"})
    assert (digest, size) == (hashlib.sha256(written).hexdigest(), len(written))
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == content.keys()
    assert all(same_bits(content[name], loaded[name]) for name in content)


def test_it_says_that_it_comes_from_torch(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(3)})
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_file_is_never_overwritten(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", {})
    assert (tmp_path / "x").read_text() == "mine"
