"""Every rival's loss, gradients and advantages are those of its official code."""

import json

import pytest
import torch
from conftest import SHARED
from method_cases import METHODS, evaluate

FILE = SHARED / "method_cases.json"
CASES = json.loads(FILE.read_text()) if FILE.exists() else []
# Fields that are inputs, words, or computed for logging alone
GIVEN = {"rewards", "problem", "params"}


@pytest.mark.skipif(not CASES, reason="no method_cases.json")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_values_and_gradients_equal_the_official_code(case):
    found = evaluate(case)
    for field, value in found.items():
        if isinstance(value, list) and None in value:
            assert [x is None for x in value] == [x is None for x in case[field]]
            value, expected = ([x for x in y if x is not None] for y in (value, case[field]))
        else:
            expected = case[field]
        torch.testing.assert_close(
            torch.tensor(value, dtype=torch.float64),
            torch.tensor(expected, dtype=torch.float64),
            rtol=0,
            atol=1e-9,
            msg=lambda m, field=field: f"{field}: {m}",
        )
    computed = [k for k in case if k.startswith(("loss", "grad", "adv")) or k == "value_loss"]
    assert set(computed) <= set(found), "a part of the case was not computed"


@pytest.mark.skipif(not CASES, reason="no method_cases.json")
def test_every_method_of_the_file_has_an_adapter():
    assert {case["method"] for case in CASES} <= set(METHODS)
