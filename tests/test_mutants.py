"""The list of mutants fits the code; whether they are killed, tests/mutants.py finds out."""

import json

import pytest

from mutants import ROOT, load_mutants, mutated

MUTANTS = load_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m["file"])
def test_each_mutant_can_be_made_and_has_its_test(mutant):
    """A failure means that code or a test was renamed, and that a mistake is no longer tried."""
    assert set(mutant) == {"file", "old", "new", "test"}
    compile(mutated(mutant), mutant["file"], "exec")        # a syntax error would prove nothing
    file, name = mutant["test"].split("::")
    assert f"def {name.split('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


def test_no_mutant_stands_there_twice():
    """A failure means that a mistake counts twice among the killed."""
    assert len({json.dumps(mutant) for mutant in MUTANTS}) == len(MUTANTS)
