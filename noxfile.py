"""The suite on all pairs of the oldest and newest supported torch and timm, and inside other libraries: ``nox``.

One of them: ``nox -s "tests(torch='oldest', timm='newest')"``; what follows ``--`` goes to pytest.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
PYTEST = ("pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


@nox.session
@nox.parametrize("timm", ["oldest", "newest"])
@nox.parametrize("torch", ["oldest", "newest"])
def tests(session: nox.Session, torch: str, timm: str) -> None:
    """The whole suite; timm's Hub client and safetensors are as old as timm."""
    pins = Path("tests/constraints-oldest.txt").read_text().splitlines()
    versions = {"torch": torch}
    chosen = [pin for pin in pins if "==" in pin and versions.get(pin.partition("==")[0], timm) == "oldest"]
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(chosen))
    session.install("-c", str(constraints), "-e", ".[test]")
    session.run("python", "-c", "import timm, torch; print('timm', timm.__version__, 'torch', torch.__version__)")
    session.run(*PYTEST, *session.posargs)


@nox.session
def clients(session: nox.Session) -> None:
    """Programs of others that build on timm."""
    session.install("-e", ".[test,clients]")
    session.run("pytest", "tests/test_clients.py", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """What takes minutes: larger numbers of examples, whole runs."""
    session.install("-e", ".[test]")
    session.run(*PYTEST, "-m", "slow", *session.posargs)
