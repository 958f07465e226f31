"""Run folders of models that were never trained, for the tests of the tools: fast to make, and like any other."""

from pathlib import Path

import torch

from pipeline.config import build
from pipeline.models.classifier import Classifier, ClassifierConfig
from pipeline.recipe import Recipe, build_model
from pipeline.run.classifier_folder import save_classifier
from pipeline.storage.checkpoint import Checkpoints
from tests.helpers.model_cases import MLP
from tests.helpers.recipes import tiny_settings

STEP = 7


def fast_settings(root: Path) -> dict:
    """A recipe that is fast to load and evaluate."""
    return tiny_settings(root) | {"model": dict(MLP), "regularizers": {"strength": 0.0}}


def make_run(
    folder: Path, settings: dict, classes: list[str] | None = None, seed: int = 5, fingerprint: str = ""
) -> Path:
    """A run with one checkpoint, of step 7, whose moving average differs from its weights."""
    recipe = build(Recipe, settings)
    torch.manual_seed(seed)
    dtype = torch.float64 if recipe.train.precision == "fp64" else torch.float32
    average, weights = (build_model(recipe).to(dtype).state_dict() for _ in range(2))
    facts = {"settings": recipe.model_dump(mode="json"), "data_fingerprint": fingerprint, "classes": classes}
    tensors = {"model": weights} | ({"ema": spread(average)} if recipe.train.ema_decay else {})
    folder.mkdir(parents=True, exist_ok=True)
    Checkpoints(folder / "checkpoints").save(STEP, tensors, facts, score=1.0)
    return folder


def make_judge(folder: Path, kind: str, names: list[str], image_shape: tuple[int, int, int] = (3, 16, 16)) -> str:
    """The folder of an untrained classifier."""
    torch.manual_seed(2)
    config = ClassifierConfig(kind=kind, names=names, image_shape=image_shape, width=4)
    save_classifier(Classifier(config), folder, 0, {})
    return str(folder)


def spread(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights pushed about, so that nothing that starts at zero hides what depends on it."""
    noisy = {
        name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items() if tensor.is_floating_point()
    }
    return state | {name: tensor.abs() if "running_var" in name else tensor for name, tensor in noisy.items()}
