"""HTML from data: everything that comes from a file is escaped here, in one place."""

from __future__ import annotations

import dataclasses
import html
import pathlib
from collections.abc import Iterable, Mapping, Sequence

_STYLE = pathlib.Path(__file__).with_name("style.css")


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table's cell. ``note`` stands below in small; ``best`` sets it off."""

    text: str
    note: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with what stands below it; ``anchor`` is unique in the page."""

    anchor: str
    title: str
    body: Markup


def escaped(text: object) -> Markup:
    """HTML that shows ``text``; a percent sign stays with its number."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(str(text)).replace(" %", "&nbsp;%"))


def joined(parts: Iterable[object]) -> Markup:
    """One after the other, each escaped unless it is Markup."""
    return Markup("\n".join(escaped(part) for part in parts))


def element(tag: str, *content: object, **attributes: str) -> Markup:
    """``<tag attribute="...">content</tag>``; a trailing underscore of an attribute is dropped."""
    told = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
    )
    return Markup(f"<{tag}{told}>{joined(content)}</{tag}>")


def paragraph(text: object) -> Markup:
    return element("p", text)


def bullets(items: Iterable[object]) -> Markup:
    return element("ul", *(element("li", item) for item in items))


def definitions(facts: Mapping[str, object]) -> Markup:
    """Names with their values."""
    return element(
        "dl",
        *(joined((element("dt", name), element("dd", value))) for name, value in facts.items()),
    )


def table(
    caption: str,
    headers: Sequence[Cell | str],
    rows: Iterable[Sequence[Cell | str]],
    *,
    left: Sequence[int] = (0,),
    wrapped: Sequence[int] = (),
) -> Markup:
    """A table that scrolls sideways on a narrow screen, reachable by keyboard.

    Args:
        left: columns of text, flush left; the others are numbers, flush right. The first column
            heads its row.
        wrapped: columns whose text may break over lines.
    """

    def kind(column: int, cell: Cell) -> dict[str, str]:
        names = ["text"] * (column in left) + ["wrap"] * (column in wrapped) + ["best"] * cell.best
        return {"class_": " ".join(names)} if names else {}

    def shown(tag: str, column: int, value: Cell | str, **scope: str) -> Markup:
        cell = value if isinstance(value, Cell) else Cell(value)
        note = element("small", cell.note) if cell.note else Markup("")
        return element(tag, cell.text, note, **scope, **kind(column, cell))

    def row(cells: Sequence[Cell | str]) -> Markup:
        first = shown("th", 0, cells[0], scope="row")
        return element("tr", first, *(shown("td", *one) for one in enumerate(cells[1:], 1)))

    head = element("tr", *(shown("th", *one, scope="col") for one in enumerate(headers)))
    content = element(
        "table", element("thead", head), element("tbody", *map(row, rows)), aria_label=caption
    )
    # the caption stays in place while a wide table scrolls under it
    scrolled = element(
        "div", content, class_="scroll", tabindex="0", role="region", aria_label=caption
    )
    return joined((element("p", caption, class_="caption"), scrolled))


def charts(svgs: Iterable[str]) -> Markup:
    """Charts side by side where there is room."""
    return element("div", *(element("figure", Markup(svg)) for svg in svgs), class_="charts")


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole document: its style inside, no script, nothing fetched from anywhere."""
    links = (
        element("li", element("a", section.title, href=f"#{section.anchor}"))
        for section in sections
    )
    body = joined(
        (
            element("header", element("h1", title), element("p", lead, class_="lead")),
            element("nav", element("ul", *links), aria_label="Contents"),
            element(
                "main",
                *(
                    element("section", element("h2", one.title), one.body, id=one.anchor)
                    for one in sections
                ),
            ),
        )
    )
    # A page that may load nothing shows at once if something ever tries to.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>\n{_STYLE.read_text()}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
