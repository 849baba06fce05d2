"""The page in a real browser, opened from disk without a network."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

import sae
from sae.pl._style import activation_colors
from sae.report import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SETTINGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
HOSTILE = "<img src=x onerror=alert(1)>"
ENDS = "</script><script>alert(2)</script><!--"


@pytest.fixture(scope="module")
def browser():
    """A Chromium; `SAE_REQUIRE_CHROMIUM=1` makes it an error that there is none."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    missing = " and no ".join(
        name for name, found in (("Chromium", executable), ("playwright", sync_playwright)) if not found
    )
    if missing:
        (pytest.fail if os.environ.get("SAE_REQUIRE_CHROMIUM") else pytest.skip)(f"no {missing} to open the page with")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=list(SETTINGS))
        yield started
        started.close()


class Reader:
    """Opens pages, and notes what no page may do."""

    def __init__(self, browser):
        self.browser, self.contexts, self.wrong, self.requests = browser, [], [], []

    def open(self, path: Path, fragment: str = "", *, width: int = 1280, height: int = 800, **options):
        context = self.browser.new_context(viewport={"width": width, "height": height}, **options)
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: self.wrong.append(message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("body[data-ready]")
        return page


@pytest.fixture
def reader(browser) -> Iterator[Reader]:
    """Fails at the end of any test in which a page logs, raises, asks or reaches out."""
    made = Reader(browser)
    yield made
    for context in made.contexts:
        context.close()
    assert made.wrong == []
    assert [url for url in made.requests if not url.startswith("file:")] == []


@pytest.fixture(scope="module")
def mapped(_archived):
    adata = _archived.copy()
    sae.tl.feature_map(adata)
    return adata


@pytest.fixture(scope="module")
def written(mapped, tmp_path_factory) -> Path:
    return report(mapped, tmp_path_factory.mktemp("report") / "page.html")


@pytest.fixture
def page(reader, written):
    return reader.open(written)


def features(page) -> list[str]:
    """The features in the table, in its order."""
    return page.locator("#features tbody tr[id] td:first-child").all_inner_texts()


def cells(page, title: str) -> list[str]:
    """The texts of a column of the table."""
    titles = [re.sub(" [↑↓]$", "", text) for text in page.locator("#features thead th").all_inner_texts()]
    place = titles.index(title) + 1
    return page.locator(f"#features tbody tr[id] td:nth-child({place})").all_inner_texts()


def alive(adata) -> list[str]:
    table = sae.get.features(adata)
    return table.index[~table["dead"]].tolist()


def opened(page) -> str | None:
    """The feature whose card is open."""
    if not page.locator("#card").evaluate("card => card.open"):
        return None
    page.wait_for_selector("#content section")
    return page.locator("#title").inner_text().split()[0]


def colours(page, selector: str) -> np.ndarray:
    """The pixels of a canvas, height × width × 4."""
    content = page.locator(selector).evaluate("canvas => canvas.toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA")).astype(int)


def test_the_table(page, mapped):
    assert features(page) == alive(mapped)
    table = sae.get.features(mapped).loc[alive(mapped)]
    assert cells(page, "name") == table["name"].astype(str).tolist()
    assert cells(page, "cells") == [f"{n:,}" for n in table["n_cells"]]
    assert [float(text) for text in cells(page, "density")] == pytest.approx(table["density"].tolist(), rel=0.01)
    assert page.locator("#count").inner_text() == "23 of 24 features"


def test_dead_features_are_shown_when_asked_for(page, mapped):
    page.locator("#dead").check()
    assert features(page) == sae.get.features(mapped).index.tolist()


def test_search_finds_names_labels_genes_and_gene_sets(page, mapped):
    gene = sae.get.genes(mapped, "sae_7", direction="up", n=1)["gene"].iloc[0]
    for text, expected in (
        ("sae_1", [name for name in alive(mapped) if name.startswith("sae_1")]),
        ("dendritic", None),
        (gene.lower(), None),
        ("nothing is called so", []),
    ):
        page.locator("#search").fill(text)
        found = features(page)
        if expected is None:
            assert 0 < len(found) < 23
        else:
            assert found == expected
    page.locator("#search").fill(gene)
    assert "sae_7" in features(page)
    page.locator("button[type=reset]").click()
    page.wait_for_function("document.querySelector('#count').textContent.startsWith('23')")


def test_filters_combine(page, mapped):
    table = sae.get.features(mapped).loc[alive(mapped)]
    page.locator("#label").select_option(label="CD19+ B")
    chosen = table["bulk_labels_label"] == "CD19+ B"
    assert features(page) == table.index[chosen].tolist()
    page.locator("#stability").fill("0.6")
    chosen &= table["stability"] >= 0.6
    assert features(page) == table.index[chosen].tolist()
    page.locator("#least").fill("0.2")
    page.locator("#most").fill("0.43")
    chosen &= table["density"].between(0.2, 0.43)
    assert 0 < chosen.sum() and features(page) == table.index[chosen].tolist()


def test_filter_by_term_and_module(page, mapped):
    page.locator("#term").fill("dendritic")
    sets = sae.get.enrichment(mapped, direction="up", max_padj=0.05, max_fdr=0.05)
    having = set(sets["feature"][sets["gene_set"].str.contains("dendritic", case=False)])
    assert set(features(page)) == having & set(alive(mapped)) != set()
    page.locator("button[type=reset]").click()
    module = sae.get.features(mapped)["module"].dropna()
    page.locator("#module").select_option(label=module.iloc[0])
    page.wait_for_function(
        "n => document.querySelector('#count').textContent.startsWith(n + ' ')",
        arg=int((module == module.iloc[0]).sum()),
    )
    assert features(page) == module.index[module == module.iloc[0]].tolist()


def test_sort(page, mapped):
    table = sae.get.features(mapped).loc[alive(mapped)]
    heading = page.get_by_role("button", name="cells")
    heading.click()
    assert features(page) == table.sort_values("n_cells", ascending=False, kind="stable").index.tolist()
    assert page.locator("th[aria-sort=descending]").inner_text() == "cells ↓"
    page.keyboard.press("Enter")
    assert features(page) == table.sort_values("n_cells", kind="stable").index.tolist()
    page.locator("th button[data-key=name]").click()
    # "CD8" before "CD14".
    parts = {name: re.split(r"(\d+)", name.lower()) for name in table["name"]}
    natural = {name: [int(part) if part.isdigit() else part for part in found] for name, found in parts.items()}
    assert cells(page, "name") == sorted(table["name"], key=natural.get)


def test_what_is_not_known_is_last_either_way(page):
    for expected in ("ascending", "descending"):
        page.locator("th button[data-key=set_padj]").click()
        assert page.locator("th button[data-key=set_padj]").locator("..").get_attribute("aria-sort") == expected
        found = cells(page, "set padj")
        known = [float(text) for text in found if text != "–"]
        assert 0 < len(known) < len(found) and found[len(known) :] == ["–"] * (len(found) - len(known))
        assert known == sorted(known, reverse=expected == "descending")


def test_columns_can_be_chosen(page):
    page.locator("#chooser summary").click()
    page.get_by_label("bulk_labels_scope").check()
    assert set(cells(page, "bulk_labels_scope")) <= {"local", "regional", "global"}
    page.get_by_label("density", exact=True).uncheck()
    assert "density" not in page.locator("#features thead th").all_inner_texts()


def test_a_card(page, mapped):
    page.locator("#features td", has_text=re.compile("^sae_7$")).click()
    assert opened(page) == "sae_7" and page.url.endswith("#sae_7")
    genes = sae.get.genes(mapped, "sae_7", direction="up", n=15)
    shown = page.locator("section.genes", has_text="Genes up").locator("tbody tr")
    assert [row.split("\t")[0] for row in shown.all_inner_texts()] == genes["gene"].tolist()
    row = shown.first.locator("td").all_inner_texts()
    assert float(row[1]) == pytest.approx(genes["score"].iloc[0], rel=0.01)
    assert float(row[3]) == pytest.approx(genes["padj"].iloc[0], rel=0.06)
    for direction in ("up", "down"):
        sets = sae.get.enrichment(mapped, "sae_7", direction=direction, redundant=False, n=10)
        assert page.locator("section.sets", has_text=f"Gene sets {direction}").locator("tbody tr").count() == len(sets)
    labels = page.locator("section.labels").first.locator("tbody tr").first.inner_text()
    assert labels.startswith(sae.get.labels(mapped, "sae_7", groupby="bulk_labels", n=1)["label"].iloc[0])
    bars = page.locator("#content svg rect")
    counts = [int(re.search(r": ([\d,]+) cells", text).group(1)) for text in bars.locator("title").all_text_contents()]
    assert sum(counts) == sae.get.features(mapped).loc["sae_7", "n_cells"]
    assert page.locator("#title").evaluate("title => title === document.activeElement")


def test_the_cells_are_drawn_where_and_how_active_they_are(page, mapped):
    page.locator("#features td", has_text=re.compile("^sae_7$")).click()
    page.wait_for_selector("#content canvas")
    page.locator(".legend select").select_option("")
    a = sae.get.activations(mapped, "sae_7").X.toarray().ravel()
    umap = mapped.obsm["X_umap"]
    x, y = ((umap - umap.min(axis=0)) / np.ptp(umap, axis=0)).T
    pixels = colours(page, "#content canvas")
    size = len(pixels)
    # Of every cell that no more active one covers, the pixel in its middle.
    order = np.argsort(-a)
    places = np.column_stack([size - 10 - y * (size - 20), 10 + x * (size - 20)])
    seen = []
    for rank, cell in enumerate(order):
        above = places[order[:rank]]
        if len(above) == 0 or np.hypot(*(above - places[cell]).T).min() > 8:
            seen.append(cell)
    expected = np.array([activation_colors()(a[cell] / a.max()) for cell in seen])[:, :3] * 255
    found = np.array([pixels[tuple(places[cell].astype(int))][:3] for cell in seen])
    assert len(seen) > 40 and (a[seen] > 0).sum() > 10 and (a[seen] == 0).sum() > 10
    np.testing.assert_allclose(found, expected, atol=5)


def test_the_colours_are_those_of_the_figures():
    script = resources.files("sae.report").joinpath("page.js").read_text("utf-8")
    stops = re.search(r"LIGHT = \[(.*?)\]", script).group(1)
    expected = [mpl.colors.to_hex(color) for color in activation_colors()(np.linspace(0, 1, 6))]
    assert re.findall("#[0-9a-f]{6}", stops) == expected


def test_names_of_labels_are_written_over_the_cells(page):
    page.locator("#features tbody tr").first.click()
    page.wait_for_selector("#content canvas")
    pictures = []
    for name in ("bulk_labels", "phase", ""):
        page.locator(".legend select").select_option(name)
        pictures.append(colours(page, "#content canvas"))
    assert all((pictures[i] != pictures[i + 1]).any() for i in range(2))


def test_keys(page, mapped):
    names = alive(mapped)
    page.keyboard.press("/")
    assert page.locator("#search").evaluate("search => search === document.activeElement")
    page.keyboard.type("sae_1")
    page.keyboard.press("Enter")
    found = [name for name in names if name.startswith("sae_1")]
    for key in ("j", "ArrowDown", "ArrowDown", "k"):
        page.keyboard.press(key)
    active = page.locator("#features").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
    page.keyboard.press("Enter")
    assert opened(page) == found[2]
    page.keyboard.press("ArrowRight")
    assert opened(page) == found[3]
    page.keyboard.press("k")
    page.keyboard.press("ArrowLeft")
    assert opened(page) == found[1]
    page.keyboard.press("Escape")
    assert opened(page) is None and "#" not in page.url
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    assert opened(page) == found[2]


def test_focus_stays_in_the_card_and_goes_back_to_the_table(page, mapped):
    focused = "() => document.activeElement.id || document.activeElement.tagName"
    page.locator("#features tbody tr").nth(2).click()
    assert opened(page) == alive(mapped)[2]
    outside = "() => document.activeElement !== document.body && !document.querySelector('#card').contains(document.activeElement)"
    for _ in range(40):
        page.keyboard.press("Tab")
        assert not page.evaluate(outside)
    page.locator("section.similar a").first.click()
    page.wait_for_function(
        "name => !document.querySelector('#title').textContent.startsWith(name)", arg=alive(mapped)[2]
    )
    assert page.evaluate(focused) == "title"
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "features"
    page.keyboard.press("End")
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    assert opened(page) == alive(mapped)[-2]
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    assert opened(page) == alive(mapped)[-1] and page.evaluate(focused) == "title", "the button is off"
    page.locator("#previous").focus()
    page.keyboard.press("Enter")
    assert opened(page) == alive(mapped)[-2] and page.evaluate(focused) == "previous"


def test_rows_are_numbered_from_the_heading_on(page):
    assert page.locator("#features tr[aria-rowindex]").evaluate_all("all => all.map(row => row.ariaRowIndex)")[:3] == [
        "1",
        "2",
        "3",
    ]
    assert page.locator("#features").get_attribute("aria-rowcount") == "24"


def test_infinite_numbers(reader, _archived, tmp_path):
    adata = _archived.copy()
    genes = adata.uns["sae"]["genes"]
    genes.loc[genes.index[genes["feature"] == "sae_7"][:1], ["score", "log2fc"]] = np.inf, -np.inf
    page = reader.open(report(adata, tmp_path / "page.html"), "#sae_7")
    page.wait_for_selector("section.genes")
    row = page.locator("section.genes tbody tr").first.locator("td").all_inner_texts()
    assert row[1:3] == ["∞", "-∞"]


def test_every_control_is_reached_by_tab_and_seen(page):
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "() => [document.activeElement.id || document.activeElement.dataset.key, getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.add(name)
        assert name is None or outline == "solid"
    assert {"search", "label", "term", "module", "stability", "least", "most", "dead", "n_cells", "features"} <= reached
    named = "all => all.filter(one => !one.labels?.length && !one.ariaLabel).map(one => one.id)"
    assert page.locator("input, select, canvas, table").evaluate_all(named) == []


def test_previous_next_and_similar_features(page, mapped):
    names = alive(mapped)
    page.locator("#features tbody tr").first.click()
    assert opened(page) == names[0] and page.locator("#previous").is_disabled()
    page.locator("#next").click()
    assert opened(page) == names[1]
    link = page.locator("section.similar a").first
    expected = sae.get.neighbors(mapped, names[1], n=1)["neighbor"].iloc[0]
    assert link.inner_text() == expected
    link.click()
    page.wait_for_function("name => document.querySelector('#title').textContent.startsWith(name)", arg=expected)
    page.locator("#close").click()
    assert opened(page) is None


@pytest.mark.parametrize(("fragment", "expected"), [("#sae_12", "sae_12"), ("#sae_99", None), ("#%E0%A4%A", None)])
def test_an_address_opens_a_card(reader, written, fragment, expected):
    assert opened(reader.open(written, fragment)) == expected


def test_the_map_of_features(page, mapped):
    map = colours(page, "#map")
    assert len(np.unique(map.reshape(-1, 4), axis=0)) > 5
    table = sae.get.features(mapped).dropna(subset=["map_x"])
    x, y = (table[f"map_{axis}"] for axis in "xy")
    feature = table.index[5]
    across = 10 + (x[feature] - x.min()) / np.ptp(x) * (len(map) - 20)
    down = len(map) - 10 - (y[feature] - y.min()) / np.ptp(y) * (len(map) - 20)
    page.locator("#map").hover(position={"x": across, "y": down})
    assert page.locator("#under").inner_text().startswith(f"{feature}: {table['name'][feature]}")
    page.locator("#search").fill("sae_3")
    assert (colours(page, "#map") != map).any()
    page.locator("#map").click(position={"x": across, "y": down})
    assert opened(page) == feature


def test_dark(reader, written):
    light, dark = (reader.open(written, "#sae_7", color_scheme=scheme) for scheme in ("light", "dark"))
    for page in (light, dark):
        page.wait_for_selector("#content canvas")
    papers = [page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") for page in (light, dark)]
    assert papers == ["rgb(255, 255, 255)", "rgb(23, 23, 26)"]
    # Inactive cells are the grey that stands out less from either paper.
    for page, grey in ((light, 0xDF), (dark, 0x3F)):
        assert (colours(page, "#content canvas")[..., 0] == grey).sum() > 200


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (420, 800)])
def test_nothing_is_wider_than_the_window(reader, written, width, height):
    page = reader.open(written, "#sae_7", width=width, height=height)
    page.wait_for_selector("#content canvas")
    for element in (
        "document.documentElement",
        "document.querySelector('#card')",
        "document.querySelector('#content')",
    ):
        assert page.evaluate(f"{element}.scrollWidth - {element}.clientWidth") <= 1


def test_only_rows_in_sight_are_in_the_document(reader, make_adata, tmp_path):
    adata = make_adata(n=60)
    sae.tl.fit(adata, n_features=3_000, k=200, architecture="topk", steps=2, progress=False)
    sae.tl.encode(adata)
    page = reader.open(report(adata, tmp_path / "page.html"))
    assert page.locator("#mapped").count() == 0 and "no map of the cells" in page.locator("#notices").inner_text()
    page.locator("#dead").check()
    assert page.locator("#features tbody tr").count() < 100
    page.keyboard.press("End")
    assert features(page)[-1] == "sae_2999"
    page.keyboard.press("Enter")
    assert opened(page) == "sae_2999" and page.locator("#content canvas").count() == 0
    page.keyboard.press("Escape")
    page.locator("#scroll").evaluate("scroll => (scroll.scrollTop = 1000 * 28)")
    page.wait_for_selector("#features td:text-is('sae_1005')")


def test_text_of_the_data_is_text(reader, make_adata, tmp_path):
    adata = make_adata()
    adata.obs["<i>group</i>".replace("/", "")] = adata.obs["group"].cat.rename_categories({"a": HOSTILE, "b": ENDS})
    groupby = adata.obs.columns[-1]
    adata.var_names = [f"{ENDS}{i}" if i % 2 else f"{HOSTILE}{i}" for i in range(adata.n_vars)]
    adata.obsm["X_umap"] = adata.obsm["X_pca"][:, :2].copy()
    key = f"{HOSTILE}\"%20#?&'ü\\"
    sae.tl.fit(adata, n_features=8, steps=100, key_added=key, progress=False)
    sae.tl.encode(adata, key=key)
    sae.tl.rank_genes(adata, key=key, min_cells=3)
    net = {ENDS: adata.var_names[:10].tolist(), HOSTILE: adata.var_names[8:].tolist()}
    sae.tl.enrich(
        adata,
        net,
        key=key,
        collection="<b>sets",
        min_size=2,
        min_cells=3,
        n_null=0,
        max_padj=1,
        min_log2fc=0,
        progress=False,
    )
    sae.tl.score_labels(adata, groupby, key=key)
    sae.tl.feature_map(adata, key=key)
    page = reader.open(report(adata, tmp_path / "page.html", key=key))
    assert page.title() == f"Features of {key}"
    assert page.locator("h1").inner_text() == f"Features of {key}"
    page.keyboard.press("Enter")
    page.wait_for_selector("#content canvas")
    page.reload()
    page.wait_for_selector("#content canvas")
    assert page.locator("#title").inner_text().startswith(f"{key}_0")
    text = page.locator("#content").inner_text()
    assert all(hostile in text for hostile in (HOSTILE, f"{ENDS}1", groupby))
    page.locator(".legend select").select_option(groupby)
    page.keyboard.press("Escape")
    page.locator("#search").fill(HOSTILE.upper())
    assert len(features(page)) > 0 and features(page)[0] == f"{key}_0"
    assert page.locator("img, i:not(.legend i), b").count() == 0
    assert page.evaluate("document.scripts.length") == page.locator("script[id^=data-]").count() + 1


@pytest.mark.parametrize(
    ("part", "place", "message"),
    [("main", "#trouble", "The file cannot be read"), ("block0", "#content .trouble", "The card cannot be read")],
)
def test_a_cut_off_file_says_so(browser, written, tmp_path, part, place, message):
    text = written.read_text("utf-8")
    cut = tmp_path / "cut.html"
    cut.write_text(re.sub(f'(id="data-{part}">.{{400}})[^<]*', r"\1", text), encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    page.goto(cut.as_uri() + "#sae_7")
    page.wait_for_selector(f"{place}:visible", timeout=10_000)
    assert message in page.locator(place).inner_text()
    context.close()
