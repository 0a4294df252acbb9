"""The shipped tables, for every test of the converters."""

from pathlib import Path

import pytest

from scripts.data.converters.prepare import Tables, read_tables
from scripts.data.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def tables(bundle_root: Path) -> Tables:
    return read_tables(bundle_root / "configs")


@pytest.fixture(scope="session")
def vocabulary(tables: Tables) -> Vocabulary:
    return tables.vocabulary
