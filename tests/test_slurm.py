"""The scripts of slurm/ on a real SLURM (tests/helpers/slurm_lab.py), with real training of a tiny model on CPUs.

Skipped where SLURM_LAB is unset. The long ones need SLURM_LONG=1 too, as `make test-slurm` sets it.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.slurm_lab import ON_CPUS, Checkout, Job, Lab

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]  # one cluster for all of them

SLURM = Path(__file__).parents[1] / "slurm"
SCRIPTS = sorted(path.stem for path in SLURM.glob("*.sh") if "#SBATCH" in path.read_text())
long = pytest.mark.skipif(not os.environ.get("SLURM_LONG"), reason="SLURM_LONG is unset: make test-slurm runs it")

TINY = """
    model.groups_per_scale=[1,1] model.encoder_channels=4 model.decoder_channels=4 model.latent_channels=2
    model.num_preprocess_cells=1 model.num_postprocess_cells=1 model.num_encoder_cells=1 model.num_decoder_cells=1
    model.num_flows=0 data.workers=0 train.batch_size=4 train.epochs=null train.precision=fp32 optim.warmup_epochs=0
    validation.every=1000 validation.images=4 validation.batch_size=4 samples.every=1000 samples.count=2
    checkpoint.every=1000 tracking.log_every=1 tracking.wandb=disabled
""".split()
"""NVAE's celeba64 recipe, small enough for a step in a fifth of a second."""


@pytest.fixture(scope="module")
def lab():
    script = os.environ.get("SLURM_LAB")
    if not script:
        pytest.skip("SLURM_LAB is unset: it names the script that brings up a SLURM cluster on this machine")
    cluster = Lab(script)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def faces(lab, tmp_path_factory) -> Path:
    """Toy faces of 64x64, made by the job that users make shards with."""
    checkout = Checkout(lab, tmp_path_factory.mktemp("shards"))
    words = "toy_faces --size 64 --train 64 --val 8 --test 8 --shard-size 16 --out data/celeba64".split()
    job = checkout.submit("--cpus-per-task=2", "slurm/shard_data.sh", *words)
    assert job.wait() == "COMPLETED", job.log()
    assert "toy_faces is complete (train 64, val 8, test 8 images)" in job.log()
    return checkout.folder / "data" / "celeba64"


@pytest.fixture
def checkout(lab, tmp_path) -> Checkout:
    return Checkout(lab, tmp_path)


@pytest.fixture
def with_faces(checkout, faces) -> Checkout:
    (checkout.folder / "data").mkdir()
    (checkout.folder / "data" / "celeba64").symlink_to(faces)
    return checkout


def steps(folder: Path) -> list[int]:
    """Of the training lines that are in metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = (json.loads(line) for line in lines)
    return [record["step"] for record in records if "train/loss" in record]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def check_finished(job: Job, run: Path, total: int) -> None:
    """Finished, with every step once in metrics.jsonl."""
    assert job.wait() == "COMPLETED", job.log()
    assert job.exit_code() == 0
    assert status(run)["state"] == "finished", job.log()
    assert steps(run) == list(range(1, total + 1))


# --- submission


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_cluster_accepts_every_script_as_written(lab, script, nodes):
    asked = lab.run("sbatch", "--test-only", f"--nodes={nodes}", f"slurm/{script}.sh")
    assert asked.returncode == 0, asked.stderr
    assert "to start at" in asked.stderr
    assert ("node[1-2]" in asked.stderr) == (nodes == 2)


def test_missing_shards_name_the_job_that_makes_them(checkout):
    message = "slurm/submit.sh slurm/shard_data.sh celeba --size 64 --source DIR --out data/celeba64"
    refused = checkout.run("slurm/submit.sh", "slurm/nvae_celeba.sh")
    assert refused.returncode == 2
    assert message in refused.stderr
    assert checkout.run("squeue", "--noheader").stdout == ""
    job = checkout.submit("slurm/nvae_celeba.sh")  # plain sbatch cannot look: the job's first act does
    assert job.wait() == "FAILED"
    assert job.exit_code() == 2
    assert message in job.log()
    assert "attempt 0" not in job.log()


def test_a_mistyped_setting_is_told_before_the_job_is_queued(with_faces):
    refused = with_faces.run("slurm/submit.sh", "slurm/nvae_celeba.sh", "train.batchsize=3")
    assert refused.returncode != 0
    assert "train.batchsize: unknown key; did you mean 'batch_size'?" in refused.stderr
    assert "Submitted" not in refused.stdout


@pytest.mark.parametrize("word", ["--run-dir=x", "--data=x", "data.root=x", "--config=x", "--model=nvae"])
def test_words_that_the_launcher_needs_to_know_are_given_as_variables(with_faces, word):
    refused = with_faces.run("slurm/submit.sh", "slurm/nvae_celeba.sh", word)
    assert refused.returncode == 2
    assert f"not by {word}" in refused.stderr


def test_an_unknown_baseline_lists_the_recipes(checkout):
    refused = checkout.run("slurm/submit.sh", "slurm/baselines.sh", "nosuch")
    assert refused.returncode == 2
    assert "no recipe 'nosuch'" in refused.stderr
    assert "nvae_mnist_small" in refused.stderr


# --- the code of a queued job

SAYS = "import sys\nfrom pathlib import Path\nprint('{}', Path(sys.argv[sys.argv.index('--config') + 1]).read_text())\n"


def test_a_job_that_waits_runs_the_code_it_was_submitted_with(with_faces):
    """Also of the second attempt, and also its own recipe file."""
    with_faces.replace_training(SAYS.format("as submitted"))
    recipe = with_faces.folder / "mine.yaml"
    recipe.write_text("data: {root: data/celeba64}\nmodel: old\n")
    job = with_faces.submit("--hold", *ON_CPUS, "slurm/baselines.sh", "mine.yaml", by="slurm/submit.sh")
    with_faces.replace_training(SAYS.format("edited since"))
    recipe.write_text("data: {root: nowhere}\nmodel: new\n")
    shutil.rmtree(with_faces.folder / "slurm")
    with_faces.run("scontrol", "release", job.number)
    assert job.wait() == "COMPLETED", job.log()
    assert "as submitted" in job.log()
    assert "model: old" in job.log()


def test_plain_sbatch_notices_edits_made_while_the_job_waited(with_faces):
    job = with_faces.submit("--begin=now+3", *ON_CPUS, "slurm/nvae_celeba.sh")
    with_faces.run("sleep", "2")
    with_faces.replace_training(SAYS.format("edited since"))
    assert job.wait() == "FAILED"
    assert job.exit_code() == 2
    assert "changed since the job was submitted" in job.log()
    assert "  pipeline/train.py\n" in job.log()
    assert "edited since" not in job.log()


# --- what ends a job, and what requeues it. The program in training's place writes the documented mark itself.

ENDS = """import sys
from pathlib import Path
from pipeline.storage.status import StatusFile
folder = Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
file = StatusFile(folder)
attempt = file.begin({step}, 100)
print("program: attempt", attempt, flush=True)
{then}
"""


def submit_that(
    checkout: Checkout, then: str, step: str = "0", options: tuple[str, ...] = (), **env: str
) -> tuple[Job, Path]:
    checkout.replace_training(ENDS.format(step=step, then=then))
    job = checkout.submit(*ON_CPUS, *options, "slurm/nvae_celeba.sh", **env)
    return job, checkout.folder / "runs" / "nvae_celeba64"


def test_an_error_that_repetition_does_not_fix_ends_the_job(with_faces):
    job, run = submit_that(with_faces, "file.end('failed', 'optim.lr'); sys.exit(2)")
    assert job.wait() == "FAILED"
    assert job.exit_code() == 2
    assert status(run)["attempt"] == 1
    assert f"failed: runs/{run.name}/status.json says why; not requeued" in job.log()


def test_kills_without_progress_are_bounded(with_faces):
    job, run = submit_that(with_faces, "sys.exit(9)", MAX_FAILURES="2")
    assert job.wait() == "FAILED"
    assert job.exit_code() == 75
    assert status(run)["attempt"] == 2
    assert "2 attempts in a row failed without progress" in job.log()


@long
def test_attempts_that_go_further_are_bounded_by_their_number(with_faces):
    """One stop on purpose and two kills with progress: MAX_FAILURES=1 allows them all, MAX_ATTEMPTS=3 no fourth."""
    then = "if attempt == 1:\n    file.end('preempted', 'SIGUSR1'); sys.exit(0)\nsys.exit(9)"
    job, run = submit_that(
        with_faces, then, step="10 * StatusFile(file.folder).status.attempt", MAX_FAILURES="1", MAX_ATTEMPTS="3"
    )
    assert job.wait() == "FAILED"
    assert job.exit_code() == 75
    assert status(run)["attempt"] == 3
    assert "the last of 3 attempts" in job.log()


def test_a_crash_after_the_end_does_not_matter(with_faces):
    job, run = submit_that(with_faces, "file.end('finished'); sys.exit(9)")
    assert job.wait() == "COMPLETED", job.log()
    assert status(run)["attempt"] == 1


# --- training


def train(checkout: Checkout, total: int, *words: str, options: tuple[str, ...] = ("--nodes=2",), **env: str) -> Job:
    return checkout.submit(*options, *ON_CPUS, "slurm/nvae_celeba.sh", *TINY, f"train.steps={total}", *words, **env)


def test_signalled_on_two_nodes_it_saves_requeues_itself_goes_on_and_finishes(with_faces, lab):
    """The signal gives the only checkpoint; the shards are copied to the nodes' own disks; the second attempt runs the
    code of the first."""
    run = with_faces.folder / "runs" / "nvae_celeba64"
    job = train(with_faces, 40, STAGE=str(lab.scratch))
    job.wait_for(lambda: len(steps(run)) >= 3)
    with_faces.replace_training("raise SystemExit('edited since')")
    with_faces.run("scancel", "--batch", "--signal=USR1", job.number)
    check_finished(job, run, 40)
    assert "nvae on 2 processes" in job.log()
    assert job.log().count("attempt 0 stopped: preempted") == 1
    assert f"job {job.number}, attempt 1 on node[1-2]" in job.log()
    assert status(run)["attempt"] == 2
    for node in ("node1", "node2"):
        copies = [line for line in job.log().splitlines() if line.startswith(f"{node}: ") and "is complete" in line]
        assert [line.split(", ")[-1] for line in copies] == ["12 of them copied now", "0 of them copied now"]


def test_an_array_trains_one_seed_per_task(with_faces):
    array = train(with_faces, 4, options=("--nodes=1", "--array=1-2"))
    for seed in (1, 2):
        job = Job(with_faces, f"{array.number}_{seed}")
        assert job.wait() == "COMPLETED", [path.read_text() for path in with_faces.folder.glob("*.log")]
        run = with_faces.folder / "runs" / f"nvae_celeba64-seed{seed}"
        assert steps(run) == [1, 2, 3, 4]
        assert f"seed: {seed}," in (run / "config.yaml").read_text()
    losses = {(with_faces.folder / f"runs/nvae_celeba64-seed{seed}/metrics.jsonl").read_text() for seed in (1, 2)}
    assert len(losses) == 2


# --- the long ones


@long
def test_evaluation_of_a_baseline_on_two_nodes(with_faces):
    """A model by its name, trained from DATA, and the figures of its test split."""
    words = "conv_vae train.epochs=null train.steps=2 train.batch_size=4 tracking.wandb=disabled data.workers=0".split()
    trained = with_faces.submit(*ON_CPUS, "slurm/baselines.sh", *words, by="slurm/submit.sh")
    assert trained.wait() == "COMPLETED", trained.log()
    words = "runs/conv_vae --data data/celeba64 --split test --importance-samples 2".split()
    job = with_faces.submit("--nodes=2", *ON_CPUS, "slurm/evaluate.sh", *words, by="slurm/submit.sh")
    assert job.wait() == "COMPLETED", job.log()
    (report,) = (with_faces.folder / "runs" / "conv_vae").glob("evaluations/elbo_test_step_00000002*.json")
    assert "elbo" in report.read_text()


@long
@pytest.mark.timeout(1200)
def test_at_the_time_limit_it_saves_and_goes_on(with_faces):
    """SLURM itself sends the signal, up to a minute early. A busy machine needs several attempts."""
    run = with_faces.folder / "runs" / "nvae_celeba64"
    job = train(with_faces, 300, options=("--nodes=2", "--time=2", "--signal=B:USR1@60"))
    assert job.wait(1000) == "COMPLETED", job.log()
    check_finished(job, run, 300)
    assert "attempt 0 stopped: preempted" in job.log()


@long
def test_shards_go_on_where_the_signal_stopped_them(checkout):
    words = "toy_faces --size 64 --train 8000 --val 1 --test 1 --shard-size 250 --workers 1 --out data/faces"
    job = checkout.submit("slurm/shard_data.sh", *words.split())
    journal = checkout.folder / "data" / "faces" / "unfinished.jsonl"
    job.wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 3)
    first = journal.with_name("train-000000.tar")
    made = first.stat().st_ino
    checkout.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for(lambda: job.state() == "PENDING")
    assert not (checkout.folder / "data" / "faces" / "manifest.json").exists()
    assert job.wait() == "COMPLETED", job.log()
    assert "attempt 0 stopped: preempted" in job.log()
    assert first.stat().st_ino == made, "a finished shard was made again"


@long
def test_a_program_that_does_not_stop_is_requeued_before_the_time_limit(with_faces):
    """Otherwise SLURM would end the job without requeueing it."""
    then = "import signal, time; signal.signal(signal.SIGUSR1, signal.SIG_IGN); time.sleep(999 if attempt == 1 else 0)"
    job, _ = submit_that(with_faces, f"{then}; file.end('finished')", options=("--time=1", "--signal=B:USR1@30"))
    assert job.wait() == "COMPLETED", job.log()
    assert "the step did not stop in time; not waiting any longer" in job.log()
    assert "attempt 0 stopped: running" in job.log()


@long
def test_a_dead_node(with_faces, lab):
    run = with_faces.folder / "runs" / "nvae_celeba64"
    job = train(with_faces, 60, "checkpoint.every=2", MAX_FAILURES="10")
    job.wait_for(lambda: len(steps(run)) >= 5)
    lab.control("node-fail", "node2")
    job.wait_for(lambda: job.state() == "PENDING", 90)  # SLURM has noticed, and has put the job back
    lab.control("node-start", "node2")
    check_finished(job, run, 60)
    assert status(run)["attempt"] >= 2


@long
def test_preemption(with_faces):
    check_preemption(with_faces)


@long
def test_preemption_by_the_signal_of_the_time_limit(lab, faces, tmp_path):
    """The other configuration: the batch script gets the signal instead of the steps."""
    other = Lab(lab.script, SLAB_EXTRA_CONF="SlurmctldParameters=preempt_send_user_signal", SLAB_NET="10.78.0")
    try:
        other.up()
        checkout = Checkout(other, tmp_path)
        (checkout.folder / "data").mkdir()
        (checkout.folder / "data" / "celeba64").symlink_to(faces)
        check_preemption(checkout)
    finally:
        other.down()


def check_preemption(checkout: Checkout) -> None:
    run = checkout.folder / "runs" / "nvae_celeba64"
    job = train(checkout, 60, options=("--nodes=2", "--partition=preempt"))
    job.wait_for(lambda: len(steps(run)) >= 3)
    urgent = checkout.submit(
        "--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent-%j.log", "--wrap=sleep 2"
    )
    assert urgent.wait() == "COMPLETED"
    check_finished(job, run, 60)
    assert "attempt 0 stopped: preempted" in job.log()
    assert status(run)["attempt"] == 2
