"""Mistakes in pipeline/storage."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "the oldest checkpoint is the latest",
        "pipeline/storage/checkpoint.py",
        "lambda steps: steps[::-1]",
        "lambda steps: steps",
        ("tests/storage/test_checkpoint.py",),
    ),
    Mutation(
        "the highest score is the best",
        "pipeline/storage/checkpoint.py",
        "return sorted(scores, key=scores.__getitem__)",
        "return sorted(scores, key=scores.__getitem__, reverse=True)",
        ("tests/storage/test_checkpoint.py",),
    ),
    Mutation(
        "the best is not kept",
        "pipeline/storage/checkpoint.py",
        "min(scored, key=scores.__getitem__, default=None)",
        "None",
        ("tests/storage/test_checkpoint.py",),
    ),
    Mutation(
        "a non-finite score can be the best",
        "pipeline/storage/checkpoint.py",
        "score is not None and math.isfinite(score)",
        "score is not None",
        ("tests/storage/test_checkpoint.py", "tests/storage/test_checkpoint_faults.py"),
    ),
    Mutation(
        "a checkpoint of another run is used",
        "pipeline/storage/checkpoint.py",
        'return self.run_id is None or facts.get("run_id") in (None, self.run_id)',
        "return True",
        ("tests/storage/test_run_id.py",),
    ),
    Mutation(
        "old checkpoints are deleted before the new one is written",
        "pipeline/storage/checkpoint.py",
        "                self._make_room(step, size_of(snapshot))\n",
        "                self._make_room(step, size_of(snapshot))\n                self._delete_old(step)\n",
        ("tests/storage/test_checkpoint_faults.py",),
    ),
    Mutation(
        "hashes are not compared",
        "pipeline/storage/checkpoint_folder.py",
        "if hashlib.sha256(content).hexdigest() != facts.sha256:",
        "if False:",
        ("tests/storage/test_checkpoint.py",),
    ),
    Mutation(
        "sizes are not compared",
        "pipeline/storage/checkpoint_folder.py",
        "    if size != expected:",
        "    if False:",
        ("tests/storage/test_hostile_checkpoints.py", "tests/storage/test_checkpoint.py"),
    ),
    Mutation(
        "a snapshot shares memory with the weights",
        "pipeline/storage/checkpoint_folder.py",
        'tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)',
        'tensor.detach().to("cpu", memory_format=torch.contiguous_format)',
        ("tests/storage/test_checkpoint.py",),
    ),
    Mutation(
        "the facts are not synced",
        "pipeline/storage/checkpoint_folder.py",
        "    _write_synced(folder / META, content)\n",
        "    (folder / META).write_bytes(content)\n",
        ("tests/storage/test_checkpoint_faults.py",),
    ),
    Mutation(
        "the last checkpoint is not tried again",
        "pipeline/storage/checkpoint_writer.py",
        "        for seconds in self._retry_after:",
        "        for seconds in ():",
        ("tests/storage/test_checkpoint_writer.py",),
    ),
    Mutation(
        "a second save does not wait",
        "pipeline/storage/checkpoint_writer.py",
        "        self._await_write()\n        self._fault = None",
        "        self._fault = None",
        ("tests/storage/test_checkpoint_writer.py",),
    ),
    Mutation(
        "repeated steps stay in metrics.jsonl",
        "pipeline/storage/metrics_file.py",
        'return record is not None and record["step"] <= last_step',
        "return record is not None",
        ("tests/storage/test_metrics_file.py",),
    ),
)
