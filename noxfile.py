"""Test sessions on other versions and with other libraries: ``nox``, or ``nox -s NAME``.

Arguments after ``--`` go to pytest. One pair of versions: ``nox -s "tests(torch='oldest', timm='newest')"``.
"""

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


@nox.session
@nox.parametrize("timm", ["oldest", "newest"])
@nox.parametrize("torch", ["oldest", "newest"])
def tests(session: nox.Session, torch: str, timm: str) -> None:
    """Run the tests with the oldest or newest torch and timm. The oldest timm has its oldest Hub client, too."""
    pins = Path("tests/constraints-oldest.txt").read_text().splitlines()
    versions = {"torch": torch}
    chosen = [pin for pin in pins if "==" in pin and versions.get(pin.partition("==")[0], timm) == "oldest"]
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(chosen))
    session.install("-c", str(constraints), "-e", ".[test]")
    session.run("python", "-c", "import timm, torch; print('timm', timm.__version__, 'torch', torch.__version__)")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Run the tests on all supported Python versions, with the newest torch and timm."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def clients(session: nox.Session) -> None:
    """Run the tests of libraries that build on timm."""
    session.install("-e", ".[test,clients]")
    session.run("pytest", "-m", "client", *session.posargs)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Run the default tests and print the lines that they do not run. Children of the tests are not counted."""
    session.install("-e", ".[test]", "pytest-cov")
    session.run(
        "pytest", "--cov=timm_dgconv", "--cov-branch", "--cov-report=term-missing:skip-covered", *session.posargs
    )


@nox.session
@nox.parametrize("tools", [["-e", ".[test,mobile]"], ["-e", ".[test]", "apache-tvm"]], ids=["mobile", "tvm"])
def mobile(session: nox.Session, tools: list[str]) -> None:
    """Run the tests of the tools for phones and small devices. CI does not run them."""
    session.install(*tools)
    session.run("pytest", "-n", "0", "-m", "client", "tests/integrations/test_deploy_tools.py", *session.posargs)
