"""Show the READMEs and the measured figures as pages of the site. MkDocs itself takes files of docs/ only."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository outside of docs/. The README is the first page."""
    index = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=index))
    measured = sorted((ROOT / "benchmarks" / "results").glob("*.*"))
    operator = ROOT / "timm_dgconv" / "ops" / "README.md"
    examples = sorted((ROOT / "examples").glob("*.py"))
    for path in [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", operator, *measured, *examples]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let the links of docs/ to files outside point into the site."""
    return markdown.replace("](../", "](")
