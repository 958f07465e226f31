"""A NaN or a large gradient on one process is skipped by all of them, and leaves no trace on any."""

import json

import pytest

from tests.helpers.model_cases import make_recipe, make_trainer, write_data
from tests.helpers.rank_scripts import run_script, write_script

PLACES = ("data", "activation", "loss", "gradient", "loss alone", "norm")

SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import torch
from pipeline.distributed.runtime import Runtime
from tests.helpers.model_cases import make_recipe, make_trainer

folder = Path(sys.argv[1])
runtime = Runtime("fp32", cpu_threads=1)
results = {}


def digest(trainer):
    parts = trainer.state.tensors()
    content = [tensor.numpy().tobytes() for part in parts.values() for tensor in part.values()]
    return hashlib.sha256(b"".join(content)).hexdigest()


def poison(trainer, place):
    \"\"\"Puts a NaN in one place of the next step; returns what takes it away.\"\"\"
    model = trainer.model
    if place == "data":
        inputs = trainer.data.model_inputs
        trainer.data.model_inputs = lambda batch: (inputs(batch)[0] * torch.nan, inputs(batch)[1])
        return lambda: setattr(trainer.data, "model_inputs", inputs)
    if place == "activation":
        return model.postprocess[0].register_forward_hook(lambda *args: args[2] * torch.nan).remove
    if place == "gradient":
        return next(model.parameters()).register_hook(lambda gradient: gradient * torch.inf).remove
    loss = trainer._loss
    if place == "norm":  # of this rank's gradient; the other's stays small until they are averaged
        trainer._loss = lambda step, batch: loss(step, batch) * 1e9
    elif place == "loss alone":  # gradients stay finite, and DDP carries nothing of it to the other rank
        trainer._loss = lambda step, batch: loss(step, batch) + torch.inf
    else:
        trainer._loss = lambda step, batch: loss(step, batch) * torch.nan
    return lambda: setattr(trainer, "_loss", loss)


for place in ("data", "activation", "loss", "gradient", "loss alone", "norm"):
    trainer = make_trainer(make_recipe("nvae", folder / "labelled", "optim.skip_threshold=1e8"), runtime)
    stream = iter(trainer.data.batches(0))
    steps, digests = [], []
    for step in range(3):
        clean = poison(trainer, place) if step == 1 and runtime.rank == 1 else lambda: None
        skipped = trainer.train_step(step, [next(stream)])
        steps.append(skipped is None)
        clean()
        digests.append(digest(trainer))
        if step == 1:
            reasons = str(skipped)
    results[place] = [steps, digests, reasons]
trainer = make_trainer(make_recipe("mlp_vae", folder / "labelled"), runtime)
assert trainer.train_step(0, [next(iter(trainer.data.batches(0)))]) is None
results["norm of an mlp_vae"] = trainer.interval_scalars()["train/grad_norm"]
(folder / f"{runtime.rank}.json").write_text(json.dumps(results))
runtime.close()
"""


@pytest.mark.slow
def test_what_one_rank_must_skip_is_skipped_by_both(tmp_path, make_runtime):
    labelled = write_data(tmp_path)
    result = run_script(2, write_script(tmp_path, SCRIPT))
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert list(first) == [*PLACES, "norm of an mlp_vae"]
    assert first["norm of an mlp_vae"] == second["norm of an mlp_vae"]
    alone = make_trainer(make_recipe("mlp_vae", labelled), make_runtime())
    assert alone.train_step(0, [next(iter(alone.data.batches(0)))]) is None
    norm = alone.interval_scalars()["train/grad_norm"]  # of the whole batch, whatever the number of processes
    assert first["norm of an mlp_vae"] == pytest.approx(norm, rel=1e-5)
    for place in PLACES:
        steps, digests, reason = first[place]
        assert reason == second[place][2], place
        assert reason.startswith("gradient norm" if place == "norm" else "non-finite"), place
        assert steps == second[place][0] == [True, False, True], place
        assert digests == second[place][1], place
        assert digests[0] == digests[1] != digests[2], place  # the skipped step changed no bit
