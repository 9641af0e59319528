"""Runs a plan as pytest items: ``python -m benchmarks run`` starts pytest on this folder."""

from __future__ import annotations

import sys

import pytest
from tqdm import tqdm

from benchmarks.environment import environment, write_json
from benchmarks.measure import Plan, Session

SESSION = pytest.StashKey[Session]()
BAR = pytest.StashKey[tqdm]()


def pytest_addoption(parser):
    parser.addoption("--plan", required=True, help="JSON file of the plan")
    parser.addoption("--results", required=True, help="JSON file to write")


def pytest_configure(config):
    config.stash[SESSION] = Session(Plan.load(config.getoption("--plan")))


def pytest_generate_tests(metafunc):
    metafunc.parametrize("visit", metafunc.config.stash[SESSION].visits, ids=str)


def pytest_collection_finish(session):
    bar = tqdm(total=len(session.items), file=sys.stderr, unit="visit", mininterval=1, dynamic_ncols=True)
    session.config.stash[BAR] = bar


def row_of(item):
    return item.callspec.params["visit"].row


def pytest_runtest_teardown(item, nextitem):
    """The last visit of a row closes it; a row that has to be measured once more gets its visits again at the end."""
    bar, row = item.config.stash[BAR], row_of(item)
    bar.set_description(row.id, refresh=False)
    bar.update()
    if (nextitem is None or row_of(nextitem) != row) and item.config.stash[SESSION].close_row():
        again = [other for other in item.session.items if row_of(other) == row]
        item.session.items += again  # pytest is walking along this list
        bar.total += len(again)


@pytest.fixture
def session(request):
    return request.config.stash[SESSION]


def pytest_sessionfinish(session):
    session.config.stash[BAR].close()
    results = session.config.stash[SESSION].results()
    write_json(session.config.getoption("--results"), {**environment(), **results})
