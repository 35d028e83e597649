"""The built site in a browser: errors, widths, formulas, search. `make docs` runs it.

It needs Debian's chromium and chromium-driver, and is skipped without them.
"""

import browser
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.SITE.exists(), reason="`make docs` builds the site"),
    pytest.mark.skipif(not browser.installed(), reason="There is no chromium."),
]
PAGES = sorted(browser.SITE.rglob("*.html"))


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as one:
        yield one


@pytest.mark.parametrize("width", browser.WIDTHS)
def test_pages_load_without_errors_and_fit_their_window(chromium, width):
    """Nothing scrolls sideways but tables, code and formulas in boxes of their own."""
    for page in PAGES:
        chromium.open(page.as_uri(), width)
        assert chromium.errors() == [], page
        assert chromium.ask("document.documentElement.scrollWidth") <= width, page


def test_formulas_are_drawn(chromium):
    """The equations of `ivon` have a size, and no TeX is left in the text."""
    chromium.open((browser.SITE / "api/ivon_jax.ivon.html").as_uri())
    sizes = "[...document.querySelectorAll('math')].map(x => x.getBoundingClientRect()"
    widths = chromium.ask(f"{sizes}.width)")
    assert len(widths) > 20
    assert min(widths) > 3
    assert "\\" not in chromium.ask("document.querySelector('dd').innerText")


def test_pictures_are_drawn(chromium):
    for page in PAGES:
        chromium.open(page.as_uri())
        pictures = "[...document.images]"
        waiting = f"Promise.all({pictures}.map(x => (x.loading = 'eager', x.decode())))"
        chromium.ask(f"{waiting}.then(() => true)")
        assert chromium.ask(f"{pictures}.every(x => x.naturalWidth > 0)"), page


def test_search_finds_ess(chromium):
    """The guide and the argument; results come one after the other."""
    chromium.open((browser.SITE / "search.html").as_uri() + "?q=ess")
    links = "[...document.querySelectorAll('#search-results li a')]"
    found = f"{links}.map(x => x.innerText)"
    wanted = "['Settings and tuning', 'ivon_jax.IVONState.ess']"
    assert chromium.ask(f"""new Promise(done => {{
        const look = () => {wanted}.every(x => {found}.includes(x))
            ? done(true) : setTimeout(look, 100);
        look();
    }})""")
