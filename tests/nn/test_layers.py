"""Layers, cells and flows against plain compositions of torch's own operations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn import depthwise
from pipeline.nn.batch_norm import BatchNorm2d
from pipeline.nn.cells import CELLS, FactorizedReduce, InvertedResidual, ResidualCell, UpsampleProject
from pipeline.nn.depthwise import depthwise_conv2d
from pipeline.nn.flows import FlowPair, ShiftFlow
from pipeline.nn.layers import (
    DepthwiseConv2d,
    MaskedWNConv2d,
    SqueezeExcitation,
    WNConv2d,
    effective_weights,
    find_convs,
)
from tests.helpers.random_layers import images, randomized


def plain_weight(conv: WNConv2d) -> Tensor:
    """Weight normalization of one layer as its definition reads."""
    v = conv.weight if conv.mask is None else conv.weight * conv.mask
    norm = v.square().sum((1, 2, 3), keepdim=True).sqrt()
    return torch.exp(conv.log_norm) * v / (norm + 1e-5)


# ---- weight normalization --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
def test_weight_norm_starts_near_the_plain_initialization(kernel):
    torch.manual_seed(0)
    conv = WNConv2d(8, 6, kernel)
    (effective,) = effective_weights([conv])
    lengths, plain = effective.flatten(1).norm(dim=1), conv.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, plain + 0.01, rtol=1e-3, atol=0)


def various_convs() -> nn.ModuleList:
    convs = [WNConv2d(4, 6, 3), WNConv2d(6, 4, 1), nn.Conv2d(4, 6, 3), WNConv2d(4, 6, 3, bias=False)]
    convs += [MaskedWNConv2d(2, 12, 3, strict=True, mirrored=mirrored) for mirrored in (False, True, False)]
    convs += [MaskedWNConv2d(12, 12, 5, groups=12), MaskedWNConv2d(12, 2, 1, bias=True)]
    return randomized(nn.ModuleList(convs))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_stacked_weights_equal_those_of_each_layer(memory_format):
    convs = various_convs().to(memory_format=memory_format)
    parameters = list(convs.parameters())
    stacked = effective_weights(convs)
    alone = [plain_weight(conv) if isinstance(conv, WNConv2d) else conv.weight for conv in convs]
    probes = [images(*weight.shape, seed=index) for index, weight in enumerate(alone)]
    for ours, plain in zip(stacked, alone, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-15)
        assert ours.is_contiguous(memory_format=memory_format)
    gradients = [
        torch.autograd.grad(
            sum((probe * w).sum() for probe, w in zip(probes, weights, strict=True)), parameters, allow_unused=True
        )
        for weights in (stacked, alone)
    ]
    for ours, plain in zip(*gradients, strict=True):
        assert (ours is None) == (plain is None)  # biases have none
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


def test_a_channel_of_zeros_has_a_finite_gradient():
    """That of the quotient alone: the norm has none at zero."""
    conv = randomized(WNConv2d(4, 6, 3))
    with torch.no_grad():
        conv.weight[2] = 0
    probe = images(*conv.weight.shape)
    dweight, dlog_norm = torch.autograd.grad((conv.current_weight() * probe).sum(), [conv.weight, conv.log_norm])
    torch.testing.assert_close(dweight[2], probe[2] * conv.log_norm[2].exp() / 1e-5)
    assert dlog_norm[2] == 0


def test_find_convs_lists_convolutions_in_order_without_linear_layers():
    cell = ResidualCell(8, "down", CELLS["mbconv_sep"]["encoder"], squeeze_excitation=True)
    assert list(find_convs(cell)) == [
        *(f"skip.convs.{i}" for i in range(4)),
        *(f"branch.0.{name}" for name in ("expand", "depthwise", "project")),
    ]


# ---- masks and flows -------------------------------------------------------------------------------------------------


def test_mask_of_an_ungrouped_strict_convolution():
    mask = MaskedWNConv2d(2, 4, 3, strict=True).mask
    assert mask[:, :, 0].eq(1).all()
    assert mask[:, :, 2].eq(0).all()
    assert mask[:, :, 1, 0].eq(1).all()
    assert mask[:, :, 1, 2].eq(0).all()
    assert mask[:, :, 1, 1].tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]
    shrinking = MaskedWNConv2d(4, 2, 1).mask[:, :, 0, 0]
    assert shrinking.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert MaskedWNConv2d(4, 4, 3, groups=4).mask[:, 0, 1, 1].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("mirrored", [False, True])
def test_flow_jacobian_is_unit_triangular_in_its_order(mirrored):
    """Order: pixels in raster order (from the end when mirrored), channels inside each pixel always upwards."""
    channels, size = 2, 3
    flow = randomized(ShiftFlow(channels, mirrored))
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z[None])[0], images(channels, size, size))
    jacobian = jacobian.permute(1, 2, 0, 4, 5, 3)  # out: H, W, C; in: H, W, C
    if mirrored:
        jacobian = jacobian.flip(0, 1, 3, 4)
    matrix = jacobian.reshape(channels * size**2, channels * size**2)
    assert matrix.triu(1).eq(0).all()
    assert matrix.diagonal().eq(1).all()
    assert matrix.tril(-1).ne(0).any()


def test_flow_pair_preserves_volume():
    pair = randomized(FlowPair(2))
    jacobian = torch.autograd.functional.jacobian(lambda z: pair(z[None])[0], images(2, 4, 4)).reshape(32, 32)
    assert jacobian.det().item() == pytest.approx(1, abs=1e-9)
    assert jacobian.triu(1).ne(0).any()
    assert jacobian.tril(-1).ne(0).any()


# ---- depthwise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "padding"), [(5, 2), (3, 1), (3, 0)])
@pytest.mark.parametrize("images_per_call", [1, 2, 3])
def test_depthwise_gradients_equal_the_librarys(kernel, padding, images_per_call, monkeypatch):
    monkeypatch.setattr(depthwise, "ELEMENTS_PER_CALL", images_per_call * 6 * 9 * 7)
    x = images(3, 6, 9, 7).float().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = images(6, 1, kernel, kernel, seed=2).float().requires_grad_()
    ours = depthwise_conv2d(x, weight, padding)
    plain = F.conv2d(x, weight, padding=padding, groups=6)
    assert type(ours.grad_fn).__name__ != type(plain.grad_fn).__name__  # else nothing is compared
    torch.testing.assert_close(ours, plain)
    probe = images(*plain.shape, seed=3).float()
    for a, b in zip(*(torch.autograd.grad(y, [x, weight], probe) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_depthwise_goes_the_ordinary_way_elsewhere():
    conv = DepthwiseConv2d(6, 5)
    x = images(2, 6, 8, 8)
    for ordinary in (conv(x.float()), copy.deepcopy(conv).double()(x.contiguous(memory_format=torch.channels_last))):
        assert "Convolution" in type(ordinary.grad_fn).__name__


# ---- cells -----------------------------------------------------------------------------------------------------------


def test_factorized_reduce_is_four_strided_convolutions():
    reduce = randomized(FactorizedReduce(5, 10))
    x = images(2, 5, 8, 10)
    u = x * torch.sigmoid(x)
    parts = [
        F.conv2d(u[:, :, row:, column:], plain_weight(conv), conv.bias, stride=2)
        for conv, (row, column) in zip(reduce.convs, [(0, 0), (1, 1), (0, 1), (1, 0)], strict=True)
    ]
    torch.testing.assert_close(reduce(x), torch.cat(parts, dim=1), rtol=1e-12, atol=1e-12)
    assert [conv.out_channels for conv in reduce.convs] == [2, 2, 2, 4]


def test_upsample_project_is_interpolation_then_convolution():
    project = randomized(UpsampleProject(6, 3))
    x = images(2, 6, 5, 5)
    wide = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(project(x), F.conv2d(wide, plain_weight(project.conv)), rtol=1e-12, atol=1e-12)


def plain_inverted_residual(cell: InvertedResidual, x: Tensor) -> Tensor:
    """Upsampling first, every batch norm torch's own; buffers of `cell` are updated."""

    def bn(module: BatchNorm2d, h: Tensor) -> Tensor:
        buffers = module.running_mean, module.running_var
        return F.batch_norm(h, *buffers, module.weight, module.bias, module.training, 0.05, 1e-5)

    h = F.interpolate(x, scale_factor=2, mode="nearest") if cell.resize == "up" else x
    h = F.conv2d(bn(cell.bn_in, h), cell.expand.weight)
    h = F.conv2d(F.silu(bn(cell.bn_expand, h)), cell.depthwise.weight, padding=2, groups=cell.depthwise.groups)
    return bn(cell.bn_out, F.conv2d(F.silu(bn(cell.bn_depthwise, h)), cell.project.weight))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("resize", "out_channels"), [("same", 6), ("up", 3)])
def test_inverted_residual_equals_the_plain_form(resize, out_channels, training):
    cell = randomized(InvertedResidual(6, out_channels, resize, expansion=3)).train(training)
    plain = copy.deepcopy(cell)
    x = images(2, 6, 4, 4).requires_grad_()
    ours, expected = cell(x), plain_inverted_residual(plain, x)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)
    for name, buffer in plain.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(cell.get_buffer(name), buffer, rtol=1e-11, atol=1e-12)
    probe = images(*expected.shape, seed=5)
    a = torch.autograd.grad(ours, [x, *cell.parameters()], probe)
    b = torch.autograd.grad(expected, [x, *plain.parameters()], probe)
    for ours_grad, plain_grad in zip(a, b, strict=True):
        torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-9, atol=1e-9)


def test_residual_cell_adds_a_tenth_of_the_gated_branch():
    cell = randomized(ResidualCell(8, "same", CELLS["res_mbconv"]["encoder"], squeeze_excitation=True)).eval()
    x = images(2, 8, 4, 4)
    branch, se = cell.branch(x), cell.se
    hidden = F.relu(branch.mean((2, 3)) @ se.squeeze.weight.T + se.squeeze.bias)
    gate = torch.sigmoid(hidden @ se.excite.weight.T + se.excite.bias)[:, :, None, None]
    torch.testing.assert_close(cell(x), x + 0.1 * gate * branch)


@pytest.mark.parametrize(("channels", "hidden"), [(8, 4), (64, 4), (96, 6)])
def test_squeeze_excitation_width(channels, hidden):
    assert SqueezeExcitation(channels).squeeze.out_features == hidden


@pytest.mark.parametrize("name", CELLS)
def test_every_architecture_resizes_and_trains(name):
    for kind, resizes in [("preprocess", ["same", "down"]), ("encoder", ["same", "down"]), ("decoder", ["same", "up"])]:
        for resize in resizes:
            cell = ResidualCell(8, resize, CELLS[name][kind], squeeze_excitation=False)
            out = cell(torch.randn(2, 8, 12, 12))
            expected = {"same": (2, 8, 12, 12), "down": (2, 16, 6, 6), "up": (2, 4, 24, 24)}[resize]
            assert out.shape == expected
            out.square().mean().backward()
            assert all(parameter.grad is not None for parameter in cell.parameters())
