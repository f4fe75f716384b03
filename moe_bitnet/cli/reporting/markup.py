"""HTML that is escaped by construction: a plain ``str`` is text, only :class:`Markup` is markup.

Prompts, generated text and names out of result files are untrusted. They can reach the
page as children of :func:`element` or as attribute values, and both are escaped.
"""

import html

_VOID = frozenset({"br", "hr", "meta"})


class Markup(str):
    """A string that is HTML already; built by :func:`element` and from the package's own constants."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str) -> Markup:
    """Build ``<tag attributes>children</tag>``.

    Args:
        tag: the element's name.
        children: text (escaped) or :class:`Markup` (as it is).
        attributes: escaped; ``class_`` becomes ``class``, other underscores become hyphens.
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    opening = "".join(f' {names[name]}="{html.escape(value)}"' for name, value in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{opening}>")
    return Markup(f"<{tag}{opening}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """Concatenate text (escaped) and markup (as it is)."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def table(header: list[str], rows: list[list[str]], caption: str = "") -> Markup:
    """Build a table whose first column names the row and whose other columns are right-aligned."""
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    title = [element("caption", caption)] if caption else []
    content = element("table", *title, element("thead", head), element("tbody", *body))
    return element("div", content, class_="table")
