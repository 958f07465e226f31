"""Settings of torch's backends. What they change on a GPU cannot be seen here; that they are set, and undone, can."""

import os
import warnings

import pytest
import torch

from pipeline.distributed.device_settings import DEFAULT_SETTINGS, DeviceSettings
from pipeline.models.base import VAE
from pipeline.run.build import build_runtime
from tests.helpers.model_cases import ONE_PER_MODEL, build_case

WITHOUT_DETERMINISTIC_FORM = {
    "aten::_adaptive_avg_pool2d_backward",
    "aten::bincount",
    "aten::cumsum",
    "aten::grid_sampler_2d_backward",
    "aten::histc",
    "aten::max_unpool2d",
    "aten::nll_loss2d",
    "aten::put_",
    "aten::reflection_pad2d_backward",
    "aten::upsample_bicubic2d_backward",
    "aten::upsample_bilinear2d_backward",
}
"""Operators for floating-point images that torch.use_deterministic_algorithms lists as errors on CUDA."""

REPLACED = {"aten::upsample_bilinear2d_backward"}
"""torch.nn.functional.interpolate calls another algorithm in deterministic mode, except on CPUs."""


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    DEFAULT_SETTINGS.apply()


def found() -> dict[str, bool]:
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "benchmark": cudnn.benchmark,
        "tf32": cudnn.allow_tf32,
        "tf32 of products": cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn deterministic": cudnn.deterministic,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


USUAL = {"benchmark": True, "tf32": True, "tf32 of products": True}
STRICT = {"benchmark": False, "deterministic": True, "cudnn deterministic": True, "cublas": ":4096:8"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), USUAL),
        (("train.tf32=false",), USUAL | {"tf32": False, "tf32 of products": False}),
        (("train.cudnn_benchmark=false",), USUAL | {"benchmark": False}),
        (("train.deterministic=true",), USUAL | STRICT),
        (("train.deterministic=true", "train.cudnn_benchmark=true"), USUAL | STRICT),
    ],
)
def test_settings_of_the_recipe_reach_torch(make_recipe, make_runtime, overrides, expected):
    make_runtime()  # resets Accelerate
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_runtime(make_recipe(*overrides).train)
    assert found() == {"deterministic": False, "cudnn deterministic": False, "cublas": None} | expected
    assert torch.get_float32_matmul_precision() == ("high" if expected["tf32"] else "highest")  # the compiler reads it


def test_the_users_own_workspace_of_cublas_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    DeviceSettings(deterministic=True).apply()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_bucket_size_reaches_ddp(make_recipe, make_runtime):
    make_runtime()
    runtime = build_runtime(make_recipe("train.ddp_bucket_mb=7").train)
    assert runtime.accelerator.ddp_handler.bucket_cap_mb == 7


def operators_of_a_step(model: VAE, x, noise, condition) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        out = model(x, noise, condition)
        (out.elbo.sum() + sum(term.sum() for term in out.penalties.values())).backward()
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("case", ONE_PER_MODEL.values())
def test_every_operator_of_a_model_has_a_deterministic_form(case):
    """By torch's list. On a GPU, `make gpu-check` trains in deterministic mode."""
    used = operators_of_a_step(*build_case(case))
    assert {"aten::convolution_backward", "aten::mm"} & used
    assert used & WITHOUT_DETERMINISTIC_FORM <= REPLACED
