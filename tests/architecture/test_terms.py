"""The terms of docs/style.md: the words of its column "not" that are always wrong occur in no prose of the project."""

import io
import re
import tokenize

import pytest

FORBIDDEN = {
    "forget": r"\bforg(?:et|ot)",
    "what a layer looks at": r"\bwhat (?:a|the) layer looks at\b",
    "every so-manieth": r"\bso-manieth\b",
    "numbers in which a layer multiplies": r"\bnumbers in which (?:a|the) layer multiplies\b",
    "weights in few bits": r"\bin few bits\b",
    "twin": r"\benvironment twin",
    "reckon": r"\breckon",
    "whole step": r"\bwhole steps?\b",
    "operation by operation": r"\boperation by operation\b",
}
OTHER_SENSES = {"lose", "take away", "meet", "come back"}  # also said of connections, goals and clients
PATTERN = re.compile("|".join(FORBIDDEN.values()), re.IGNORECASE)
OWN = ("style.md", "test_terms.py")


def finds(line):
    """Return whether a line has a forbidden term; a line that cites a paper may have its title."""
    return PATTERN.search(line) is not None and "arXiv" not in line


def prose(path):
    """Yield (line number, text) of the prose of a file: comments and strings of Python and C++, else every line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield from enumerate(token.string.splitlines(), token.start[0])
    elif path.suffix in {".cpp", ".h"}:
        for number, line in enumerate(text.splitlines(), 1):
            yield from ((number, part) for part in re.findall(r'//.*|"[^"]*"', line))
    else:
        yield from enumerate(text.splitlines(), 1)


def test_every_term_of_the_style_page_is_decided(root):
    rows = re.findall(r"^\|[^|]+\|[^|]+\|([^|]+)\|$", (root / "docs" / "style.md").read_text(encoding="utf-8"), re.M)
    terms = {term.strip() for row in rows[2:] for term in row.split(",")}
    assert terms == set(FORBIDDEN) | OTHER_SENSES


def test_no_file_uses_a_forbidden_term(root, texts):
    found = []
    code = [path for folder in ("cpp", "scripts") for path in (root / folder).rglob("*.*") if path.suffix != ".pyc"]
    for path in [*texts, *code]:
        wrong = [] if path.name in OWN else [(n, line) for n, line in prose(path) if finds(line)]
        found += [f"{path.relative_to(root)}:{n}: {line.strip()}" for n, line in wrong]
    assert found == []


def test_prose_of_code_is_its_comments_and_strings(tmp_path):
    (tmp_path / "a.py").write_text("forget = 1  # one\nlog('two')\n")
    (tmp_path / "a.cpp").write_text('void forget();  // one\nlog("two");\n')
    assert list(prose(tmp_path / "a.py")) == [(1, "# one"), (2, "'two'")]
    assert list(prose(tmp_path / "a.cpp")) == [(1, "// one"), (2, '"two"')]


@pytest.mark.parametrize("line", ["it forgot the token", "Every so-manieth layer", "a whole step in C++", "we reckon"])
def test_the_pattern_of_terms_finds(line):
    assert finds(line)


@pytest.mark.parametrize("line", ["a forged turn", "a step of whole blocks", "Forgetting Transformer, arXiv 1"])
def test_the_pattern_of_terms_leaves_alone(line):
    assert not finds(line)
