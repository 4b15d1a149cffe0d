"""What the page draws: safe whatever a name is, said in words too, without a byte of inline style."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2", reason="the extra `web` is not installed")
from jinja2 import UndefinedError
from markupsafe import Markup

import bgjob.ext.web
from bgjob.ext.web.drawing import bar, chart, sparkline
from bgjob.ext.web.rendering import environment

FOLDER = Path(bgjob.ext.web.__file__).parent
TEMPLATES = sorted((FOLDER / "templates").glob("*.html"))
HOSTILE = "\"><svg onload=alert(1)>'&\u202e\0"
NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)

DRAWINGS = {
    "sparkline": sparkline([0, 3, 1], name=HOSTILE, each="a minute"),
    "bar": bar(3, 4, name=HOSTILE),
    "chart": chart([[1, 5], [0, 2], [0, 1]], name=HOSTILE, since=NOON, seconds=60),
    "of nothing": chart([[], [], []], name=HOSTILE, since=NOON, seconds=3600),
    "of no minutes": sparkline([], name=HOSTILE, each="a minute"),
    "of no slots": bar(0, 0, name=HOSTILE),
    "of too many": bar(9, 4, name=HOSTILE),
}


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=list(DRAWINGS))
def test_a_drawing_is_an_image_with_a_label_and_attributes_only(drawing: Markup) -> None:
    image = ElementTree.fromstring(drawing)  # well-formed, so that nothing broke out
    assert image.get("role") == "img"
    assert (image.get("aria-label") or "").startswith("\"><svg onload=alert(1)>'&\\u202e\\x00")
    width, height = float(image.get("width", "")), float(image.get("height", ""))
    for part in image.iter():
        assert not {"style", "onload"} & set(part.attrib)
        assert part.tag in {"svg", "path", "rect", "text"}
        assert 0 <= float(part.get("width", 0)) <= width
        for x, y in re.findall(r"M([\d.]+) ([\d.]+)", part.get("d", "")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height


def test_the_label_of_a_drawing_says_what_it_shows() -> None:
    def label(drawing: Markup) -> str | None:
        return ElementTree.fromstring(drawing).get("aria-label")

    assert label(sparkline([0, 3000, 1], name="mail", each="a minute")) == (
        "mail: 3,001, at most 3,000 a minute"
    )
    assert label(bar(3, 4, name="mail")) == "mail: 3 of 4 slots are busy"
    assert label(chart([[1, 5], [0, 2], [0, 1]], name="mail", since=NOON, seconds=300)) == (
        "mail, 2026-11-29 12:00 to 2026-11-29 12:10 UTC: 6 completed, 2 retried, 1 dead, "
        "at most 8 in 5 min"
    )


def test_one_job_among_thousands_can_be_seen() -> None:
    [_, path] = ElementTree.fromstring(sparkline([1, 100_000], name="q", each="a minute"))
    assert path.get("d", "").startswith("M0 24V23h")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.9, "59 s"),
        (-5, "5 s"),
        (60, "1 min"),
        (422, "7 min 2 s"),
        (600, "10 min"),
        (659, "10 min"),
        (11_580, "3 h 13 min"),
        (3600, "1 h"),
        (90_000, "1 d 1 h"),
    ],
)
def test_an_age_has_two_units_and_seconds_only_while_they_matter(seconds: float, text: str) -> None:
    assert render("{{ at|since(now) }}", at=NOON - timedelta(seconds=seconds), now=NOON) == text


def render(text: str, **values: Any) -> str:
    return environment().from_string(text).render(**values)


def test_every_value_is_escaped_and_a_missing_one_is_an_error() -> None:
    assert render("{{ name }}", name="<b>\u202e\0\n\t") == "&lt;b&gt;\\u202e\\x00\n\t"
    assert render("{{ name|line }}", name="<b>\n") == "&lt;b&gt;\\n"
    assert render("{{ name|line(5) }}", name="abcdefgh") == "abcd…"
    with pytest.raises(UndefinedError):
        render("{{ name }}")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_escapes_everything_and_has_no_inline_code(template: Path) -> None:
    text = template.read_text("utf-8")
    environment().get_template(template.name)
    assert not re.search(r"\|\s*safe|autoescape|\bstyle=|\son\w+=|javascript:|<style", text)
    assert set(re.findall(r"<script\b[^>]*>", text)) <= {
        '<script src="{{ page.static }}/app.js" defer>'
    }


def test_both_colour_schemes_set_the_same_nine_colours() -> None:
    css = (FOLDER / "static" / "app.css").read_text("utf-8")
    light, dark = [
        re.findall(r"(--\w+): #\w{6};", block)
        for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    assert light == dark
    assert len(light) == 9
    assert set(re.findall(r"var\((--\w+)\)", css)) == set(light)
