"""The same function for many tasks: order, errors, and processes that end with their parent or before it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

import pytest

from cryored.errors import CryoredError, InputError
from cryored.simulation.workers import run_tasks
from cryored.threads import default_threads


def square(number):
    return number**2


def process_and_threads(_):
    return os.getpid(), os.environ["OMP_NUM_THREADS"], os.environ["NUMBA_NUM_THREADS"]


def slow_at_first(number):
    time.sleep(0.2 if number == 0 else 0)
    return number


def refuse_three(number):
    if number == 3:
        raise InputError("three.pdb: is three, expected another number")
    return number


def die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def warn(number):
    logging.getLogger("cryored.test").warning("an odd structure")
    logging.getLogger("cryored.test").info("nothing of note")
    return number


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two workers on this machine, and the address that they are reached at."""
    distributed = pytest.importorskip("distributed")
    # Workers find the functions of this file as pytest does: by a folder on the path.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        with distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address=":0",
            local_directory=str(tmp_path_factory.mktemp("dask")),
        ) as running:
            yield running


@pytest.fixture(params=["alone", "processes", "cluster"])
def where(request):
    """Options of `run_tasks`: this process, two others, a cluster."""
    if request.param == "cluster":
        return {"scheduler": request.getfixturevalue("cluster").scheduler_address}
    return {"jobs": 2 if request.param == "processes" else 1}


@pytest.mark.slow
def test_results_come_in_the_order_of_the_tasks(where):
    assert list(run_tasks(square, range(20), **where)) == [number**2 for number in range(20)]
    assert list(run_tasks(slow_at_first, range(4), **where)) == [0, 1, 2, 3]
    assert list(run_tasks(square, [], **where)) == []


def test_more_tasks_than_are_given_out_at_once(where, monkeypatch):
    monkeypatch.setattr("cryored.simulation.workers._AHEAD", 3)
    assert list(run_tasks(square, range(20), **where)) == [number**2 for number in range(20)]


def test_progress_counts_from_nothing_to_all(where):
    seen = []
    list(run_tasks(square, range(3), progress=lambda *numbers: seen.append(numbers), **where))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.slow
def test_an_error_comes_as_it_was_raised_after_what_was_before_it(where):
    found = []
    with pytest.raises(InputError, match=r"^three.pdb: is three, expected another number$"):
        for result in run_tasks(refuse_three, range(40), **where):
            found.append(result)
    assert found == [0, 1, 2]


@pytest.mark.slow
def test_what_is_under_way_is_given_up_with_the_run(where):
    results = run_tasks(square, range(2000), **where)
    assert next(results) == 0
    results.close()  # as leaving the loop by Control-C or an error does
    assert list(run_tasks(square, range(3), **where)) == [0, 1, 4]


@pytest.mark.slow
def test_warnings_of_other_processes_are_told_once(cluster, caplog):
    for where in ({"jobs": 2}, {"scheduler": cluster.scheduler_address}):
        caplog.clear()
        list(run_tasks(warn, range(6), **where))
        ours = [record.getMessage() for record in caplog.records if record.name.startswith("cryored")]
        assert ours == ["an odd structure"]


@pytest.mark.slow
def test_processes_share_the_cores():
    found = set(run_tasks(process_and_threads, range(40), jobs=2))
    share = str(max(1, default_threads() // 2))
    assert os.getpid() not in {process for process, *_ in found}
    assert {tuple(threads) for _, *threads in found} == {(share, share)}


def test_a_process_that_is_killed_is_told_in_one_line():
    with pytest.raises(CryoredError, match="^one of 2 processes was killed, for want of memory perhaps; what was"):
        list(run_tasks(die_at_three, range(40), jobs=2))


def test_a_cluster_that_nobody_has_started(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("cryored.simulation.workers._ANSWER", 0.2)
    with pytest.raises(
        CryoredError, match="^tcp://127.0.0.1:1: no Dask scheduler answers .*; start one with"
    ) as caught:
        list(run_tasks(square, range(3), scheduler="tcp://127.0.0.1:1"))
    assert "\n" not in str(caught.value)


def test_an_address_that_is_none():
    pytest.importorskip("distributed")
    with pytest.raises(CryoredError, match="^nonsense: no Dask scheduler answers .missing port number"):
        list(run_tasks(square, range(3), scheduler="nonsense"))


@pytest.mark.slow
def test_a_cluster_that_goes_away():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, dashboard_address=":0", protocol="tcp", processes=False
    ) as brief:
        results = run_tasks(slow_at_first, range(3), scheduler=brief.scheduler_address)
        next(results)
    with pytest.raises(
        CryoredError, match="the scheduler has gone, or cancelled the work; what was finished is kept: run it again"
    ):
        list(results)


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(CryoredError, match=r"^--scheduler needs Dask's distributed: pip install 'cryored\[cluster\]'$"):
        list(run_tasks(square, range(3), scheduler="tcp://127.0.0.1:8786"))


def test_a_cluster_without_workers_is_told_of():
    distributed = pytest.importorskip("distributed")
    told = []

    class Listener(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())
            empty.scale(1)

    listener, log = Listener(), logging.getLogger("cryored.simulation.workers")
    log.addHandler(listener)
    try:
        with distributed.LocalCluster(
            n_workers=0, dashboard_address=":0", protocol="tcp", processes=False, threads_per_worker=1
        ) as empty:
            address = empty.scheduler_address
            assert list(run_tasks(square, range(2), scheduler=address)) == [0, 1]
    finally:
        log.removeHandler(listener)
    assert told == [f"{address}: no workers yet; start some with `dask worker --nthreads 1 {address}`"]
