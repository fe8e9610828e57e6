"""What the driver of a Ray run does when workers die: without Ray, by workers that are objects here."""

import functools

import pytest

from jaxdistill import cluster as clusters
from jaxdistill.cluster import Gone
from jaxdistill.config import RayConfig, VLLMConfig
from jaxdistill.traces.engines import Completion, Executor, Request, Sampling
from jaxdistill.traces.ray_engine import Fleet
from jaxdistill.traces.ray_worker import Job

SAMPLING = Sampling(temperature=0.0, top_p=1.0, max_tokens=1, stop_ids=[])
JOB = Job("jax", Executor(RayConfig(), "demo", None, ""), SAMPLING, VLLMConfig(), 1, 1, None)


class Cluster(clusters.Cluster):
    """Workers that answer one request a call, the last that they were given first; `deadly` ones kill them."""

    def __init__(self, workers, *, deadly=(), unfit=(), places=99, **config):
        self.config = RayConfig(workers=workers, **config)
        self.deadly, self.unfit, self.places = set(deadly), unfit, places
        self.started, self.asked, self.turns = [], [], 0

    def count(self):
        return self.config.workers

    def too_small(self, wanted):
        return f"too small for {wanted}"

    def start(self, kind, job, number):
        self.started.append(Worker(self, number, placed=len(self.started) < self.places))
        return self.started[-1]

    def wait(self, calls, seconds):
        placed = [call for call in calls if call.func.__self__.placed]
        self.turns += 1
        return [placed[self.turns % len(placed)]] if placed else []

    def result(self, call):
        return call()


class Worker(clusters.Worker):
    def __init__(self, cluster, number, *, placed):
        self.cluster, self.number, self.placed = cluster, number, placed
        self.waiting, self.stopped = [], False

    def call(self, method, *arguments):
        assert not self.stopped
        return functools.partial(getattr(self, method), *arguments)

    def stop(self):
        self.stopped = True

    def where(self):
        return f"node{self.number}"

    def start(self):
        if self.number in self.cluster.unfit:
            raise ValueError("no such checkpoint")

    def exchange(self, requests):
        self.waiting += requests
        request = self.waiting.pop()
        self.cluster.asked.append(request.id)
        if request.id in self.cluster.deadly:
            raise Gone("killed by the system")
        return [Completion(id=request.id, output_ids=[1], finish_reason="stop")]


def collect(cluster, count=60, most=10):
    requests = [Request(str(n), [5], n) for n in range(count)]
    ready = []
    fleet = Fleet(cluster, JOB, requests, most, lambda: ready.append(1))
    found = list(fleet.run())
    fleet.close()
    assert all(worker.stopped for worker in cluster.started)
    assert sorted(int(each.id) for each in found) == list(range(count))
    assert ready == [1]
    return {each.id: each for each in found}


@pytest.mark.parametrize("deadly", [["30"], ["0", "1", "59"]])
def test_only_what_kills_every_worker_fails_and_its_company_does_not(deadly, capsys):
    cluster = Cluster(3, deadly=deadly, retries=2)
    found = collect(cluster)
    for name, completion in found.items():
        if name in deadly:
            assert completion.error == "the worker died over it (killed by the system; the last of 3 attempts)"
            assert 1 <= cluster.asked.count(name) <= 3
        else:
            assert completion.error is None
            assert cluster.asked.count(name) == 1
    assert "a worker on node" in capsys.readouterr().out


def test_without_retries_what_was_in_flight_has_failed_and_the_others_go_on():
    cluster = Cluster(2, deadly=["19"], retries=0)
    failed = {name for name, completion in collect(cluster, most=10).items() if completion.error}
    assert "19" in failed and len(failed) <= 10
    assert len(cluster.started) == 2


def test_a_worker_that_cannot_start_is_left_out_and_the_last_one_says_why(capsys):
    collect(Cluster(3, unfit=[1]))
    assert "going on without a worker on node1: no such checkpoint" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no worker is left; the last one on node\d: no such checkpoint"):
        collect(Cluster(2, unfit=[0, 1]))


def test_who_has_a_place_begins_and_nobody_waits_for_ever(capsys):
    collect(Cluster(4, places=2, wait_s=1e-9))
    assert "of 4 workers have a place on the cluster; the others join" in capsys.readouterr().out
    with pytest.raises(ValueError, match="too small for 2"):
        collect(Cluster(2, places=0, wait_s=0.01))
    # nor for a replacement
    with pytest.raises(ValueError, match="too small for 1"):
        collect(Cluster(1, places=1, deadly=["5"], wait_s=0.01))
