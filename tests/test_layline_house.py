"""The rules of the house: floors, imports, the budget of --help, and the contract of flags."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from layline.cli import main

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "profiles": set[str](),
    "simulator": set[str](),
    "planner": {"profiles", "simulator"},
    "executor": {"planner", "profiles", "simulator"},
    "reports": {"planner", "profiles", "simulator"},
    "layline": {"executor", "planner", "profiles", "reports", "simulator"},
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[ast.alias | ast.ImportFrom]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[ast.alias | ast.ImportFrom] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += node.names
        elif isinstance(node, ast.ImportFrom):
            found.append(node)
    return found


def top_names(path: Path) -> set[str]:
    names = {
        (item.module or "") if isinstance(item, ast.ImportFrom) else item.name
        for item in imports(path)
    }
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = top_names(path) & MAY_IMPORT.keys()
    assert ours <= MAY_IMPORT[package] | {package}
    assert not any(isinstance(item, ast.ImportFrom) and item.level for item in imports(path))
    may_use_torch = package == "executor" or "profiles/measure" in path.as_posix()
    assert may_use_torch or "torch" not in top_names(path)
    assert "pickle" not in top_names(path)


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_resolve_inside_the_project(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).parent.parent.samefile(ROOT)


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout


@pytest.mark.parametrize("package", ["planner.search", "simulator.engine", "reports.page"])
def test_no_torch_below_the_executor(package: str) -> None:
    assert run_python(f"import sys, {package}; print('torch' in sys.modules)").strip() == "False"


def test_help_is_quick_and_light() -> None:
    code = (
        "import json, resource, sys\n"
        "from layline.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = {'torch', 'scipy', 'matplotlib', 'numpy', 'networkx', 'pydantic'}\n"
        "print(json.dumps([used.ru_utime + used.ru_stime, sorted(heavy & set(sys.modules))]))"
    )
    # The best of three: the budget is the program's, not that of whatever else runs here.
    results = [json.loads(run_python(code).splitlines()[-1]) for _ in range(3)]
    assert results[0][1] == []
    assert min(seconds for seconds, _ in results) < 0.150


CONTRACT = {
    "bench": ["--json"],
    "calibrate": ["--output"],
    "capture": ["--json", "--output", "--rank"],
    "compare": ["--json", "--recalibrate"],
    "demo": ["--output"],
    "doctor": ["--json"],
    "plan": [
        "--budget-s",
        "--explain",
        "--farm",
        "--gap",
        "--jobs",
        "--json",
        "--output",
        "--seed",
        "--set",
        "--sweep",
        "--top",
        "--verify",
        "--why",
    ],
    "profile": ["--device", "--json", "--merge", "--output", "--quick", "--ranks", "--show"],
    "report": ["--output"],
    "run": ["--data", "--output", "--steps"],
    "simulate": ["--json", "--trace"],
    "validate": ["--json", "--page"],
}


def test_commands_and_flags_are_those_of_the_contract() -> None:
    flags = {
        name: sorted(
            max(parameter.opts, key=len)
            for parameter in command.params
            if isinstance(parameter, click.Option)
        )
        for name, command in main.commands.items()
    }
    assert flags == CONTRACT


def test_the_readme_names_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"layline {name}" in text for name in CONTRACT)


def test_no_path_of_one_machine_is_in_the_tree() -> None:
    home = os.sep + ROOT.parts[1] + os.sep
    assert not [path for path in SOURCES if home in path.read_text(encoding="utf-8")]
