"""What several test files share."""

import logging
import os

import pytest


def pytest_configure(config):
    """Print through a buffer, as in users' shells, and keep what JAX compiles for the next process."""
    os.environ.pop("PYTHONUNBUFFERED", None)
    if not hasattr(config, "cache"):
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_modifyitems(items):
    """Begin with the files in which RELION refines, so that these do not come last where files run side by side."""
    long = {item.path for item in items if item.get_closest_marker("relion") and item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _fresh_log():
    """The log as it is before a command has set it up: a test's -q would silence the next test's warnings."""
    logger = logging.getLogger("cryored")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture
def assert_one_line_error():
    """Check that a command failed as the conventions ask: status 1, nothing on stdout, one line with the cause."""

    def check(done, message):
        assert done.exit_code == 1
        assert done.stdout == ""
        assert done.stderr.startswith("cryored: error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1

    return check
