"""The feature network and its input, against torch-fidelity, torchmetrics and the definition of the resize rules."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.evaluation.inception import SIDE, Inception, network_input, resize_tf1
from tests.helpers.feature_networks import import_reference, inception_state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return inception_state(3)


@pytest.fixture(scope="module")
def network(state) -> Inception:
    network = Inception()
    network.load_state_dict(state)
    return network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 (2, 3, 40, 33)."""
    return torch.randint(0, 256, (2, 3, 40, 33), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().mean())


@pytest.fixture(scope="module")
def weights_file(state, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return str(path)


def test_features_are_those_of_torch_fidelity(network, images, weights_file):
    module = import_reference("torch_fidelity.feature_extractor_inceptionv3")
    theirs = module.FeatureExtractorInceptionV3("theirs", ["2048"], weights_file)
    (expected,) = theirs(images)
    found = network(network_input(images.float(), "tf1"))
    assert expected.std() > 0.01
    assert relative_error(found, expected) < 1e-4
    assert theirs.state_dict().keys() - network.state_dict().keys() == {
        name for name in theirs.state_dict() if name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize("antialias", [True, False])
def test_features_are_those_of_torchmetrics(network, images, weights_file, antialias):
    """Its default resizes as pytorch-fid does, and scales as TensorFlow 1 did."""
    module = import_reference("torchmetrics.image.fid")
    expected = module.NoTrainInceptionV3("theirs", ["2048"], weights_file, antialias=antialias)(images)
    if antialias:
        resized = (network_input(images.double(), "pytorch-fid") + 1) * 127.5
        found = network(((resized - 128) / 128).float())
    else:
        found = network(network_input(images.float(), "tf1"))
    assert relative_error(found, expected) < 1e-4


@pytest.mark.parametrize("shape", [(32, 32), (64, 20), (299, 299), (400, 310)])
def test_the_tf1_rule_is_torch_fidelitys(shape):
    module = import_reference("torch_fidelity.interpolate_compat_tensorflow")
    pixels = 255 * torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(5))
    expected = module.interpolate_bilinear_2d_like_tensorflow1x(pixels, (SIDE, SIDE), align_corners=False)
    assert torch.equal(resize_tf1(pixels), expected)
    assert torch.equal(network_input(pixels, "tf1"), (expected - 128) / 128)


def interpolate(line: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(299, ...) the values of a line (n, ...) at these places, linear between its pixels and constant beyond them."""
    flat = line.reshape(len(line), -1)
    columns = [np.interp(places, np.arange(len(line)), column) for column in flat.T]
    return np.stack(columns, axis=1).reshape(len(places), *line.shape[1:])


@pytest.mark.parametrize(
    ("rule", "center", "scaled"),
    [("pytorch-fid", 0.5, lambda v: 2 * v / 255 - 1), ("tf1", 0.0, lambda v: (v - 128) / 128)],
)
@pytest.mark.parametrize("size", [32, 512])
def test_the_rules_are_linear_interpolation_at_their_places(rule, center, scaled, size):
    """By numpy, in float64: output pixel i lies at (i + center) size / 299 - center."""
    image = np.random.default_rng(6).integers(0, 256, (size, size, 3)).astype(np.float64)
    places = (np.arange(SIDE) + center) * size / SIDE - center
    expected = interpolate(interpolate(image, places).swapaxes(0, 1), places).swapaxes(0, 1)
    found = network_input(torch.from_numpy(image.transpose(2, 0, 1)[None]), rule)[0].numpy().transpose(1, 2, 0)
    assert np.abs(found - scaled(expected)).max() < 1e-4


def test_gray_images_are_repeated(images):
    gray = images[:, :1].float()
    assert torch.equal(network_input(gray, "tf1"), network_input(gray.repeat(1, 3, 1, 1), "tf1"))
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        network_input(torch.zeros(1, 4, 8, 8), "tf1")
