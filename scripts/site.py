"""What MkDocs does differently for this repository: pages of docs/ link to files outside of it, which the site shows on
GitHub; anchors are those of GitHub, so that a link works in both; and the pages in docs/migration list themselves."""

import pathlib
import re

# `[words](../FILE#anchor)`; how many folders up depends on the page.
LINK = re.compile(r"\]\(((?:\.\./)+)([^)#\s]+)(#[^)\s]*)?\)")


def github_anchor(heading, _separator):
    """The anchor that GitHub gives to a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def on_config(config):
    config.mdx_configs.setdefault("toc", {})["slugify"] = github_anchor
    docs = pathlib.Path(config.docs_dir)
    migration = sorted(docs.glob("migration/*.md"))
    for section in config.nav:
        if "Migration" in section:
            section["Migration"] = [str(page.relative_to(docs)) for page in migration]
    config.nav = [section for section in config.nav if section != {"Migration": []}]
    return config


def on_page_markdown(markdown, page, config, files):
    docs = pathlib.Path(config.docs_dir)
    folder = (docs / page.file.src_uri).parent

    def outside(link):
        target = (folder / (link[1] + link[2])).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise SystemExit(f"{page.file.src_uri}: there is no {link[1]}{link[2]}")
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(docs.parent)}{link[3] or ''})"

    return LINK.sub(outside, markdown)
