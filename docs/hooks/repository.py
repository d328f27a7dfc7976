"""mkdocs hook: links from pages to files of the repository outside `docs/` lead to pages of the site that show them."""

from __future__ import annotations

import ast
import posixpath
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the top that are pages themselves; the README's place is taken by the site's own first page."""
WRITTEN_HERE = {page: source for source, page in ROOT_PAGES.items() if page != "index.md"}
LINK = re.compile(r"(\[[^\]]*\]\()([^)#\s]+)(#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", ".yml": "yaml", ".md": "markdown", ".sh": "bash"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages made of files at the top, and one page for every other file of the repository that is linked to."""
    for page, source in WRITTEN_HERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    linked = set()
    for file in files.documentation_pages():
        for _, target, _ in LINK.findall(file.content_string):
            source = repository_path(target, file.src_uri)
            if source is not None and site_uri(source) == source_page(source) and (ROOT / source).is_file():
                linked.add(source)
    for source in sorted(linked):
        files.append(File.generated(config, source_page(source), content=show(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside `docs/` into links to their pages, and `file.py#name` into one to its line."""

    def replace(match: re.Match[str]) -> str:
        before, target, anchor = match.groups()
        source = repository_path(target, page.file.src_uri)
        if source is None or files.get_file_from_path(site_uri(source)) is None:
            return match.group()
        if anchor and source.endswith(".py"):
            anchor = f"#__codelineno-0-{line_of(source, anchor[1:])}"
        relative = posixpath.relpath(site_uri(source), posixpath.dirname(page.file.src_uri) or ".")
        return f"{before}{relative}{anchor or ''})"

    return LINK.sub(replace, markdown)


def repository_path(target: str, page: str) -> str | None:
    """The file, from the top of the repository, that a link on a page means; None for links that mkdocs understands."""
    if "://" in target or target.startswith(("/", "mailto:")):
        return None
    written_here = page in WRITTEN_HERE
    base = "" if written_here else posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(base, target))
    return path if written_here or not path.startswith("docs/") else None


def site_uri(source: str) -> str:
    """Where a file of the repository is on the site."""
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return ROOT_PAGES.get(source, source_page(source))


def source_page(source: str) -> str:
    """The page that shows a file as it is."""
    return f"source/{source}.md"


def line_of(source: str, name: str) -> int:
    """The line of a Python file, from 1, that a link `file.py#name` means.

    `name` is a function, class, method or annotated field with its class before it (`VLM.encode`, `Args.target_kl`), or
    the first words of a comment, in lower case and joined by hyphens (`bootstrap-value-if-not-terminated`).

    Raises:
        ValueError: there is no such line, or the words begin several comments.
    """
    defined, comments = places(source)
    lines = [defined[name]] if name in defined else [n for text, n in comments if f"{text}-".startswith(f"{name}-")]
    if len(lines) != 1:
        raise ValueError(f"{source}#{name}: expected a definition or one comment of that name, found {len(lines)}")
    return lines[0]


@lru_cache
def places(source: str) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Lines of a file's definitions by qualified name, and of its comments by their words."""
    text = (ROOT / source).read_text()
    defined: dict[str, int] = {}

    def visit(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                defined.setdefault(inside + child.name, child.lineno)
                visit(child, f"{inside}{child.name}.")
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                defined.setdefault(inside + child.target.id, child.lineno)

    visit(ast.parse(text), "")
    found = (re.search(r"(?:^|  )# (.*)", line) for line in text.splitlines())
    words = [(re.findall(r"[a-z0-9]+", match[1].lower()) if match else [], n) for n, match in enumerate(found, 1)]
    return defined, [("-".join(comment), n) for comment, n in words if comment]


def show(source: str) -> str:
    """A page with the text of a file, left out of the search."""
    path = ROOT / source
    text = path.read_text().rstrip("\n")
    fence = "`" * 5
    language = LANGUAGES.get(path.suffix, "text")
    return f'---\nsearch:\n  exclude: true\n---\n\n# {source}\n\n{fence}{language} linenums="1"\n{text}\n{fence}\n'
