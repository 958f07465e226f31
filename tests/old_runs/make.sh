#!/usr/bin/env bash
# How the runs in this folder were made, once, by the code of commit 4bcdb05 (2026-11-25), in that commit's checkout.
# They are kept as they are: tests/test_old_runs.py shows that today's code still resumes, loads, evaluates and samples
# them. Do not run this again with later code.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/old_runs
python -m shard_data toy_faces --size 16 --train 24 --val 8 --test 8 --out $here/faces
python pipeline/train_classifier.py --data $here/faces --out $here/classifier --epochs 1 --width 4
for model in nvae attribute_vae; do
    python pipeline/train.py --config $here/recipes/$model.yaml --run-dir $here/$model
    cp -r $here/$model "$here/$model.longer"
    python pipeline/train.py --config $here/recipes/$model.yaml --run-dir "$here/$model.longer" train.steps=12
    mv "$here/$model.longer/metrics.jsonl" "$here/$model.twelve_steps.jsonl"
    rm -r "$here/$model.longer"
done
python pipeline/evaluate.py $here/nvae --split val --importance-samples 5
python pipeline/evaluate.py $here/attribute_vae --split val
rm -rf $here/*/samples $here/*/reconstructions $here/*/*.lock
python - <<'PYTHON'
import numpy, pipeline
for model in ("nvae", "attribute_vae"):
    images = pipeline.load(f"tests/old_runs/{model}").sample(4, temperature=0.7, seed=3, condition={"Smiling": 1})
    numpy.save(f"tests/old_runs/{model}.samples.npy", images.numpy())
PYTHON
