"""Text from anywhere as it is shown by code hosts: read back by a reader of tables."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnexp import markdown
from bnexp.printable import printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a|b", r"a\|b"),
        ("*bold*", r"\*bold\*"),
        ("<script>", r"\<script\>"),
        ("[x](y)", r"\[x\](y)"),
        ("a\x1b[31mred", r"a\\x1b\[31mred"),
        ("line\nbreak", r"line\\nbreak"),
        ("$x$", r"\$x\$"),
        ("ema-0.9", "ema-0.9"),
    ],
)
def test_what_has_a_meaning_loses_it(text, shown):
    assert markdown.escaped(text) == shown


@given(st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_a_row_holds_what_was_put_in_whatever_it_is(texts):
    head = [f"c{i}" for i in range(len(texts))]
    lines = markdown.table(head, [texts]).split("\n")
    assert len(lines) == 3 and all(line.isprintable() for line in lines)
    bare = re.sub(r"\\.", "", lines[2])
    assert bare.count("|") == len(texts) + 1  # as many cells as columns
    assert html.unescape(bare.replace("<br>", "")) == bare.replace("<br>", "")


@given(st.text(max_size=30))
def test_escapes_are_undone_by_taking_backslashes_away(text):
    undone = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown.escaped(text))
    assert undone == printable(text)


def test_tables_are_filled_up_and_cells_may_have_lines():
    assert markdown.table(["a", "b"], [["1\n2"], ["", "x"]]).split("\n") == [
        "| a | b |",
        "| :--- | ---: |",
        "| 1<br>2 |  |",
        "|  | x |",
    ]


@pytest.mark.parametrize("text", ["- a", "+ a", "= a", "1. a", "12) a", "# a", "> a"])
def test_a_paragraph_is_neither_a_list_nor_a_title(text):
    shown = markdown.paragraph(text)
    assert not re.match(r"[-+=#>]|\d+[.)]\s", shown)
    assert re.sub(r"\\(.)", r"\1", shown) == text
    assert markdown.paragraph("98.5 % are right.") == "98.5 % are right."
