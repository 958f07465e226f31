"""From the location of a trained model to a `TrainedModel` on a device."""

from pathlib import Path

import torch

from pipeline.inference.locations import find_model
from pipeline.inference.model_folder import content_of, is_averaged, training_dtype, weights_stem
from pipeline.inference.text import printable
from pipeline.inference.trained import TrainedModel
from pipeline.models.base import use_channels_last
from pipeline.models.conditions import ClassCondition
from pipeline.recipe import Recipe, build_model
from pipeline.storage.checkpoint_folder import Checkpoint


def load(
    location: Path | str,
    checkpoint: Path | str | int = "latest",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TrainedModel:
    """The trained model of a run, with the moving average of its weights if the run kept one, or of a model folder.

    `location`: a run folder, a checkpoint's folder, a model folder, `local-dir:FOLDER`, or
    `hf-hub:OWNER/NAME[@REVISION]`. `checkpoint`, of a run: "latest", "best" by validation, a step, or a checkpoint's
    folder. `device`: by default a GPU if there is one. `dtype`: by default float32, or float64 for runs trained in it.
    Nothing in the folder can run code, and the memory needed is in proportion to the size of its files. Raises
    ValueError if it holds no valid model that this version can use.
    """
    found, place = find_model(location, checkpoint)
    content = content_of(found)
    recipe = content.recipe
    device = find_device(device)
    dtype = dtype or training_dtype(recipe)
    with torch.random.fork_rng():  # the initial weights, which are replaced, do not change the caller's generator
        model = build_model(recipe).to(training_dtype(recipe))
    if recipe.train.channels_last:
        use_channels_last(model)
    model.load_state_dict(content.weights)
    model.requires_grad_(False).eval().to(device, dtype)
    return TrainedModel(
        model=model,
        recipe=recipe,
        step=found.step,
        path=found.path,
        place=place,
        facts=found.facts,
        averaged=is_averaged(found),
        weights_sha256=found.sha256[weights_stem(found)],
        classes=class_names(recipe, found),
        device=device,
        dtype=dtype,
    )


def find_device(wanted: torch.device | str | None) -> torch.device:
    """Raises ValueError for a device that does not exist."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {wanted}: {str(error).splitlines()[0]}") from None
    return device


def class_names(recipe: Recipe, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the classes that the model is conditioned on; their numbers if the checkpoint does not hold names."""
    if not isinstance(recipe.condition, ClassCondition):
        return ()
    names = checkpoint.facts.get("classes")
    numbers = tuple(str(number) for number in range(recipe.condition.num_classes))
    fit = isinstance(names, list) and len(names) == len(numbers) and all(isinstance(name, str) for name in names)
    return tuple(map(printable, names)) if fit else numbers
