"""The list of mutations matches the code, and the runner tells a caught one from a survivor. ``make mutants`` runs the whole list."""

from __future__ import annotations

import ast
from dataclasses import replace
from functools import cache
from subprocess import CompletedProcess, TimeoutExpired

import pytest
from mutants import run
from mutants.run import ROOT, Mutation, judge, main, mutated, read_mutations

MUTATIONS = read_mutations()
SHA256 = Mutation(
    name="a digest of another kind",
    file="files.py",
    old='hashlib.file_digest(file, "sha256").hexdigest()',
    new='hashlib.file_digest(file, "sha512").hexdigest()',
    test="tests/test_files.py::test_the_sha256_is_that_of_the_files_bytes",
)


@cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_there_are_at_least_25_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTATIONS) >= 25
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_one_line_that_fits_the_code_and_names_a_test(mutation: Mutation) -> None:
    ast.parse(mutated(mutation))
    assert "\n" not in mutation.old + mutation.new
    file, name = mutation.test.split("::")
    assert name.split("[")[0] in functions(file)


@pytest.mark.parametrize("old", ["no such text", "import", SHA256.new])
def test_a_list_that_drifted_from_the_code_is_a_failure(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([replace(SHA256, old=old)]) == 1
    assert f"mutation '{SHA256.name}': its old text occurs" in capsys.readouterr().out


def test_of_two_real_runs_one_is_caught_and_a_harmless_change_survives(capsys: pytest.CaptureFixture[str]) -> None:
    before = (ROOT / "sferd_lab" / SHA256.file).read_bytes()
    assert main([SHA256, replace(SHA256, name="harmless", new=SHA256.old + "  # a comment")]) == 1
    assert (ROOT / "sferd_lab" / SHA256.file).read_bytes() == before
    *_, caught, survived, tally = capsys.readouterr().out.splitlines()
    assert caught.split()[1:3] == ["caught", "a"]
    assert survived.split()[1:3] == ["SURVIVED", "harmless"]
    assert tally == "1 of 2 mutations caught, 1 survived, 0 broken"


@pytest.mark.parametrize(
    ("code", "out", "verdict"),
    [
        (0, "\n1 passed", "SURVIVED"),
        (1, "\nFAILED tests/test_a.py::test_b - assert 1 == 2\n1 failed", "caught"),
        (1, "\nFAILED tests/test_a.py::test_b - sferd_lab.errors.SferdError: n = 0\n1 failed", "caught"),
        (1, "\nFAILED tests/test_a.py::test_b - NameError: name 'c' is not defined\n1 failed", "BROKEN"),
        (1, "\nFAILED tests/test_a.py::test_b - ModuleNotFoundError: No module named 'c'\n1 failed", "BROKEN"),
        (1, "\nERROR tests/test_a.py::test_b - ValueError\n1 error", "BROKEN"),
        (2, "\nERROR tests/test_a.py\n1 error", "BROKEN"),
        (4, "ImportError while loading conftest", "BROKEN"),
        (5, "no tests ran", "BROKEN"),
    ],
)
def test_only_a_test_that_failed_has_caught_a_mutation(
    code: int, out: str, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without a mutation the tests pass.
    monkeypatch.setattr(run, "run_tests", lambda tests, mutation=None: CompletedProcess([], code if mutation else 0, out, ""))
    assert judge(SHA256).split()[0] == verdict
    assert main([SHA256]) == (verdict != "caught")
    assert f"{int(verdict == 'caught')} of 1 mutations caught" in capsys.readouterr().out


def test_a_mutation_without_end_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(tests, mutation=None):
        raise TimeoutExpired([], 600)

    monkeypatch.setattr(run, "run_tests", endless)
    assert judge(SHA256) == "BROKEN (no end after 600 s)"


def test_tests_that_fail_on_the_library_as_it_is_show_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "run_tests", lambda tests, mutation=None: CompletedProcess([], 1, "\nFAILED tests/test_a.py::test_b", ""))
    assert main([SHA256]) == 1
    assert "the tests must pass on the library as it is" in capsys.readouterr().out
