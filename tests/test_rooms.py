"""The rooms: which one may import which, what lies in the top folder, and length limits. See docs/design.md."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "titok_jax"
# A room may import the rooms before it.
ROOMS = ("runtime", "data", "pictures", "models", "weights", "inference", "evaluation", "training", "compiler")
COMMANDS = ("train", "sample", "reconstruct", "pretokenize", "evaluate", "parity", "compile", "zoo")
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: pathlib.Path) -> set[tuple[str, ...]]:
    """All imports of a module from this package: ("models", "titok"), ("models",), ...; () is the public API."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "titok_jax"}
    return found


def test_the_top_folder_holds_commands_and_the_public_api():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert files == {"__init__", *COMMANDS}
    assert folders == {*ROOMS, "embedded"}
    for name in COMMANDS:
        text = (PACKAGE / f"{name}.py").read_text()
        assert 'if __name__ == "__main__":' in text, name
        assert len(text.splitlines()) <= 250, name


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_rooms_before_it(room):
    allowed = {*ROOMS[: ROOMS.index(room) + 1], "__version__"}
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for name in imports(path):
            assert name
            assert name[0] in allowed, f"{path.relative_to(ROOT)} imports titok_jax.{'.'.join(name)}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_holds_and_what_it_may_import(room):
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert len(text.splitlines()) <= 5
    named = next(line for line in text.splitlines() if "import" in line)
    for other in ROOMS:
        if ROOMS.index(other) > ROOMS.index(room):
            assert other not in named.replace(":", " ").replace(",", " ").split(), f"{room} may not import {other}"


def test_no_command_imports_a_command():
    for name in COMMANDS:
        for imported in imports(PACKAGE / f"{name}.py"):
            assert imported
            assert imported[0] not in COMMANDS, f"{name} imports {'.'.join(imported)}"


def test_no_module_imports_a_private_name():
    for path in MODULES:
        for name in imports(path):
            assert not any(part.startswith("_") and not part.startswith("__") for part in name), f"{path.name}: {name}"


def code_lines(source: str, node: ast.AST) -> int:
    """The number of a function's lines without blank lines, comments and docstrings."""
    documented = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner, clean=False) is not None:
            documented |= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    lines = enumerate(source.splitlines()[node.lineno - 1 : node.end_lineno], node.lineno)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented for number, line in lines
    )


def test_a_function_has_at_most_sixty_lines_of_code():
    folders = ("titok_jax", "tools", "benchmarks", "configs")
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert code_lines(source, node) <= 60, f"{path.relative_to(ROOT)}: {node.name}"
