"""The README's tables are those of the committed records, and its commands exist."""

import re

import pytest

from tests.conftest import ROOT
from training import readme

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_committed_records():
    assert len(re.findall("<!-- (?:run|comparison): ", TEXT)) == TEXT.count("<!-- end -->") > 0
    assert readme.fill(TEXT, ROOT / "hub_configs") == TEXT


def test_a_table_that_is_out_of_date_is_made_anew():
    stale = re.sub(r"(\| sslpp \| )\d", r"\g<1>9", TEXT)
    assert stale != TEXT
    assert readme.fill(stale, ROOT / "hub_configs") == TEXT


@pytest.mark.parametrize("module", sorted(set(re.findall(r"-m (training[.\w]*)", TEXT))))
def test_the_commands_exist(module):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_the_files_that_are_linked_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link
