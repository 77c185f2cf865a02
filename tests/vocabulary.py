"""The vocabulary rule: words that this project does not use in names or prose, and the field's word for each.

`python tests/vocabulary.py [PATH ...]` lists every violation; `tests/test_architecture.py` runs the same functions.
Checked are the names that a file defines, its docstrings and comments, the messages of the package (string literals
with a space in them), and every line of Markdown outside code blocks.
"""

from __future__ import annotations

import ast
import io
import pathlib
import re
import sys
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("clip_jax", "configs", "tests", "benchmarks", "docs", "launch")
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "setup.py", "Makefile", ".ci/run")

# Regular expressions over prose, each with the replacement.
PROSE = {
    r"pictures?": "image",
    r"perceptrons?": "MLP",
    r"wordings?": "prompts",
    r"besides?": "alongside, auxiliary",
    r"dear|cheap(er|est|ly)?": "expensive, inexpensive; or the number",
    r"hops?": "number of collectives",
    r"hiccups?": "transient error",
    r"endless": "infinite",
    r"learnt|taught|teach(es|ing)?": "distilled from, trained",
    r"forg[eo]t(s|ten)?": "remat; or the exact verb",
    r"lies?|lying": "is stored, is sharded",
    r"tells?|told": "return, report, determine",
    r"says?|said|saying": "report, state; usually delete",
    r"asks?|asked|asking": "request, evaluate; usually delete",
    r"feels?|hears?|knows?": "code has no senses: name the fact",
    r"gates?": "threshold",
    r"floors?": "baseline; layer",
    r"theirs|ours": "source format, clip_jax layout, default",
    r"left out|leaves? out|leaving out": "skipped",
    r"in any company": "independent of the rest of the batch",
    r"so many": "a gloss with a unit",
    r"nobody|somebody|anybody": "name the subject",
    r"that which|of those that|all but": "a noun",
    r"what(?! to do)": "name the thing",
    r"(?<!dot )(?<!inner )(?<!outer )(?<!Cartesian )products?": "matmul",
    r"weights of others": "pretrained weights",
    r"a sign of life": "heartbeat",
}
# Segments of names (snake_case and CamelCase), each with the replacement.
NAMES = {
    **dict.fromkeys(["picture", "pictures"], "image"),
    **dict.fromkeys(["img", "imgs"], "image"),
    **dict.fromkeys(["txt", "txts"], "text"),
    **dict.fromkeys(["label", "labels"], "class_id"),
    **dict.fromkeys(["wording", "wordings"], "prompts"),
    **dict.fromkeys(["floor", "floors"], "baseline"),
    **dict.fromkeys(["gate", "gates"], "threshold"),
    **dict.fromkeys(["asked", "asks", "ask", "question", "answer"], "task, result"),
    **dict.fromkeys(["said", "says", "told", "tell", "tells"], "message, report"),
    **dict.fromkeys(["theirs", "ours"], "source, converted, expected"),
    **dict.fromkeys(["taught", "learnt"], "teacher_params, distilled"),
    **dict.fromkeys(["hop", "hops"], "steps, groups"),
    **dict.fromkeys(["slope", "slopes"], "gradient"),
    **dict.fromkeys(["widen", "wide"], "upcast"),
    **dict.fromkeys(["chosen", "chances"], "selected, probabilities"),
    "perceptron": "mlp",
    "weigh": "logit_gradient",
    "facts": "residuals",
    "travelling": "in_flight",
    "forget": "remat",
    "propose": "apply_update",
    "beside": "aux",
    "scored": "predictions",
    "subject": "model",
    "outcome": "report",
}
# (path prefix, pattern or name segment): the reason why it is the right word there.
ALLOWED: dict[tuple[str, str], str] = {
    ("tests/vocabulary.py", ""): "the rule itself",
    ("clip_jax/evals/prompts.py", "pictures?"): "templates are data: another word gives other embeddings",
    ("clip_jax/evals/analysis/robustness.py", "slope"): "slope of a fitted line",
    ("clip_jax/evals/report/charts.py", "slope"): "slope of a fitted line",
    ("tests/test_evals_", "slope"): "slope of a fitted line",
}


def _allowed(path: str, word: str) -> bool:
    return any(path.startswith(prefix) and word in (entry, "") or path.startswith(prefix) and entry == ""
               for prefix, entry in ALLOWED)  # fmt: skip


def prose_violations(path: str, line: int, text: str) -> Iterator[str]:
    """Yield the violations in one piece of prose that starts at `line`. Text in backquotes is code and is not prose."""
    for offset, row in enumerate(re.sub(r"`[^`\n]*`", "`", text).splitlines()):
        for pattern, instead in PROSE.items():
            for match in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", row, re.IGNORECASE):
                if not _allowed(path, pattern) and not _allowed(path, match[0].lower()):
                    yield f"{path}:{line + offset}: {match[0]!r}: use {instead} ({row.strip()[:90]})"


def name_violations(path: str, tree: ast.AST) -> Iterator[str]:
    """Yield the violations in names that a file defines; the names of other packages are theirs to choose."""
    for node in ast.walk(tree):
        for name in defined_names(node):
            for segment in re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"):
                if segment in NAMES and not _allowed(path, segment):
                    yield f"{path}:{node.lineno}: name {name!r}: use {NAMES[segment]}"


def defined_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a syntax node defines: functions, classes, arguments, assigned names and attributes."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr


def python_violations(path: str, source: str) -> Iterator[str]:
    """Yield the violations of a Python file: names, docstrings, comments and, in the package, messages."""
    tree = ast.parse(source)
    yield from name_violations(path, tree)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield from prose_violations(path, token.start[0], token.string)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False):
            constant = node.body[0].value
            docstrings.add(constant)
            yield from prose_violations(path, constant.lineno, constant.value)
    if path.startswith("clip_jax/"):
        for node in ast.walk(tree):
            is_message = isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip()
            if is_message and node not in docstrings:
                yield from prose_violations(path, node.lineno, node.value)


def markdown_violations(path: str, source: str) -> Iterator[str]:
    """Yield the violations of a Markdown file outside its code blocks."""
    without_code = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), source, flags=re.MULTILINE | re.DOTALL)
    yield from prose_violations(path, 1, without_code)


def comment_violations(path: str, source: str) -> Iterator[str]:
    """Yield the violations in the comments of a Makefile or a shell script."""
    for number, row in enumerate(source.splitlines(), start=1):
        if row.startswith("#"):
            yield from prose_violations(path, number, row)


def violations(path: str, source: str) -> list[str]:
    """Return the violations of one file, given its path relative to the repository's root."""
    if path.endswith(".py"):
        return list(python_violations(path, source))
    return list((markdown_violations if path.endswith(".md") else comment_violations)(path, source))


def checked_files() -> list[str]:
    """Return the paths, relative to the root, that the rule covers."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in [*found, *(ROOT / name for name in DOCUMENTS)]
                  if path.exists())  # fmt: skip


def main(prefixes: list[str]) -> int:
    """Print the violations of all covered files, or of those below the given paths."""
    listed = [
        violation
        for path in checked_files()
        if not prefixes or path.startswith(tuple(prefixes))
        for violation in violations(path, (ROOT / path).read_text(encoding="utf-8"))
    ]
    print("\n".join([*listed, f"{len(listed)} violations"]))
    return bool(listed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
