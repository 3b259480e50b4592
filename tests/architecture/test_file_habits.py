"""Properties of files: length, name, documentation, no side effects on import, no paths of a machine."""

import ast
import re

import pytest

MAX_LINES = 400
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MACHINE = re.compile(
    r"""(?<![\w.}])/(?:home|root|work|opt|Users|mnt|srv)/[\w.]  # a folder of somebody's machine
    |(?<![\w.}])/tmp/\w  # tests have tmp_path
    |\b(?:pypi\.org|pythonhosted\.org|npmjs\.org|deb\.debian\.org|download\.pytorch\.org)\b  # a registry's host
    """,
    re.VERBOSE,
)


def test_no_source_file_is_longer_than_the_limit(root, texts):
    code = {".py", ".cpp", ".cc", ".h", ".hpp", ".cu"}
    sizes = {str(p.relative_to(root)): len(p.read_text().splitlines()) for p in texts if p.suffix in code}
    assert {path: lines for path, lines in sizes.items() if lines > MAX_LINES} == {}


def test_no_file_has_a_name_that_says_nothing(root, texts):
    assert [str(p.relative_to(root)) for p in texts if EMPTY_NAMES & {p.stem, p.parent.name}] == []


def test_no_file_names_a_machine_or_the_host_of_a_registry(root, texts):
    found = []
    for path in texts:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if path.name != "test_file_habits.py" and MACHINE.search(line):
                found.append(f"{path.relative_to(root)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize("text", ["/home/" + "ann/x", "see https://pypi" + ".org/simple", '"/tmp/' + 'w"'])
def test_the_pattern_of_machines_finds(text):
    assert MACHINE.search(text)


@pytest.mark.parametrize("text", ["{root}/work/x", "src/root/a", "pip install torch", "a/tmp/b", "the /v1/ route"])
def test_the_pattern_of_machines_leaves_alone(text):
    assert not MACHINE.search(text)


def undocumented(node, prefix):
    """Yield the dotted names of public definitions in `node` that have no docstring."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in child.decorator_list}
            if not ast.get_docstring(child) and not decorators & {"overload", "setter", "deleter"}:
                yield f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{prefix}.{child.name}")


def test_every_public_name_is_documented(modules):
    missing = [module.name for module in modules if not ast.get_docstring(module.tree)]
    for module in modules:
        missing += undocumented(module.tree, module.name)
    assert missing == []


def is_entry(node):
    """Return whether a statement runs only where the module is the program."""
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def effects(body, own):
    """Yield statements that do more than bind a name, call `register` or call one of the module's `own` functions."""
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if not called.endswith(".register") and called not in own:
                yield ast.unparse(node)
        elif isinstance(node, ast.While | ast.With | ast.Delete):
            yield ast.unparse(node)
        elif isinstance(node, ast.For | ast.If | ast.Try):
            yield from effects(node.body, own)


def test_importing_a_module_only_binds_names_and_registers(modules):
    found = []
    for module in modules:
        body = [node for node in module.tree.body if not is_entry(node)]
        own = {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")}
        found += [f"{module.name}: {effect}" for effect in effects(body, own)]
    assert found == []
