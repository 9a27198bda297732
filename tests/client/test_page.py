"""The client's page shows all that there is. Its examples run in `tests/test_docs.py`."""

import re

from farebox import Client
from farebox.errors import CLASSES
from tests.test_docs import ROOT, blocks_of, quoted, rows

PAGE = "docs/api/python.md"
SIX_CALLS = ("create_customer", "grant", "check_entitlement", "reserve", "commit", "credits")
LINES_MAX = 15


def test_the_integration_of_six_calls_fits_in_fifteen_lines():
    (example,) = (
        block
        for block in blocks_of(ROOT / PAGE)
        if block.language == "python" and all(f".{call}(" in block.text for call in SIX_CALLS)
    )
    assert {"runnable", "demo"} == set(example.marks)
    assert example.output is not None
    assert len(example.text.splitlines()) <= LINES_MAX
    assert len(re.findall(r"(?:client|task)\.\w+\(", example.text)) == len(SIX_CALLS)


def test_the_table_of_exceptions_is_the_codes():
    listed = {code: quoted(name)[0] for name, codes, *_ in rows(PAGE, "exception") for code in quoted(codes)}
    assert listed == {code: kind.__name__ for code, kind in CLASSES.items()}


def test_the_table_of_methods_is_the_client():
    listed = [method for _, methods in rows(PAGE, "about") for method in quoted(methods)]
    own = {"send", "iterate", "close"}
    methods = [name for name, value in vars(Client).items() if callable(value) and not name.startswith("_")]
    assert sorted(listed) == sorted(set(methods) - own)
