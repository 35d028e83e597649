"""The site has every public name, with an example; `make docs` also tests its files."""

import html
import html.parser
import importlib
import pathlib
import re
import urllib.parse

import pytest
from test_package import NAMES, is_public

ROOT = pathlib.Path(__file__).parent.parent
SITE = ROOT / "docs/_build/html"
LISTED = re.findall(r"^   ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)

built = pytest.mark.skipif(not SITE.exists(), reason="`make docs` builds the site")


def public():
    """{id of a public object: its names}, without modules."""
    found = {}
    for path in NAMES:
        module = importlib.import_module(path)
        for name, value in vars(module).items():
            if is_public(module, name, value) and not hasattr(value, "__path__"):
                found.setdefault(id(value), []).append(f"{path}.{name}")
    modules = {id(importlib.import_module(path)) for path in NAMES}
    return {key: names for key, names in found.items() if key not in modules}


def pages():
    """{path from the site's root: text} of all pages, without sphinx's own."""
    return {
        str(path.relative_to(SITE)): path.read_text()
        for path in SITE.rglob("*.html")
        if path.name not in ("genindex.html", "search.html", "py-modindex.html")
    }


class Targets(html.parser.HTMLParser):
    """The ids of a page, and what it links to and loads."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "a":
            self.links.append(attrs.get("href") or "#")
        elif tag == "link" and attrs.get("rel") != "stylesheet":
            self.links.append(attrs["href"])
        elif "src" in attrs or tag == "link":
            self.loaded.append(attrs.get("src") or attrs["href"])


def test_every_public_name_is_on_the_api_page():
    listed = {f"ivon_jax.{name}" for name in LISTED}
    assert len(listed) == len(LISTED)
    assert [names for names in public().values() if not listed & set(names)] == []
    assert listed <= {name for names in public().values() for name in names}


@pytest.mark.parametrize("name", LISTED)
def test_every_public_name_has_an_example(name):
    """In its docstring, or, of a class, in that of a method; pytest runs them."""
    value = importlib.import_module("ivon_jax")
    for part in name.split("."):
        value = getattr(value, part, None) or importlib.import_module("ivon_jax.flax")
    members = vars(value).values() if isinstance(value, type) else ()
    texts = [member.__doc__ or "" for member in (value, *members)]
    assert any(">>> " in text for text in texts)


@built
def test_every_public_name_has_a_page_with_an_example():
    for name in LISTED:
        text = html.unescape((SITE / f"api/ivon_jax.{name}.html").read_text())
        assert '<span class="gp">>>> </span>' in text, name


@built
def test_internal_links_lead_somewhere():
    found = {path: Targets(text) for path, text in pages().items()}
    for path, targets in found.items():
        for link in targets.links + targets.loaded:
            url = urllib.parse.urlsplit(link)
            if not url.scheme:
                file = (SITE / path).parent / urllib.parse.unquote(url.path)
                target = file.resolve() if url.path else SITE / path
                assert target.exists(), (path, link)
                other = str(target.relative_to(SITE.resolve()))
                if url.fragment and other in found:
                    assert url.fragment in found[other].ids, (path, link)


@built
def test_nothing_is_loaded_from_elsewhere():
    """The site works without a network."""
    for path, text in pages().items():
        loaded = Targets(text).loaded
        assert [x for x in loaded if re.match(r"(https?:)?//", x)] == [], path


@built
def test_formulas_are_mathml():
    text = "".join(pages().values())
    assert text.count("<math ") > 200
    assert "\\beta" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
