"""What several test files share."""

import pytest


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
