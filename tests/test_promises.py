"""docs/promises.md names tests: each exists."""

import ast
import re

from conftest import ROOT


def test_every_promise_is_held_by_tests_that_exist():
    rows = [row for row in (ROOT / "docs" / "promises.md").read_text().splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
            assert name in defined, f"{file}::{name}"
