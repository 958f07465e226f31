"""Trains the cases of TWO_PROCESS_CASES in float64 and writes the losses. test_model_training.py launches it."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from pipeline.distributed.runtime import Runtime  # noqa: E402
from tests.helpers.compiling import no_compiler_needed  # noqa: E402
from tests.helpers.model_cases import TWO_PROCESS_CASES, make_recipe, train_losses  # noqa: E402

COMPILED_CASES = ["nvae", "vdvae", "conv_vae by attributes"]
data, out = Path(sys.argv[1]), Path(sys.argv[2])
runtime = Runtime("fp64", cpu_threads=1)
losses = {
    case: train_losses(make_recipe(case, data, "train.precision=fp64"), runtime, steps=3) for case in TWO_PROCESS_CASES
}
with no_compiler_needed("aot_eager") as stats:
    compiled = {
        case: train_losses(make_recipe(case, data, "train.precision=fp64", "train.compile=whole"), runtime, steps=3)
        for case in COMPILED_CASES
    }
results = {"world_size": runtime.world_size, "losses": losses, "compiled": compiled, "graphs": stats["unique_graphs"]}
if runtime.is_main:
    out.write_text(json.dumps(results))
runtime.close()
