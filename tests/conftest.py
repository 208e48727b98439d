"""What several test files share."""

import pytest


def pytest_collection_modifyitems(items):
    """Begin with the files in which RELION refines, so that these do not come last where files run side by side."""
    long = {item.path for item in items if item.get_closest_marker("relion") and item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


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
