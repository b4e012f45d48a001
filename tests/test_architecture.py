"""The shape of the code base: layer order, light import, small files that say what they are for."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lorax_ft"

# A file imports only from layers above its own, or from its own.
LAYERS = (
    "exit_codes",
    "axes",
    "leaves",
    "trees",
    "layouts",
    "jaxprs",
    "lift",
    "inspection",
    "products",
    "logits",
    "quantization",
    "methods",
    "models",
    "data",
    "devices",
    "evaluation",
    "training",
    "interop",
    "generation",
    "prediction",
    "config",
    "runs",
    "plots",
    "reports",
    "adapted",
    "memory",
    "experiment",
    "planning",
    "finished",
    "cluster",
    "sweeps",
    "huge_pages",
    "options",
    "cli",
)
HEAVY = {
    "datasets",
    "flax",
    "grain",
    "matplotlib",
    "ml_collections",
    "optax",
    "optuna",
    "orbax",
    "pandas",
    "ray",
    "scipy",
    "sklearn",
    "submitit",
    "tensorboardX",
    "tensorflow",
    "torch",
    "transformers",
}

FILES = sorted(PACKAGE.rglob("*.py"))
ALL_FILES = sorted(
    path
    for folder in ("lorax_ft", "tests", "configs", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: pathlib.Path) -> str:
    """`lorax_ft/data/readers.py` as `lorax_ft.data.readers`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports_of(path: pathlib.Path) -> set[str]:
    """The modules of this package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import hides its layer"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in full}
    return {name for name in found if name.split(".")[0] == "lorax_ft"}


def layer_of(module: str) -> int:
    """Position of a module in LAYERS; the package itself, which exports from all, is above none."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 else len(LAYERS)


def test_every_file_has_its_layer():
    unknown = [m for m in MODULES if m != "lorax_ft" and m.split(".")[1] not in LAYERS]

    assert not unknown


@pytest.mark.parametrize("module", [m for m in MODULES if m != "lorax_ft"])
def test_a_file_imports_only_from_layers_above_it(module):
    wrong = [name for name in imports_of(MODULES[module]) if layer_of(name) > layer_of(module)]

    assert not wrong, f"{module} imports {wrong}, which are below it in LAYERS"


def test_no_import_cycle_within_a_layer():
    imports = {module: imports_of(path) - {module} for module, path in MODULES.items()}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in finished:
            for name in imports[module] & set(MODULES):
                visit(name, (*trail, module))
            finished.add(module)

    finished: set[str] = set()
    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_small_and_its_first_line_says_what_it_is_for(path):
    text = path.read_text()

    assert text.startswith('"""'), "the first line is not a docstring"
    assert len(text.splitlines()[0]) > len('"""') + 15, "the first line says nothing"
    assert text.count("\n") <= 500, "over 500 lines: it is two files"


def test_importing_the_package_loads_nothing_heavy():
    code = "import lorax_ft, sys; print('\\n'.join(sorted({m.split('.')[0] for m in sys.modules})))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    assert "lorax_ft" in loaded
    assert not HEAVY & set(loaded)
