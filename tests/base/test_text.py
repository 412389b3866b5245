"""Names from outside are shown as they are, in Markdown as it is rendered in a report."""

import html
import re

import pytest
from nbconvert.filters import markdown2html

from fedutils.base.text import bullets, plain

NASTY = [
    "<img src=x onerror=alert(1)>.png", "<iframe src=//example.org></iframe>", "a&lt;b",
    "[x](javascript:alert(1))", "![x](http://example.org/x.png)", "a | b", "$x^2$ and $$y$$",
    "**bold** _it_ `code` ~~gone~~", "# no heading", "1) <b>", "back\\slash", "Site_A_1 (2.5 T)",
    "two\n\n# lines", "https://example.org", "&copy; AT&T", "1. one", "12) twelve", "- two", "===",
    "+ three", "(a) [b] (c)", r"\(x^2\)", "1-2", ".5", "2.5 T",
]  # fmt: skip


@pytest.mark.parametrize("before", ["mean of ", ""])
@pytest.mark.parametrize("text", NASTY)
def test_a_name_is_shown_as_it_is_and_nothing_in_it_lives(text, before):
    page = markdown2html(bullets([f"{before}{text} is 0.5"]))
    tags = set(re.findall(r"<\s*/?\s*([a-z0-9]+)", page))
    assert tags <= {"ul", "li", "p"}, page
    shown = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert " ".join(shown.split()) == " ".join(f"{before}{text} is 0.5".split())


def test_in_a_table_a_cell_stays_a_cell():
    page = markdown2html(f"| name | n |\n|---|---|\n| {plain('a | b <i>')} | 3 |\n")
    assert page.count("<td") == 2 and "<i>" not in page


def test_what_needs_no_escape_reads_as_before():
    text = "client-1: epsilon 2.30 at delta 1e-05 (31 of 180 patients)"
    assert plain(text) == text
