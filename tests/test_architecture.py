"""Which folder may import which, checked in new processes and in the source."""

import ast
import subprocess
import sys
from pathlib import Path

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


def test_importing_attnkd_imports_neither_timm_nor_the_compiler():
    """Either takes longer than attnkd and torch together."""
    output = run_without(set(), "import attnkd; print({'timm', 'matplotlib', 'torch._dynamo'} & set(sys.modules))")
    assert output.strip() == "set()"


def imported(node: ast.AST) -> set[str]:
    """Dotted names of what one statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)}


PRODUCT = {"operators", "files", "attention", "relation", "capture", "methods"}
MAY_IMPORT = {
    # folder: the folders of attnkd that it may import, besides itself; "attnkd" is the package's own public names
    "operators": set(),
    "files": set(),
    "attention": {"operators", "attnkd_kernels"},
    "relation": {"operators", "attnkd_kernels", "attention"},
    "capture": {"operators", "attention"},
    "methods": {"attention", "relation", "capture", "files", "attnkd"},
    "testing": PRODUCT | {"attnkd_kernels", "attnkd"},
    "training": PRODUCT | {"attnkd"},
    "evaluation": PRODUCT | {"training", "attnkd"},
    "commands": PRODUCT | {"training", "evaluation", "testing", "attnkd"},
    "demo": PRODUCT | {"training", "evaluation", "commands", "attnkd"},
    "__init__": PRODUCT,
    "__main__": {"commands"},
}
EXCEPTIONS = {
    "attnkd/commands/cli.py": {"demo"},  # the entry of `attnkd demo`, when it is asked for
}
FAST = ("chunked", "fused", "fused_rows", "fused_maps", "fused_attention")


def room(name: str) -> str | None:
    """The folder of an imported name, None for what is not ours."""
    first, _, rest = name.partition(".")
    if first != "attnkd":
        return first if first in ("attnkd_kernels", "benchmarks", "tests") else None
    inside = rest.partition(".")[0]
    return inside if inside in MAY_IMPORT else "attnkd"


def test_arrows_point_one_way():
    """Every file of the package; a new folder must be added above."""
    for file in (ROOT / "attnkd").rglob("*.py"):
        path = file.relative_to(ROOT)
        here = path.parts[1].removesuffix(".py")
        assert here in MAY_IMPORT, f"{path}: this test knows no folder of that name"
        allowed = MAY_IMPORT[here] | {here} | EXCEPTIONS.get(path.as_posix(), set())
        found = {found for name in imports(file) - {"attnkd"} if (found := room(name)) is not None}
        assert found <= allowed, f"{path} imports {found - allowed}"
    kernels = list((ROOT / "kernels").rglob("*.py"))
    for file in kernels:
        names = {name.partition(".")[0] for name in imports(file)}
        assert not names & {"attnkd", "benchmarks", "tests", "timm"}, f"{file} imports {names}"
    assert kernels
    for name in EXCEPTIONS:
        assert (ROOT / name).exists(), f"{name} is gone; take its exception out"


def test_nothing_fast_imports_a_reference_and_the_reference_nothing_but_torch():
    for place in ("attention", "relation"):
        folder = ROOT / "attnkd" / place
        files = [file for file in folder.rglob("*.py") if file.stem in FAST or file.parent.name in FAST]
        assert {file.stem for file in files} >= {"fused"} and len(files) >= 2
        for file in files:
            wrong = {name for name in imports(file) if "reference" in name or name.startswith("timm")}
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"
        outside = {name.partition(".")[0] for name in imports(folder / "reference.py")}
        assert outside <= {"__future__", "math", "typing", "torch", "attnkd"}, outside
    for file in (ROOT / "attnkd/attention/chunked").rglob("*.py"):
        assert not {name for name in imports(file) if name.startswith(("triton", "attnkd_kernels"))}, file
    relation = {name for file in (ROOT / "attnkd/relation").rglob("*.py") for name in imports(file)}
    shared = {name for name in relation if name.startswith("attnkd.attention.")}
    common = ("attnkd.attention.checks", "attnkd.attention.dispatch", "attnkd.attention.kinds")
    assert all(name.startswith(common) for name in shared), shared


def test_timm_has_one_home():
    """Only one module of the product imports timm when it is imported; others do inside the function that needs it."""
    eager = set()
    for file in (ROOT / "attnkd").rglob("*.py"):
        lines = ast.parse(file.read_text()).body
        names = {name for node in lines if isinstance(node, (ast.Import, ast.ImportFrom)) for name in imported(node)}
        if any(name.partition(".")[0] == "timm" for name in names):
            eager.add(file.relative_to(ROOT / "attnkd").as_posix())
    assert eager == {"capture/models.py"}


def test_the_root_stays_small():
    assert len(list((ROOT / "attnkd").glob("*.py"))) <= 4


def test_the_repository_stands_alone():
    """kernels/ is a source root, not a package: a top-level package of that name would collide with a known distribution."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "attnkd" / "py.typed").exists() and (ROOT / "kernels" / "attnkd_kernels" / "py.typed").exists()


def test_kernels_take_few_arguments():
    """Sides, statistics and specs (attnkd_kernels/language.py) keep kernels to 16 parameters and their helpers to 12."""
    package = ROOT / "kernels" / "attnkd_kernels"
    seen, crowded = 0, {}
    for file in package.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
                seen += 1
                count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
                if count > (16 if node.name.endswith("_kernel") else 12):
                    crowded[f"{file.relative_to(package)}: {node.name}"] = count
    assert seen > 20 and not crowded, crowded
