"""Mistakes in pipeline/distributed."""

from tests.mutations.mutation import Mutation

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "a slow rank that advances is missing",
        "pipeline/distributed/heartbeat.py",
        "if new.joined != old.joined or new.joined == ahead:",
        "if new.joined == ahead:",
        ("tests/distributed/test_watchdog.py",),
    ),
    Mutation(
        "a silent rank is never missing",
        "pipeline/distributed/heartbeat.py",
        "return sorted(late | dead)",
        "return sorted(late)",
        ("tests/distributed/test_watchdog.py::test_a_silent_rank_is_missing_even_where_no_rank_waits",),
    ),
    Mutation(
        "a suspended observer reports others",
        "pipeline/distributed/heartbeat.py",
        "self._now += min(elapsed, LONGEST_TICK)",
        "self._now += elapsed",
        ("tests/distributed/test_watchdog.py::test_a_suspended_observer_reports_no_rank",),
    ),
    Mutation(
        "one vote is enough",
        "pipeline/distributed/runtime.py",
        "return votes.item() == self.world_size",
        "return votes.item() >= 1",
        ("tests/distributed/test_runtime.py",),
    ),
    Mutation(
        "the mean is a sum",
        "pipeline/distributed/runtime.py",
        "return self.sum(value) / self.world_size",
        "return self.sum(value)",
        ("tests/scripts/test_train.py::test_several_processes_give_the_losses_of_one",),
    ),
    Mutation(
        "flags are not reduced",
        "pipeline/distributed/collectives.py",
        "    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)\n",
        "",
        ("tests/distributed/test_runtime.py",),
    ),
    Mutation(
        "sums stay on their rank",
        "pipeline/distributed/collectives.py",
        "        dist.all_reduce(values)\n",
        "        pass\n",
        ("tests/distributed/test_runtime.py", "tests/tracking/test_meters.py", "tests/nn/test_batch_norm.py"),
    ),
    Mutation(
        "a difference is not noticed",
        "pipeline/distributed/agreement.py",
        "    if len(ranks) == 1:",
        "    if len(ranks) <= 2:",
        ("tests/distributed/test_runtime.py",),
    ),
)
