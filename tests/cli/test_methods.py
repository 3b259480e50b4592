"""`kvloom methods` shows the registry."""

import json

from kvloom.policies.scorer import RULES
from kvloom.spec.method import METHODS


def test_the_table_names_every_method_with_its_paper(kvloom):
    code, output, errors = kvloom("methods")
    assert (code, errors) == (0, "")
    for name, method in METHODS.items():
        line = next(line for line in output.splitlines() if line.startswith(f"  {name} "))
        assert method.summary in line and line.endswith(method.paper)
    snapkv = next(line for line in output.splitlines() if line.startswith("  snapkv "))
    assert "queries" in snapkv and " yes " in snapkv and "prefill " in snapkv and " equal " in snapkv


def test_json_has_the_facts_of_every_method(kvloom):
    code, output, _ = kvloom("methods", "--json")
    methods = {method["name"]: method for method in json.loads(output)["methods"]}
    assert code == 0 and list(methods) == list(METHODS)
    assert methods["kvzip"]["ragged"] and methods["kvzip"]["needs"] == ["replay"]
    assert methods["h2o"]["acts"] == ["prefill", "chunk", "decode"]
    assert methods["streaming"]["parameters"][0]["default"] == 4
    assert {name for name, method in methods.items() if method["role"] == "selector"} == {*RULES, "full"}
