"""timm knows the models, in whatever way and order timm, torch and this package are imported.

An import happens once per process, so every case runs in a new process.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import Patch

ROOT = Path(__file__).parents[1]
NO_CACHES = shutil.ignore_patterns("__pycache__")

NO_AUTOLOAD = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

OUR_WARNINGS = ["error:Overwriting", "error:timm-dgconv"]  # timm's, of a model that is registered twice, and our own

MODELS_WORK = """
import timm
missing = {"g_resnext50", "g_resnext101", "test_g_resnext"} - set(timm.list_models())
assert not missing, missing
assert type(timm.create_model("test_g_resnext")).__module__ == "timm_dgconv.models.g_resnet"
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Patch) -> None:
    """Leave the repository, so that Python does not find it, and turn our warnings into errors, also in children."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", ",".join(OUR_WARNINGS))
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)


def python(*arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | (env or {}), cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.fail(f"{done.stderr}\n{done.stdout}", pytrace=False)
    return done.stdout


def run(*code: str, env: Mapping[str, str] | None = None) -> str:
    return python("-c", "\n".join(map(dedent, code)), env=env)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, installed."""
    folder = tmp_path_factory.mktemp("site-packages")
    python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", folder, ROOT
    )
    return folder


@pytest.fixture(scope="module", params=["installed", "wheel"])
def env(request: pytest.FixtureRequest) -> dict[str, str]:
    """The package as this environment has it, and as its wheel has it."""
    if request.param == "installed":
        return {}
    return {"PYTHONPATH": str(request.getfixturevalue("wheel"))}


def test_torch_imports_the_finder_and_nothing_else(env: dict[str, str]) -> None:
    run(
        """
        import sys, torch
        loaded = {name for name in sys.modules if name.split(".")[0] in {"timm", "timm_dgconv", "torchvision"}}
        assert loaded == {"timm_dgconv", "timm_dgconv._autoload"}, loaded

        from timm_dgconv._autoload import install
        install()
        ours = [finder for finder in sys.meta_path if type(finder).__module__ == "timm_dgconv._autoload"]
        assert len(ours) == 1, ours
        """,
        env=env,
    )


def test_timm_alone_has_the_models(env: dict[str, str]) -> None:
    run(MODELS_WORK, "from timm_dgconv._autoload import install; install()", env=env)


def test_without_autoload_the_package_registers_when_imported(env: dict[str, str]) -> None:
    run(
        """
        import sys, torch, timm
        assert "timm_dgconv" not in sys.modules
        assert not timm.list_models("*g_resnext*")
        import timm_dgconv
        """,
        MODELS_WORK,
        env={**env, **NO_AUTOLOAD},
    )


def test_the_wheel_has_the_package_and_its_command_only(wheel: Path) -> None:
    found = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if "__pycache__" not in path.parts}
    package = [path for path in (ROOT / "timm_dgconv").rglob("*") if "__pycache__" not in path.parts]
    assert {path.relative_to(ROOT).as_posix() for path in package} | {"bin/timm-dgconv"} <= found
    assert "timm_dgconv/py.typed" in found
    assert {name.split("/")[0].partition("-")[0] for name in found} == {"timm_dgconv", "bin"}


@pytest.mark.parametrize(
    "imports",
    [
        "import timm, torch, timm_dgconv, timm_dgconv.models.g_resnet",
        "from timm.models import create_model",
        "from timm_dgconv.models.g_resnet import g_resnext50",
    ],
)
def test_imports_may_come_in_any_order(imports: str) -> None:
    run(imports, MODELS_WORK)


def test_any_name_may_be_imported_first() -> None:
    """Each in a fork of a process that has imported torch only."""
    code = """
    import os, torch, timm_dgconv
    modules = ["_compat", "optim.cost", "optim.hooks", "optim.steered_model", "report", "tracing"]
    imports = [f"import timm_dgconv.{name}" for name in modules]
    for statement in imports + [f"from timm_dgconv import {name}" for name in timm_dgconv.__all__]:
        if not (child := os.fork()):
            exec(statement)
            import timm
            os._exit(not timm.is_model("g_resnext50"))
        assert os.waitpid(child, 0)[1] == 0, statement
    """
    run(code)


def test_the_timm_of_a_clone_has_the_models(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.origin is not None
    clone = tmp_path / "clone"
    shutil.copytree(Path(spec.origin).parent, clone / "timm", ignore=NO_CACHES)
    # timm's train.py begins like this.
    script = clone / "train.py"
    script.write_text(f"import torch\nfrom timm import utils\n{MODELS_WORK}\nprint(timm.__file__)")
    found = python(script, cwd=clone).strip()
    assert Path(found).parent == clone / "timm"


@pytest.mark.parametrize(
    ("module", "line", "error", "imports", "env"),
    [
        ("models/g_resnet", "raise ImportError('broken')", "ImportError: broken", "torch, timm", {}),
        ("models/g_resnet", "1 +", "SyntaxError: ", "timm, timm_dgconv", {}),
        ("layers/dgconv", "raise RuntimeError('broken')", "RuntimeError: broken", "timm, timm_dgconv", NO_AUTOLOAD),
    ],
    ids=["ImportError", "SyntaxError", "RuntimeError"],
)
def test_timm_works_with_one_warning_if_the_package_is_broken(
    tmp_path: Path, module: str, line: str, error: str, imports: str, env: Mapping[str, str]
) -> None:
    package = shutil.copytree(ROOT / "timm_dgconv", tmp_path / "broken" / "timm_dgconv", ignore=NO_CACHES)
    path = package / f"{module}.py"
    path.write_text(f"{line}\n{path.read_text()}")
    output = run(
        f"""
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import {imports}, timm_dgconv
            timm.create_model("test_resnet")
            assert not timm.list_models("*g_resnext*")
        print(*(warning.message for warning in caught if "dgconv" in str(warning.message)), sep="\\n")
        """,
        env={**env, "PYTHONPATH": str(package.parent)},
    )
    (warning,) = output.splitlines()
    assert warning.startswith("timm-dgconv could not register its models, timm works without them: ")
    assert error in warning


def test_public_names_are_imported_on_first_use() -> None:
    run(
        """
        import sys, timm_dgconv
        assert "torch" not in sys.modules
        names = timm_dgconv.__all__
        assert "DGConv2d" in names and set(names) <= set(dir(timm_dgconv))
        try:
            timm_dgconv.nonsense
        except AttributeError as error:
            assert all(word in str(error) for word in ["nonsense", *names]), error
        else:
            raise AssertionError("nonsense exists")
        from timm_dgconv import *
        import timm_dgconv.optim.complexity
        assert timm_dgconv.complexity is complexity is timm_dgconv.optim.complexity.complexity
        """
    )
