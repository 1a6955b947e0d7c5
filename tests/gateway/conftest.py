"""Fixtures of the gateway's tests: an app on real servers, a key, and a courier without an engine.

The app runs in the test's process, its threads as real threads; tests/gateway/test_server.py runs
it under gunicorn with gevent.
"""

from collections.abc import Iterator

import pytest
from flask import Flask
from flask.testing import FlaskClient

from headrace.contract import wire
from headrace.contract.accounts import NewKey
from headrace.contract.settings import GatewaySettings
from headrace.gateway.app import create_app, services_of
from headrace.gateway.services import Services
from headrace.tests.gateway.courier import MODEL, Courier


@pytest.fixture(scope="module")
def settings(redis_url: str, database_url: str) -> GatewaySettings:
    return GatewaySettings.model_validate(
        {
            "redis_url": redis_url,
            "database_url": database_url,
            "heartbeat_s": 0.2,
            "max_body_bytes": 1 << 16,
            "max_wait_s": 20,
        }
    )


@pytest.fixture(scope="module")
def app(settings: GatewaySettings) -> Iterator[Flask]:
    app = create_app(settings)
    services_of(app).accounts.register_model(card())
    yield app
    services_of(app).close()


@pytest.fixture(scope="module")
def services(app: Flask) -> Services:
    return services_of(app)


@pytest.fixture(scope="module")
def key(services: Services) -> NewKey:
    return services.accounts.create_key(tenant="mine", name="test")


@pytest.fixture
def client(app: Flask, key: NewKey) -> FlaskClient:
    return client_of(app, key)


@pytest.fixture
def other_client(app: Flask, services: Services) -> FlaskClient:
    return client_of(app, services.accounts.create_key(tenant="another", name="test"))


@pytest.fixture
def courier(services: Services) -> Courier:
    """A courier on an emptied Redis: what earlier tests left in the lanes is not its."""
    services.redis.flushall()
    return Courier(services.ledger, services.streams, services.token_log)


def client_of(app: Flask, key: NewKey) -> FlaskClient:
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key.secret}"
    return client


def card(**changes: object) -> wire.ModelCard:
    fields = {
        "name": MODEL,
        "folder": "/nowhere",
        "max_seq_tokens": 1024,
        "vocab_size": 1000,
        "dtype": "float32",
        "has_chat_template": True,
    }
    return wire.ModelCard(**(fields | changes))
