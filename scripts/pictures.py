#!/usr/bin/env python3
"""Makes web pages of the golden summaries as GitHub would, and small pictures of what Chromium took of them.

usage: pictures.py pages SCRATCH          SCRATCH/NAME-light.html and NAME-dark.html of every golden summary
       pictures.py finish SCRATCH KEPT    SCRATCH/*.png, cut and with few colours, into KEPT
       pictures.py compare SCRATCH KEPT   ends with 1 where SCRATCH/*.png looks unlike its picture in KEPT

scripts/pictures.sh runs it, and has what it works with installed.
"""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import cmarkgfm
import nh3
from cmarkgfm.cmark import Options
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "target/tools"
GOLDEN = ROOT / "tests/fixtures/summaries"
# What github.com lets through of HTML in Markdown: no style, no script, no class, no id of the author's own.
TAGS = set(
    "a abbr b bdo blockquote br caption cite code dd del details dfn div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 "
    "hr i img ins kbd li mark ol p picture pre q rp rt ruby s samp small source span strike strong sub summary sup "
    "table tbody td tfoot th thead time tr tt ul var wbr".split()
)
ATTRIBUTES = {
    "*": {"align", "alt", "colspan", "dir", "height", "lang", "open", "rowspan", "start", "title", "valign", "width"},
    "a": {"href"},
    "img": {"src"},
    "source": {"media", "srcset"},
}
# Around the text, in pixels of the picture.
PADDING = 48
COLOURS = 256
# Another build of Chromium may smooth a letter otherwise. A line of text that is missing is a hundredth and more.
UNLIKE = 0.002

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><style>{css}</style>
<style>html, body {{ margin: 0 }} .markdown-body {{ padding: 24px; min-height: 100vh; box-sizing: border-box }}</style>
</head><body><article class="markdown-body">{html}</article>{drawing}</body></html>
"""
DRAWING = """<script>{mermaid}</script>
<script>mermaid.initialize({{ startOnLoad: true, theme: "{theme}" }})</script>
"""


class StartTags(HTMLParser):
    """Every tag that begins, with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, sorted((name, value or "") for name, value in attrs)))


def as_on_github(name, markdown):
    """The HTML of a summary. Ends with 1 if the sanitiser takes anything out: then the page lacks what was written."""
    options = Options.CMARK_OPT_GITHUB_PRE_LANG | Options.CMARK_OPT_UNSAFE
    html = cmarkgfm.github_flavored_markdown_to_html(markdown, options)
    clean = nh3.clean(html, tags=TAGS, attributes=ATTRIBUTES, link_rel=None)
    before, after = StartTags(html).found, StartTags(clean).found
    if before != after:
        lost = next((one for one, other in zip(before, after) if one != other), before[-1:])
        sys.exit(f"pictures: GitHub's sanitiser changes {name}: {lost}")
    return clean


def pages(scratch):
    styles = next(TOOLS.glob("github-markdown-css-*"))
    mermaid = next(TOOLS.glob("mermaid-*")) / "dist/mermaid.min.js"
    for golden in sorted(GOLDEN.glob("*.md")):
        html = as_on_github(golden.name, golden.read_text())
        html = re.sub(r'<pre lang="mermaid"><code>(.*?)</code></pre>', r'<pre class="mermaid">\1</pre>', html, flags=re.S)
        drawn = 'class="mermaid"' in html
        for colours, theme in ("light", "default"), ("dark", "dark"):
            css = (styles / f"github-markdown-{colours}.css").read_text()
            drawing = DRAWING.format(mermaid=mermaid.read_text(), theme=theme) if drawn else ""
            page = PAGE.format(css=css, html=html, drawing=drawing)
            (scratch / f"{golden.stem}-{colours}.html").write_text(page)


def cut(file):
    """A screenshot without the empty page below the text."""
    image = Image.open(file).convert("RGB")
    page = Image.new("RGB", image.size, image.getpixel((0, 0)))
    left, top, right, bottom = ImageChops.difference(image, page).getbbox()
    if bottom + PADDING > image.height:
        sys.exit(f"pictures: {file.name} is longer than the window of scripts/pictures.sh")
    return image.crop((0, 0, image.width, bottom + PADDING))


def finish(scratch, kept):
    for file in sorted(scratch.glob("*.png")):
        small = cut(file).quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(kept / file.name, optimize=True)


def compare(scratch, kept):
    made, there = ({file.name for file in folder.glob("*.png")} for folder in (scratch, kept))
    wrong = [f"{name} has no picture" for name in made - there] + [f"{name} has no summary" for name in there - made]
    for name in sorted(made & there):
        new, old = cut(scratch / name), Image.open(kept / name).convert("RGB")
        if new.size != old.size:
            wrong.append(f"{name} is {old.size}, and would be {new.size}")
            continue
        histogram = ImageChops.difference(new, old).convert("L").histogram()
        share = sum(histogram[64:]) / (new.width * new.height)
        print(f"{name}: {share:.3%} of the pixels differ")
        if share > UNLIKE:
            wrong.append(f"{name} looks otherwise: {share:.2%} of its pixels differ")
    if wrong:
        sys.exit("\n".join(f"pictures: {line}" for line in wrong))


if __name__ == "__main__":
    verbs = {"pages": pages, "finish": finish, "compare": compare}
    verbs[sys.argv[1]](*map(Path, sys.argv[2:]))
