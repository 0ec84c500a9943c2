"""The package as a whole: what importing it loads, what it ships, how its parts may depend on each other."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import speft_optim
import speft_optim.files

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CODE = sorted(path for folder in ("speft_optim", "recipes", "eval") for path in (ROOT / folder).rglob("*.py"))


def imports_of(path, lazy=True):
    """Absolute names of all modules that a file imports, unless `lazy` is False inside functions too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the direction of the dependency"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_importing_the_package_is_light():
    program = (
        "import sys, torch; before = set(sys.modules); import speft_optim; new = set(sys.modules) - before; "
        "heavy = {'triton', 'transformers', 'bitsandbytes', 'peft', 'datasets', 'lm_eval', 'matplotlib'}; "
        "assert not heavy & {name.partition('.')[0] for name in new}, sorted(heavy & new); "
        "assert not torch.cuda.is_initialized()"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_run_one_way(path):
    inside = path.relative_to(ROOT).parts
    refused = {"speft_optim": ("recipes", "eval", "transformers", "datasets", "peft", "lm_eval"), "eval": ("recipes",)}
    for name in imports_of(path):
        assert name.partition(".")[0] not in refused.get(inside[0], ()), f"{path} imports {name}"
        if inside[:2] == ("speft_optim", "kernels") and name.startswith("speft_optim"):
            assert name.startswith("speft_optim.kernels"), f"{path} imports {name}: kernels see tensors only"


SCRIPTS = [path for path in CODE if path.relative_to(ROOT).parts[0] != "speft_optim"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_recipes_and_scoring_use_the_public_names_alone(path):
    """What they need and a user has not would show here; `files` is public as a module."""
    public = {f"speft_optim.{name}" for name in speft_optim.__all__}
    public |= {f"speft_optim.files.{name}" for name in vars(speft_optim.files) if not name.startswith("_")}
    for name in imports_of(path):
        assert not name.startswith("speft_optim") or name in public, f"{path} imports {name}, which is not public"


# From the bottom up: a room may import those of the lines above its own, and its own modules.
ORDER = [
    {"checks", "version"},
    {"files"},
    {"kernels"},
    {"masks"},
    {"distributed"},
    {"weights"},
    {"offload"},
    {"optim", "salience", "checkpoint"},
    {"schedule", "integrations"},
    {"eager"},
    {"preconditions"},
    {"sparsify", "adapters"},
]
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def library_imports(path, lazy=True):
    """The modules of the library that one of its files imports."""
    for name in imports_of(path, lazy):
        parts = name.split(".")
        if parts[0] == "speft_optim" and len(parts) > 1:
            folder = (ROOT / "speft_optim" / parts[1]).is_dir()
            yield ".".join(
                parts[1:3] if folder and (ROOT / "speft_optim" / parts[1] / f"{parts[2]}.py").is_file() else parts[1:2]
            )


LIBRARY = sorted(path for path in (ROOT / "speft_optim").rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_in_one_order(path):
    room = path.relative_to(ROOT / "speft_optim").with_suffix("").parts[0]
    for name in library_imports(path):
        other = name.partition(".")[0]
        below = RANKS[other] < RANKS[room]
        assert other == room or below, f"{path.relative_to(ROOT)} imports {name}, which is not below {room}"


def test_no_modules_import_each_other_in_a_circle():
    """A definition imports its kernel at the first launch, from inside a function."""
    name_of = {path: ".".join(path.relative_to(ROOT / "speft_optim").with_suffix("").parts) for path in LIBRARY}
    graph = {
        name: {other for other in library_imports(path, lazy=False) if other != name} for path, name in name_of.items()
    }
    done = set()

    def visit(name, way):
        assert name not in way, " -> ".join([*way, name])
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_every_public_name_is_documented():
    for name in speft_optim.__all__:
        found = getattr(speft_optim, name)
        assert inspect.getdoc(found), f"speft_optim.{name} has no docstring"
        if inspect.isclass(found):
            for method in vars(found):
                if not method.startswith("_") and callable(getattr(found, method)):
                    assert inspect.getdoc(getattr(found, method)), f"{name}.{method} has no docstring"
    assert sorted(speft_optim.__all__) == speft_optim.__all__


def test_everything_is_packaged():
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "speft_optim").rglob("*.py")}
    assert folders == set(setuptools["packages"])
    assert (ROOT / "speft_optim" / "py.typed").is_file()
    assert "py.typed" in setuptools["package-data"]["speft_optim"]
    for name in PROJECT["project"]["license-files"]:
        assert "Apache License" in (ROOT / name).read_text()


def requirements():
    """Every requirement of the package and its extras, without those that name the package's own extras."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    found = [Requirement(text) for text in [*project["dependencies"], *(line for extra in extras for line in extra)]]
    return [requirement for requirement in found if requirement.name != project["name"]]


def pinned(file):
    """The version of each package that a file of constraints pins, by the package's canonical name."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines), "one exact version a line"
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert len(pins) == len(lines)
    return pins


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-lowest.txt"])
def test_constraints_pin_what_pyproject_asks_for(file):
    pins = pinned(file)
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{file} does not pin {name}"
        assert pins[name] in requirement.specifier, f"{name}=={pins[name]} is outside {requirement.specifier}"


def test_lower_bounds_are_the_lowest_versions_that_were_tested():
    """But for the tools of development, which no version of ours depends on."""
    pins = pinned("constraints-lowest.txt")
    for requirement in requirements():
        bounds = [Version(bound.version) for bound in requirement.specifier if bound.operator == ">="]
        if requirement.name not in ("ruff", "pre-commit", "pytest", "pytest-xdist", "hypothesis"):
            assert bounds == [Version(pins[canonicalize_name(requirement.name)])], f"{requirement} was not tried"


def test_the_changelog_has_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{speft_optim.__version__}]" in changelog


def test_the_tree_in_the_docs_lists_every_file():
    page = (ROOT / "docs" / "design.md").read_text()
    for path in CODE:
        listed = re.search(rf"(?<!\w){re.escape(path.name)}", page)
        assert path.name == "__init__.py" or listed, f"docs/design.md does not list {path.relative_to(ROOT)}"


def test_make_demo_and_ci_need_no_terminal():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111, ".ci/run must be executable"
    plan = subprocess.run(["make", "-n", "demo", "test", "lint"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "recipes.gsm8k --preset demo" in plan.stdout and "pytest" in plan.stdout and "ruff" in plan.stdout
