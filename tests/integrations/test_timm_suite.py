"""timm's own model tests on our models. nox runs them with the oldest and the newest timm.

timm has its tests in its source distribution only, so this needs a package index.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = 10  # for each model
SMALL = ("g_resnext50", "test_g_resnet", "test_g_resnext")
LARGE = ("g_densenet121", "g_resnet18", "g_resnet50", "g_resnext101")  # most of the time, and up to 10 GB of memory


def pip(*args: str | Path) -> None:
    result = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    gave_up = "from versions: none" in result.stderr or "Max retries exceeded" in result.stderr
    if result.returncode and gave_up and "connection broken by" in result.stderr:
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of timm's source distribution, with the version that is installed."""
    version, folder = importlib.metadata.version("timm"), tmp_path_factory.mktemp("timm")
    timm = f"timm=={version}"
    pip("download", "--no-deps", "--no-binary", "timm", "--no-build-isolation", timm, "-d", folder)
    shutil.unpack_archive(folder / f"timm-{version}.tar.gz", folder)
    root = folder / f"timm-{version}"
    shutil.rmtree(root / "timm")  # `python -m pytest` would import it rather than the installed one
    (root / "conftest.py").write_text(f"import timm\n\nassert timm.__version__ == {version!r}, timm.__file__\n")

    # The forward_intermediates tests take the models of the listed modules, and a plugin's module is not listed.
    tests, listed = root / "tests" / "test_models.py", "FEAT_INTER_FILTERS = ["
    text = tests.read_text(encoding="utf-8")
    assert text.count(listed) == 1
    tests.write_text(text.replace(listed, f"{listed}'g_resnet', "), encoding="utf-8")

    return root


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("models", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=" or ".join)
def test_timm_model_tests_pass(models: tuple[str, ...], suite: Path) -> None:
    # The tags of the large models are made as those of g_resnext50.
    names = [f"{model}." for model in models if models is SMALL] + [f"{model}]" for model in models]
    # The pretrained tests download other models' weights.
    # timm expects the same bits of a graph, which has the masked dense form. A ResNet has them at its initialisation.
    selected = f"({' or '.join(names)}) and not pretrained and not (forward_fx and g_densenet121)"
    command = [sys.executable, "-m", "pytest", "tests/test_models.py", "-k", selected]
    # Without the plugin for timeouts: timm's two minutes a test are meant for other machines.
    command += ["-p", "no:cacheprovider", "-p", "no:timeout", "--junitxml=results.xml"]
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    # The longest part of the suite: all cores, without holding those that another worker can use.
    env |= {"OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, cwd=suite, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]

    cases = list(ElementTree.parse(suite / "results.xml").iter("testcase"))
    assert not {case.get("name"): case[0].tag for case in cases if len(case)}, "timm skips tests of our models"
    # timm has no FX and intermediate features of some DenseNets, and the tags of large models are those of g_resnext50.
    assert len(cases) >= (TESTS if models is SMALL else TESTS // 2) * len(models)
