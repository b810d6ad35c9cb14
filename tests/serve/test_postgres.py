"""What is Postgres's own: one server a database, and an address that stays unsaid."""

from __future__ import annotations

import os

import pytest

from pennyweight.errors import ConfigError
from tests.serve.conftest import postgres


def test_a_second_server_is_refused_and_the_lock_goes_with_the_first() -> None:
    from pennyweight.serve.store.postgres import PostgresDatabase

    first = postgres()
    with pytest.raises(ConfigError, match="another server has this database"):
        PostgresDatabase(os.environ["PENNYWEIGHT_TEST_POSTGRES"])
    first.close()
    postgres().close()


def test_an_address_that_answers_nobody_is_said_without_its_password() -> None:
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    from pennyweight.serve.store.postgres import PostgresDatabase

    with pytest.raises(ConfigError) as fault:
        PostgresDatabase("postgresql://someone:canary-secret@127.0.0.1:1/none")
    assert "canary" not in str(fault.value)
