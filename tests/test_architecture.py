"""The design, held by tests: layers, budgets, the public names, safe loading, and maps that match the land.

Every check is a function of some source, and each is shown a made-up fault first: a check that cannot fail is no check.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "selftaught"
SOURCES = sorted(PACKAGE.rglob("*.py"))

FILE_LINES, FUNCTION_LINES, METHOD_LINES, TRAIN_LINES = 400, 60, 100, 200
# methods/ also holds their contract.
NOT_A_METHOD = {"__init__.py", "base.py", "check.py", "describe.py", "fields.py", "objective.py", "several.py"}
PICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
# Put together here, so that this file does not hold what it forbids.
MACHINE_PATHS = ["/" + folder + "/" for folder in ("work", "root", "farm", "opt/wheels", "opt/pypi")]
REGISTRY_HOSTS = ["py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "ana" + "conda.org"]


# Layers.


def lint_imports(folder: Path, config: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter in `folder`, with `path` first among the places of packages."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    return subprocess.run(
        [*command, "--config", str(config), "--no-cache"], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(path)},
    )  # fmt: skip


def test_layers_hold() -> None:
    done = lint_imports(ROOT, ROOT / "pyproject.toml", ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = len(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"])
    assert f"Contracts: {kept} kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "imported", "allowed"),
    [
        ("methods", "credit", True),
        ("train", "rollout", True),
        ("data", "loss", False),  # a stage imports a stage
        ("records", "data", False),  # upwards
        ("errors", "records", False),
        ("methods", "rollout", False),  # a method may use credit and loss alone
        ("train", "cli", False),
        ("hints", "chat", True),
        ("train", "hints", False),
    ],
)
def test_layer_contract_finds_a_forbidden_import(module: str, imported: str, allowed: bool, tmp_path: Path) -> None:
    package = tmp_path / "made_up"
    package.mkdir()
    stages = "data rollout reward privilege score credit loss optim eval report"
    loop = ("cli studies train doctor hints pictures finish session evaluate forecast batches assemble measure schema "
            "engines run methods")
    for name in f"__init__ {loop} {stages} records vocabulary tensors chat recipe errors places heap processor".split():
        (package / f"{name}.py").write_text("")
    (package / f"{module}.py").write_text(f"import made_up.{imported}\n")
    config = tmp_path / "pyproject.toml"
    config.write_text((ROOT / "pyproject.toml").read_text().replace("selftaught", "made_up"))
    done = lint_imports(tmp_path, config, tmp_path)
    assert (done.returncode == 0) is allowed, done.stdout + done.stderr


# Budgets.


def long_functions(source: str, limit: int) -> list[str]:
    """Functions of more than `limit` lines, as name:lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > limit:
                found.append(f"{node.name}:{lines}")
    return found


def file_budget(path: Path) -> int:
    """The most lines that `path`, relative to the package, may have."""
    if path == Path("train.py"):
        return TRAIN_LINES
    if path.parent == Path("methods") and path.name not in NOT_A_METHOD:
        return METHOD_LINES
    return FILE_LINES


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_keep_their_budgets(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines, limit = len(source.splitlines()), file_budget(path.relative_to(PACKAGE))
    assert lines <= limit, f"{lines} lines, {limit} allowed: which abstraction is missing?"
    assert long_functions(source, FUNCTION_LINES) == []


def test_budgets_find_what_is_too_long() -> None:
    assert long_functions("def f():\n" + "    x = 1\n" * 60, 60) == ["f:61"]
    assert long_functions("class C:\n    async def g(self):\n" + "        x = 1\n" * 59, 60) == []
    budgets = [file_budget(Path(p)) for p in ("train.py", "methods/grpo.py", "methods/base.py", "data/split.py")]
    assert budgets == [200, 100, 400, 400]


# The public face.


def test_top_level_names_are_the_published_ones() -> None:
    import selftaught

    assert set(selftaught.__all__) == {"train", "Run", "TokenBatch", "objective", "chunked_objective", "Verdict"}
    for name in selftaught.__all__:
        assert getattr(selftaught, name) is not None


def test_the_package_is_typed_and_its_data_ships() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = config["tool"]["setuptools"]["package-data"]["selftaught"]
    shipped = {p for pattern in patterns for p in PACKAGE.glob(pattern)}
    data = {p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert data == shipped
    assert PACKAGE / "py.typed" in data


# No code from data.


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _unsafe_call(call: ast.Call) -> Iterator[str]:
    name = _dotted(call.func)
    if name in ("eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield name
    for keyword in call.keywords:
        said_yes = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        if keyword.arg in ("trust_remote_code", "allow_pickle") and said_yes:
            yield f"{keyword.arg}=True"


def unsafe(source: str) -> list[str]:
    """What in `source` could run code that came as data."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += _unsafe_call(node)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_loads_code_from_data(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "finding"),
    [
        ("import pickle", "pickle"),
        ("from dill.source import getsource", "dill.source"),
        ("import torch\nx = torch.load('a', weights_only=False)", "torch.load"),
        ("eval('1 + 1')", "eval"),
        ("def f(x):\n    exec(x)", "exec"),
        ("load(name, trust_remote_code=True)", "trust_remote_code=True"),
        ("numpy.load(name, allow_pickle=True)", "allow_pickle=True"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
    ],
)
def test_unsafe_loading_is_found(source: str, finding: str) -> None:
    assert unsafe(source) == [finding]


def test_harmless_namesakes_pass() -> None:
    assert unsafe("model.eval()\nf(x, trust_remote_code=False)\nyaml.safe_load(y)\nf(x, trust_remote_code=z)") == []


# Maps.


def tree_of(readme: str) -> set[str]:
    """Names with a caption in the README's tree: the fenced block that holds `src/selftaught/`."""
    blocks = [b for b in re.findall(r"^```[^\n]*\n(.*?)^```", readme, re.M | re.S) if "src/selftaught/" in b]
    assert len(blocks) == 1, f"README.md has {len(blocks)} fenced blocks with src/selftaught/, not one"
    return set(re.findall(r"(?<![\w/.])(\w+(?:\.py|/))[ \t]+\S", blocks[0]))


def test_readme_tree_names_what_is_there() -> None:
    listed = tree_of((ROOT / "README.md").read_text(encoding="utf-8"))
    there = {p.name + "/" for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    there |= {p.name for p in PACKAGE.glob("*.py") if not p.name.startswith("__")}
    assert there - listed == set(), "in src/selftaught, but without a caption in the README's tree"
    gone = {name for name in listed if not (PACKAGE / name).exists() and not (ROOT / name).exists()}
    assert gone == set(), "in the README's tree, but nowhere else"


def test_readme_tree_is_read() -> None:
    tree = "src/selftaught/\n  data/      problems\n  lost/\n  run.py     a run     cli.py  commands\n"
    assert tree_of(f"# x\n```\n{tree}```\ntext\n```\nother/ block\n```\n") == {"data/", "run.py", "cli.py"}


def project_files() -> list[Path]:
    """Every file of the project that is not ignored, new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = [ROOT / name for name in ("src", "tests", "docs", "benchmarks", "examples")]
    return [p for f in folders for p in f.rglob("*") if p.is_file()] + [p for p in ROOT.iterdir() if p.is_file()]


def forbidden_words(text: str) -> list[str]:
    """Paths of one machine and hosts of registries: a project that names them works in one place only."""
    return [word for word in (*MACHINE_PATHS, *REGISTRY_HOSTS) if word in text]


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = {}
    for path in project_files():
        if path.suffix in (".png", ".gif", ".parquet", ".safetensors"):
            continue
        words = forbidden_words(path.read_text(encoding="utf-8", errors="replace"))
        if words:
            found[str(path.relative_to(ROOT))] = words
    assert found == {}


def test_forbidden_words_are_found() -> None:
    assert forbidden_words("cd /" + "work/main") == ["/" + "work/"]
    assert forbidden_words("see https://py" + "pi.org/simple") == ["py" + "pi.org"]
    assert forbidden_words("their work/life and a registry") == []
