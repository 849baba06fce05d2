"""Cards of the tutorials, made when the docs are built: title, first sentence and picture come from the notebooks.

A page says which notebooks it shows, and in which order::

    ```{gallery}
    quickstart
    settings
    ```

Every notebook has to be in one of the galleries. Its first cell is Markdown, a title and a paragraph; the cell whose picture it is
known by is tagged "thumbnail".
"""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

SIZE = (540, 360)
GALLERY = re.compile(r"^```\{gallery\}\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
SENTENCE = re.compile(r".+?[.?!](?=\s+[A-Z*`(]|$)")


class Card(NamedTuple):
    """What the gallery shows of a notebook."""

    title: str
    description: str
    png: bytes


def read_card(path: Path) -> Card:
    """Read the card of a notebook.

    Raises
    ------
    ValueError
        It has no title, no description or no picture.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = "".join(cells[0]["source"]) if cells and cells[0]["cell_type"] == "markdown" else ""
    # A card is a link as a whole, and can hold no other.
    head, *below = LINK.sub(r"\1", first).strip().split("\n", maxsplit=1)
    if not head.startswith("# "):
        raise ValueError(f"{path}: the first cell has to be Markdown and start with a title, '# ...'.")
    paragraph = re.split(r"\n\s*\n", below[0].strip())[0] if below else ""
    sentence = SENTENCE.match(" ".join(paragraph.split()))
    if sentence is None:
        raise ValueError(f"{path}: below its title, the first cell needs a sentence that can stand on a card.")
    return Card(head.removeprefix("# ").strip(), sentence[0], _picture(path, cells))


def _picture(path: Path, cells: list[dict[str, Any]]) -> bytes:
    tagged = [cell for cell in cells if "thumbnail" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{path}: {len(tagged)} cells are tagged 'thumbnail'; expected one, whose picture is shown.")
    pictures = [out["data"]["image/png"] for out in tagged[0].get("outputs", []) if "image/png" in out.get("data", {})]
    if not pictures:
        raise ValueError(f"{path}: the cell tagged 'thumbnail' has no picture. Run the notebook and store its outputs.")
    return base64.b64decode("".join(pictures[-1]))


def write_thumbnail(png: bytes, path: Path) -> None:
    """Fit a picture on a white ground of one size, so that cards are alike and the page is light."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(png)) as picture:
        opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
    padded = ImageOps.pad(opaque, SIZE, method=Image.Resampling.LANCZOS, color="white")
    padded.quantize(256).save(path, optimize=True)


def expand(text: str, notebooks: Path, thumbnails: Path) -> str:
    """Replace the galleries of a page by cards and entries of the table of contents, and write their pictures.

    Raises
    ------
    ValueError
        A notebook is named that is not there, or one is there that is not named.
    """
    found = {path.stem for path in notebooks.glob("*.ipynb")}
    named = [name for gallery in GALLERY.findall(text) for name in gallery.split()]
    if wrong := sorted({name for name in named if name not in found or named.count(name) > 1}):
        raise ValueError(f"The galleries name {', '.join(wrong)} twice, or without a notebook in {notebooks}.")
    if missing := sorted(found.difference(named)):
        raise ValueError(f"{notebooks} has {', '.join(missing)}, which no gallery names. Add it to docs/tutorials.md.")
    thumbnails.mkdir(parents=True, exist_ok=True)

    def shown(gallery: re.Match[str]) -> str:
        names = gallery[1].split()
        cards = "\n".join(_card(name, read_card(notebooks / f"{name}.ipynb"), thumbnails) for name in names)
        entries = "\n".join(f"tutorials/{name}" for name in names)
        return f"::::{{grid}} 1 1 2 2\n:gutter: 3\n\n{cards}\n::::\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```"

    return GALLERY.sub(shown, text)


def _card(name: str, card: Card, thumbnails: Path) -> str:
    picture = thumbnails / f"{name}.png"
    write_thumbnail(card.png, picture)
    return f"""\
:::{{grid-item-card}} {card.title}
:link: tutorials/{name}
:link-type: doc
:img-top: tutorials/{thumbnails.name}/{name}.png
:img-alt: A figure of this tutorial
:class-card: gallery-card

{card.description}
:::
"""


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""

    def read(app: Any, docname: str, source: list[str]) -> None:
        if not GALLERY.search(source[0]):
            return
        notebooks = Path(app.srcdir, "tutorials")
        for path in notebooks.glob("*.ipynb"):
            app.env.note_dependency(str(path), docname=docname)
        source[0] = expand(source[0], notebooks, notebooks / "thumbnails")

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
