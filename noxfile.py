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


@nox.session
def docs(session: nox.Session) -> None:
    """Build the pages in site/, and open them in a browser. A link or an anchor that does not exist is an error."""
    session.install("-e", ".[docs,test]")
    session.env["NO_MKDOCS_2_WARNING"] = "1"
    session.run("mkdocs", "build", "--strict")
    session.run("pytest", "tests/test_site.py")


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that take longer."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "slow and not client", *session.posargs)
