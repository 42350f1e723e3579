"""Check the built site: every page is there, in the navigation, filled, and loads nothing from another host.

Usage: python .ci/check_site.py SITE_FOLDER DOCS_FOLDER
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED_LINKS = {"stylesheet", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "icon", "manifest"}
"""Values of ``<link rel>`` that make a browser contact the host."""
STYLE_URL = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")


class Page(HTMLParser):
    """What one page loads, where it links to, its element ids and its words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.update(given[name] for name in ("id", "name") if name in given)
        self.loads += [given[name] for name in ("src", "srcset", "poster", "data") if name in given]
        self.loads += style_urls(given.get("style", ""))
        if tag == "link" and set(given.get("rel", "").split()) & FETCHED_LINKS:
            self.loads.append(given.get("href", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("article", "script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["article"]:
            self.text += data
        if self._inside[-1:] == ["style"]:
            self.loads += style_urls(data)


def style_urls(css: str) -> list[str]:
    """Addresses that a style sheet makes the browser fetch."""
    return [first or second for first, second in STYLE_URL.findall(css)]


def is_foreign(address: str) -> bool:
    """True for anything that leaves the site, protocol-relative addresses included."""
    return urlsplit(address).scheme in ("http", "https", "ws", "wss") or address.startswith("//")


def broken_links(site: Path, path: Path, pages: dict[Path, Page]) -> list[str]:
    """Links of one page to files or headings that are not in the site."""
    problems = []
    for link in pages[path].links:
        parts = urlsplit(link)
        if parts.scheme or link.startswith("//"):
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        if not target.exists():
            problems.append(f"{path.relative_to(site)}: link to {link}, which is not in the site")
        elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
            problems.append(f"{path.relative_to(site)}: link to {link}, but that page has no such heading")
    return problems


def check(site: Path, docs: Path) -> list[str]:
    """Sentences about what is wrong; empty when the site is sound."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    problems = [
        f"{path.relative_to(site)}: loads {address} from another host"
        for path, page in pages.items()
        for address in page.loads
        if is_foreign(address)
    ]
    problems += [
        f"{path.relative_to(site)}: loads {address} from another host"
        for path in site.rglob("*.css")
        for address in style_urls(path.read_text(encoding="utf-8"))
        if is_foreign(address)
    ]
    home = site / "index.html"
    if home not in pages:
        return [*problems, "index.html is missing"]
    reachable = {(site / unquote(urlsplit(link).path)).resolve() for link in pages[home].links}
    for source in sorted(docs.rglob("*.md")):
        path = site / source.relative_to(docs).with_suffix(".html")
        if path not in pages:
            problems.append(f"{source.relative_to(docs)}: not built")
        elif len(pages[path].text.split()) < 20:
            problems.append(f"{path.relative_to(site)}: has next to no text")
        elif path != home and path not in reachable:
            problems.append(f"{path.relative_to(site)}: not in the navigation of mkdocs.yml")
    if problems:  # a page that is missing breaks a link on every other one
        return problems
    return [problem for path in sorted(pages) for problem in broken_links(site, path, pages)]


def main() -> int:
    """Print the problems; exit 1 if there is one."""
    site, docs = (Path(argument).resolve() for argument in sys.argv[1:3])
    problems = check(site, docs)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{sum(1 for _ in docs.rglob('*.md'))} pages, all there, nothing loaded from another host")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
