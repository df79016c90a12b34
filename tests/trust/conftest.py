"""A process that forks for every command, what the commands read, and what each makes when nothing happens."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="package")
def forks(tmp_path_factory):
    from trust_commands import forking, library

    made = library(tmp_path_factory.mktemp("library"))
    if made is None:
        pytest.skip("needs Linux and a C compiler")
    with forking(made) as found:
        yield found


@pytest.fixture(scope="package")
def given(tmp_path_factory, forks):
    from trust_commands import inputs

    return inputs(tmp_path_factory.mktemp("given"), forks)


@pytest.fixture(scope="package")
def whole(tmp_path_factory, forks, given):
    """whole(name): what the command makes when nothing happens."""
    from trust_trials import undisturbed

    made = {}

    def of(name):
        if name not in made:
            made[name] = undisturbed(forks, given, name, tmp_path_factory.mktemp("whole"))
        return made[name]

    return of
