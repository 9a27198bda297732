"""The statement that names what a transaction may see."""

import pytest

from ledger.model import Scope
from ledger.store.row_security import naming


def test_each_scope_is_named_once_and_in_order() -> None:
    statement = naming([Scope("ten_b", "live"), Scope("ten_a", "test"), Scope("ten_b", "live"), Scope("ten_a", "live")])
    assert "'farebox.scopes', 'ten_a/live,ten_a/test,ten_b/live', true" in statement
    assert "'farebox.tenants', 'ten_a,ten_b', true" in statement


def test_no_scopes_are_nothing_to_see() -> None:
    assert "'farebox.scopes', '', true" in naming([])


@pytest.mark.parametrize("tenant", ["", "ten_a,ten_b", "ten_a/live", "ten_a'", "*", "ten a", "ten_é", "x" * 129])
def test_a_tenant_that_could_be_read_as_something_else_is_refused(tenant: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        naming([Scope(tenant, "live")])
