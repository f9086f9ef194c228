"""The pages that MkDocs builds work in a browser, on a desktop and on a phone.

    pip install -e ".[docs,test]" && pytest tests/test_site.py

They need Chromium: Debian's package, or ``playwright install chromium``.
"""

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; use the extra 'docs'")
ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
QUIET = "--disable-background-networking --disable-component-update --disable-sync --no-first-run --no-sandbox"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Build the pages and serve them."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    subprocess.run(command, cwd=ROOT, check=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_pages_work_in_a_browser(site: tuple[str, Path], width: int) -> None:
    """No page has an error in the console, a missing file, a picture that is not shown, or scrolls to the side."""
    url, folder = site
    pages = sorted(folder.rglob("*.html"))
    assert len(pages) > 15
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: problems.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"{request.url} failed"))
        page.on("request", lambda request: problems.append(request.url) if not request.url.startswith(url) else None)
        page.on("response", lambda response: problems.append(response.url) if response.status >= 400 else None)
        for path in pages:
            page.goto(f"{url}/{path.relative_to(folder).as_posix()}", wait_until="networkidle")
            assert not problems, (path, problems)
            assert page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth"), path
            assert page.evaluate("[...document.images].every(image => image.naturalWidth)"), path
        browser.close()
