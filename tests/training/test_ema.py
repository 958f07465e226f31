"""The moving average of weights, and swapping it in and out of a model."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.ema import EMA


def small_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def disturb(model: nn.Module, seed: int) -> None:
    """As a training step would: parameters move in place, batch norm's statistics too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    model(torch.randn(2, 3, 5, 5, generator=generator))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        same = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
        other = right[name].contiguous().view(torch.uint8) if tensor.dim() else right[name].view(1).view(torch.uint8)
        assert torch.equal(same, other), name


def test_average_of_parameters_and_statistics():
    """Against the recursion in float64, with the decay that grows from 1/10 up to its limit."""
    model = small_model()
    ema = EMA(model, decay=0.5)
    expected = {name: tensor.double() for name, tensor in snapshot(model).items()}
    for step in range(12):
        disturb(model, step)
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    for name, tensor in ema.state().items():
        if name.endswith("num_batches_tracked"):
            assert tensor == 12
        else:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_average_follows_a_model_whose_buffers_were_replaced():
    """As `model.to` does."""
    model = small_model()
    ema = EMA(model, decay=0.5)
    before = ema.state()["1.running_mean"].clone()
    model._apply(torch.clone)
    disturb(model, 1)
    ema.update(model, step=0)
    torch.testing.assert_close(ema.state()["1.running_mean"], 0.1 * before + 0.9 * model[1].running_mean)
    assert ema.state()["1.num_batches_tracked"] == 1


def test_early_decay():
    model = small_model()
    ema = EMA(model, decay=0.999)
    start = ema.state()["0.weight"].clone()
    disturb(model, 1)
    ema.update(model, step=0)
    torch.testing.assert_close(ema.state()["0.weight"], 0.1 * start + 0.9 * model[0].weight.detach())


def test_without_a_warmup_the_decay_is_the_same_at_every_step():
    model = small_model().double()
    ema = EMA(model, decay=0.9999, warmup=False)
    expected = ema.state()["0.weight"].clone()
    for step in range(3):
        disturb(model.float(), step)
        model.double()
        ema.update(model, step)
        expected = 0.9999 * expected + (1 - 0.9999) * model[0].weight.detach()
    torch.testing.assert_close(ema.state()["0.weight"], expected, rtol=1e-15, atol=1e-15)


def test_average_is_apart_from_the_model():
    model = small_model()
    ema = EMA(model, decay=0.9)
    before = {name: tensor.clone() for name, tensor in ema.state().items()}
    disturb(model, 1)
    assert_same_bits(ema.state(), before)


def test_applied_swaps_and_restores_bit_for_bit():
    model = small_model()
    ema = EMA(model, decay=0.9)
    for step in range(3):
        disturb(model, step)
        ema.update(model, step)
    disturb(model, 9)
    with torch.no_grad():
        model[0].bias[0], model[0].bias[1] = -0.0, float("nan")
    own, parameters = snapshot(model), [id(parameter) for parameter in model.parameters()]
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    with ema.applied(model):
        assert_same_bits(snapshot(model), ema.state())
        model(torch.randn(2, 3, 5, 5))  # moves running statistics; that must not last
    assert_same_bits(snapshot(model), own)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [parameter.data_ptr() for parameter in model.parameters()] == storage


def test_applied_restores_after_an_error():
    model = small_model()
    ema = EMA(model, decay=0.9)
    disturb(model, 1)
    own = snapshot(model)
    with pytest.raises(RuntimeError, match="in the middle"), ema.applied(model):
        raise RuntimeError("in the middle")
    assert_same_bits(snapshot(model), own)


def test_what_happens_to_the_model_does_not_reach_the_average():
    model = small_model()
    ema = EMA(model, decay=0.9)
    before = {name: tensor.clone() for name, tensor in ema.state().items()}
    with ema.applied(model):
        disturb(model, 1)
    assert_same_bits(ema.state(), before)


def test_resuming_from_a_state_equals_continuing():
    models = [small_model(), small_model()]
    uninterrupted, stopped = EMA(models[0], 0.9), EMA(models[1], 0.9)
    for step in range(6):
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in stopped.state().items()}
            stopped = EMA(small_model(seed=5), 0.9)
            stopped.load_state(saved)
        for model, ema in zip(models, (uninterrupted, stopped), strict=True):
            disturb(model, step)
            ema.update(model, step)
    assert_same_bits(uninterrupted.state(), stopped.state())


def test_layout_is_kept():
    model = small_model().to(memory_format=torch.channels_last)
    ema = EMA(model, 0.9)
    ema.load_state({name: tensor.contiguous() for name, tensor in ema.state().items()})
    assert ema.state()["0.weight"].is_contiguous(memory_format=torch.channels_last)
    with ema.applied(model):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_state_loads_into_a_model():
    model = small_model()
    ema = EMA(model, 0.9)
    disturb(model, 1)
    ema.update(model, 0)
    other = small_model(seed=3)
    other.load_state_dict(ema.state())
    assert_same_bits(other.state_dict(), ema.state())


def test_a_state_of_another_model_is_refused():
    ema = EMA(small_model(), 0.9)
    state = ema.state()
    with pytest.raises(ValueError, match=r"0\.bias"):
        ema.load_state({name: tensor for name, tensor in state.items() if name != "0.bias"})
    with pytest.raises(ValueError, match="stranger"):
        ema.load_state(state | {"stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"0\.weight.*\(4, 3, 1, 1\)"):
        ema.load_state(state | {"0.weight": torch.zeros(4, 3, 1, 1)})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(small_model(), decay)
