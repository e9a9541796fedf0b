"""The demo pack's ATTRIBUTION.md, written from the sources' own records."""

from __future__ import annotations

from pack_sources import SOURCES
from pack_tasks import CLIPART, SCRIPTS

USED_IN = {
    "mnist": "digits",
    "noto": "scripts, hieroglyphs",
    "signs": "road-signs",
    "tabler": "line-icons",
    "emoji-google": "emoji (probe)",
    "emoji-twitter": "emoji (probe)",
    "openclipart": "clip-art (probe), reference",
}

MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice and
this permission notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED
"AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS
BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""


def attribution() -> str:
    """The whole file as Markdown."""
    parts = [
        "# Where the demo pack's pictures come from\n",
        "The pictures in this folder's parquet files were made by `scripts/build_demo_pack.py` from the packages below; the",
        "columns `origin` and `licence` name the package and the licence of every single picture. keeplora itself is under",
        "Apache-2.0; these pictures stay under their own licences.\n",
    ]
    for source in SOURCES.values():
        parts += [
            f"## {source.package} {source.version} ({source.registry})\n",
            f"- used in: {USED_IN[source.key]}",
            f"- licence: {source.licence}",
            f"- copyright: {source.holder}",
            f"- taken: {source.taken}",
            f"- changed: {source.changes}\n",
        ]
    parts += [
        "## Notes\n",
        f"Scripts drawn: {', '.join(SCRIPTS)}; hieroglyphs are grouped by Gardiner's categories. The SIL Open Font License",
        "covers the fonts, not documents made with them.\n",
        "reference.parquet was made by `scripts/build_reference_pack.py` from openclipart items of all categories that are not",
        "reserved for the probes; its titles are those of the drawings (package openclipart-svg of the same version).\n",
        f"Clip-art categories: {', '.join(sorted(CLIPART))}.\n",
        "Twemoji graphics are licensed under CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/); Noto Emoji under",
        "Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0). Logos and signs remain their owners' where they are marks.\n",
        "## The MIT licence, for the packages under it\n",
        MIT,
    ]
    return "\n".join(parts) + "\n"
