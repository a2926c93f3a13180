"""The arrows of the house: who may import whom, checked in fresh processes and in the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUP = """
import sys
sys.modules.update(dict.fromkeys({blocked}))  # None makes an import fail and find_spec find nothing
sys.path[:0] = [{root!r}, {kernels!r}]
"""


def run_without(blocked: set[str], code: str) -> str:
    setup = SETUP.format(blocked=blocked, root=str(ROOT), kernels=str(ROOT / "kernels"))
    result = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_reference_and_chunked_run_without_triton_and_timm():
    output = run_without(
        {"triton", "timm", "sklearn", "matplotlib"},
        """
import torch, attnkd
q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
for impl in ("reference", "chunked", "auto"):
    print(attnkd.attention_divergence(q, k, k[:, :, :1], q.expand(-1, -1, 5, -1), impl=impl).item() > 0)
    print(attnkd.attention_rows(q, k, merge="logsum", impl=impl).sum().item())
try:
    attnkd.attention_divergence(q, k, q, k, impl="triton")
except NotImplementedError as error:
    print(error)
""",
    )
    assert output.count("True") == 3 and "impl='triton': triton is not installed" in output


def test_importing_attnkd_does_not_import_timm():
    output = run_without(set(), "import attnkd; print({m.split('.')[0] for m in sys.modules} & {'timm', 'matplotlib'})")
    assert output.strip() == "set()"


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels/attnkd_kernels", ("attnkd.", "timm", "benchmarks")),
        ("attnkd", ("benchmarks", "tests")),
        ("attnkd/attention/reference.py", ("triton", "timm", "numpy", "attnkd_kernels")),
        ("attnkd/attention/chunked", ("triton", "timm", "attnkd_kernels", "attnkd.attention.reference")),
        ("attnkd/attention/fused_rows.py", ("timm", "attnkd.attention.reference")),
    ],
)
def test_arrows_point_one_way(folder, forbidden):
    path = ROOT / folder
    for file in [path] if path.is_file() else path.rglob("*.py"):
        wrong = {
            name
            for name in imports(file)
            if name.startswith(forbidden) or name in ("attnkd",) and "attnkd." in forbidden
        }
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_the_repository_stands_alone():
    """kernels/ is a source root, not a package: a top-level package of that name would collide with a known distribution."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "attnkd" / "py.typed").exists() and (ROOT / "kernels" / "attnkd_kernels" / "py.typed").exists()


def test_kernels_take_few_arguments():
    """Sides, statistics and specs (attnkd_kernels/language.py) keep kernels to 16 parameters and their helpers to 12."""
    package = ROOT / "kernels" / "attnkd_kernels"
    seen, crowded = 0, {}
    for file in package.rglob("*.py"):
        if file.parent.name == "map":
            continue  # the kernels of whole maps do not speak that language yet
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                seen += 1
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                if count > (16 if node.name.endswith("_kernel") else 12):
                    crowded[f"{file.relative_to(package)}: {node.name}"] = count
    assert seen > 20 and not crowded, crowded
