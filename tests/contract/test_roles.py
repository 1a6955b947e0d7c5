"""Roles include one another in one order."""

from headrace.contract.roles import Role


def test_each_role_includes_itself_and_those_before_it():
    found = {(a.value, b.value) for a in Role for b in Role if a.includes(b)}
    assert found == {
        ("viewer", "viewer"),
        ("operator", "viewer"),
        ("operator", "operator"),
        ("admin", "viewer"),
        ("admin", "operator"),
        ("admin", "admin"),
    }
