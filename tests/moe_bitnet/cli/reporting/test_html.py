import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_bitnet.cli.reporting import Results, load_results
from moe_bitnet.cli.reporting.html import render_html
from moe_bitnet.cli.reporting.markup import Markup, element, join
from moe_bitnet.cli.reporting.summary import STEPS, step_command

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>--!><!-- $x^ &amp;"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(run_folder: Path) -> str:
    return render_html(load_results(run_folder))


def attack_every_string(value: object) -> object:
    if isinstance(value, dict):
        return {key: attack_every_string(item) for key, item in value.items()}
    if isinstance(value, list):
        return [attack_every_string(item) for item in value]
    return ATTACK + value if isinstance(value, str) and value not in ("fp16", "float16 twin") else value


def test_prompt_and_text_are_shown_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(&#x27;prompt&#x27;)" in page
    assert "<script" not in page
    parsed = Page(page)
    assert "The harbour was quiet <script>alert('prompt')</script> & the" in parsed.text
    assert "<img src=x onerror=alert(1)> one by one.\nThe tide" in parsed.text


def test_no_string_of_any_file_becomes_markup(run_folder: Path, page: str) -> None:
    clean = Page(page)
    for path in run_folder.rglob("*.json"):
        path.write_text(json.dumps(attack_every_string(json.loads(path.read_text()))))
    attacked = Page(render_html(load_results(run_folder)))
    assert set(attacked.tags) == set(clean.tags)
    assert not {"script", "img", "iframe", "link", "object"} & set(attacked.tags)
    assert not [name for name, _ in attacked.attributes if name.startswith("on")]


def test_page_refers_to_nothing_outside_itself(page: str) -> None:
    assert "http:" not in page
    assert "https:" not in page
    for name, value in Page(page).attributes:
        if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
            assert value is not None
            assert value.startswith(("#", "data:")), (name, value)
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = [value for name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]*)\)", page) + re.findall(r'href="#([^"]*)"', page)
    assert references
    assert set(references) <= set(ids)


def test_drawings_take_their_colours_from_the_theme(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 6
    assert "#fe01" not in page
    assert all("var(--muted)" in drawing and 'role="img"' in drawing for drawing in drawings)
    assert "prefers-color-scheme: dark" in page


def test_zero_bytes_between_devices_are_drawn_as_0(page: str) -> None:
    drawing = next(svg for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if "ternary, spread" in svg)
    assert re.search(r">0</text>", drawing)


def test_every_figure_says_what_it_counts(page: str) -> None:
    assert page.count("What this number counts.") == 6
    assert page.count('class="reading"') == 7  # six figures and the text


@pytest.mark.parametrize("name", [name for name, _, _ in STEPS])
def test_a_missing_section_names_its_command_and_the_rest_stays(run_folder: Path, name: str) -> None:
    results = load_results(run_folder)
    page = render_html(Results(**{**vars(results), name: None}))
    Page(page)
    assert step_command(name) in page
    assert sum(step_command(other) in page for other, _, _ in STEPS) == 1


def test_an_empty_run_explains_every_section(tmp_path: Path) -> None:
    page = render_html(load_results(tmp_path))
    Page(page)
    assert all(step_command(name) in page for name, _, _ in STEPS)
    assert "<svg" not in page


def test_unfinished_training_is_explained_and_drawn(run_folder: Path) -> None:
    (run_folder / "ternary" / "summary.json").unlink()
    page = render_html(load_results(run_folder))
    Page(page)
    assert "The ternary model has not finished training." in page
    assert step_command("ternary") in page
    assert page.count("<svg") == 6


def test_plain_text_is_escaped_and_markup_is_not() -> None:
    assert element("p", "a < b", Markup("<b>c</b>"), title='"x"') == '<p title="&quot;x&quot;">a &lt; b<b>c</b></p>'
    assert join("&", Markup("&amp;")) == "&amp;&amp;"
    assert element("p", Markup("<b>") + "<i>") == "<p>&lt;b&gt;&lt;i&gt;</p>"  # a sum is plain text again
