"""The list of mutations matches the code, and the runner tells a caught one from a survivor. ``make mutants`` runs the whole list."""

from __future__ import annotations

import ast
from dataclasses import replace

import pytest
from mutants.run import ROOT, Mutation, main, mutated, read_mutations

MUTATIONS = read_mutations()
SHA256 = Mutation(
    name="a digest of another kind",
    file="files.py",
    old='hashlib.file_digest(file, "sha256")',
    new='hashlib.file_digest(file, "sha512")',
    test="tests/test_files.py::test_the_sha256_is_that_of_the_files_bytes",
)


def test_there_are_at_least_25_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTATIONS) >= 25
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_code_and_names_a_test(mutation: Mutation) -> None:
    ast.parse(mutated(mutation))
    assert "\n" not in mutation.old + mutation.new
    file, name = mutation.test.split("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
    assert name.split("[")[0] in functions


def test_a_mutation_that_its_test_notices_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    before = (ROOT / "sferd_lab" / SHA256.file).read_bytes()
    assert main([SHA256]) == 0
    assert "1 of 1 mutations caught, 0 survived, 0 broken" in capsys.readouterr().out
    assert (ROOT / "sferd_lab" / SHA256.file).read_bytes() == before


def test_survivors_and_code_that_does_not_run_are_failures(capsys: pytest.CaptureFixture[str]) -> None:
    line = SHA256.old + ".hexdigest()"
    harmless = replace(SHA256, name="harmless", old=line, new=line + "  # a comment")
    no_import = replace(SHA256, name="no import", old="import hashlib", new="import no_such_hashlib")
    no_name = replace(SHA256, name="no name", new=SHA256.old.replace("hashlib", "no_such_name"))
    assert main([harmless, no_import, no_name]) == 1
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line[3:4] == "/"] == ["SURVIVED", "BROKEN", "BROKEN"]
    assert "0 of 3 mutations caught, 1 survived, 2 broken" in out


@pytest.mark.parametrize(("old", "count"), [("no such text", 0), ("from __future__", 1), ("Path | str", 7)])
def test_a_list_that_drifted_from_the_code_is_a_failure(old: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([replace(SHA256, old=old, new="from __future__")]) == 1
    assert f"mutation '{SHA256.name}': its old text occurs {count} times in files.py" in capsys.readouterr().out
