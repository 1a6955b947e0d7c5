"""Fixtures of all tests: see real_parts.py."""

pytest_plugins = ["headrace.tests.real_parts"]
