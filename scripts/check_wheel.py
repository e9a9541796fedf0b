"""Build sdist and wheel, check what is inside, install the wheel into a fresh environment elsewhere, and try it there.

The wheel is built from the sdist, so what works from the wheel was in the sdist. The fresh environment holds the wheel
alone and borrows its dependencies from the one that runs this script: nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Beside the Python modules, the wheel holds these and nothing else.
DATA = (
    "keeplora/suites/*.yaml",
    "keeplora/suites/demo/*.parquet",
    "keeplora/suites/demo/ATTRIBUTION.md",
    "keeplora/suites/demo/provenance.json",
    "keeplora/models/head/head.safetensors",
    "keeplora/models/head/head.json",
    "keeplora/models/head/training_items.txt.gz",
    "keeplora/models/stand_in_files/*.json",
    "keeplora/models/stand_in_files/chat_template.jinja",
    "keeplora/models/stand_in_files/stand_in.safetensors",
    "keeplora/models/stand_in_video_files/*.json",
    "keeplora/models/stand_in_video_files/chat_template.jinja",
    "keeplora/models/stand_in_video_files/stand_in_video.safetensors",
    "keeplora/suites/video/*.parquet",
    "keeplora/suites/video/ATTRIBUTION.md",
    "keeplora/suites/video/provenance.json",
    "keeplora/suites/vqa/*.parquet",
    "keeplora/suites/vqa/ATTRIBUTION.md",
    "keeplora/suites/vqa/provenance.json",
    "keeplora/experiment/presets/*.yaml",
    "keeplora/report/templates/analysis.css",
    "keeplora/report/templates/analysis.html.j2",
    "keeplora/report/templates/answers.html.j2",
    "keeplora/report/templates/card.md.j2",
    "keeplora/report/templates/index.css",
    "keeplora/report/templates/index.html.j2",
    "keeplora/report/templates/index.js",
    "keeplora/report/templates/report.html.j2",
    "keeplora/report/templates/style.css",
    "keeplora/report/templates/study.html.j2",
    "keeplora/report/templates/study.css",
)
SDIST = (
    "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "constraints.txt", "Makefile",
    "mkdocs.yml", "docs/method.md", "examples/*.yaml", "studies/*.yaml", "scripts/check_wheel.py", "tests/*/test_*.py",
    "src/keeplora/__init__.py",
)  # fmt: skip
MAX_WHEEL_BYTES = 48_000_000

SMOKE = """
import importlib, pathlib, pkgutil, sys
import keeplora
home = pathlib.Path(keeplora.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"keeplora comes from {home}, not from the wheel"
names = [m.name for m in pkgutil.walk_packages(keeplora.__path__, "keeplora.") if m.name != "keeplora.__main__"]
for name in names:
    importlib.import_module(name)
from keeplora.data import load_task
from keeplora.data.video import Sampling
from keeplora.experiment.presets import preset_names, preset_values
from keeplora.models import assets
from keeplora.suites import load_suite, suite_folder, suite_names
for name in suite_names():
    suite = load_suite(name)
    assert suite["tasks"], name
    if suite.get("data") == "external":  # it brings no pictures
        continue
    references = [suite["reference"]] if suite.get("reference") else []
    for kind, specs in (("tasks", suite["tasks"]), ("probes", [*suite["probes"], *references])):
        for spec in specs:
            whole = {key: value for key, value in spec.items() if key != "split_classes"}  # the experiment's, not the data's
            task = load_task(whole, suite_folder(), probe=kind == "probes")
            assert len(task.test) > 0, spec
            if task.kind == "classification":
                picture = task.test.picture(0)
            elif task.test.has_videos:
                picture = task.test.clips(0, Sampling(frames=2))[0].frames[1]
            else:
                picture = task.test.pictures(0)[0]
            assert picture.mode == "RGB", spec
assert {"demo", "demo-long", "demo-small", "mtil", "x-tail"} <= set(suite_names())
assert all(preset_values(name)["training"] for name in preset_names()) and "mtil" in preset_names()
assert assets.HEAD.is_file()
print(f"{len(names)} modules, {len(suite_names())} suites, {len(preset_names())} presets")
"""


def fail(sentence: str) -> None:
    sys.exit(f"Error: {sentence}")


def run(*command: str, cwd: Path) -> str:
    # A checkout on the path would hide what the wheel lacks.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if result.returncode:
        fail(f"{' '.join(command)[:200]} ended with status {result.returncode}:\n{result.stdout[-4000:]}")
    return result.stdout


def build(target: Path) -> tuple[Path, Path]:
    for old in target.glob("keeplora-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT), cwd=ROOT)
    (sdist,), (wheel,) = target.glob("keeplora-*.tar.gz"), target.glob("keeplora-*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        licences = [name for name in archive.namelist() if ".dist-info/licenses/" in name]
    if missing := [pattern for pattern in DATA if not any(fnmatch(name, pattern) for name in names)]:
        fail(f"{wheel.name} lacks {', '.join(missing)}")
    odd = [n for n in names if not n.endswith((".py", "/py.typed")) and not any(fnmatch(n, p) for p in DATA)]
    if odd:
        fail(f"{wheel.name} holds files that nobody decided on: {', '.join(odd)}; see DATA in {Path(__file__).name}")
    tree = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src/keeplora").rglob("*.py")}
    if lost := tree - set(names):
        fail(f"{wheel.name} lacks the modules {', '.join(sorted(lost))}")
    if not any(name.endswith("LICENSE") for name in licences) or not any("ATTRIBUTION" in name for name in licences):
        fail(f"{wheel.name} lacks a licence file: it has {licences}")
    if wheel.stat().st_size > MAX_WHEEL_BYTES:
        fail(f"{wheel.name} has {wheel.stat().st_size:,} bytes, more than {MAX_WHEEL_BYTES:,}")
    with tarfile.open(sdist) as archive:
        inside = [member.name.partition("/")[2] for member in archive.getmembers()]
    if missing := [pattern for pattern in SDIST if not any(fnmatch(name, pattern) for name in inside)]:
        fail(f"{sdist.name} lacks {', '.join(missing)}")
    if stray := [n for n in inside if n.startswith(("runs/", ".venv/")) or "__pycache__" in n or n.endswith(".pyc")]:
        fail(f"{sdist.name} holds what belongs to a working copy: {', '.join(stray[:5])}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB; {sdist.name}: {len(inside)} files, "
          f"{sdist.stat().st_size / 1e6:.1f} MB")  # fmt: skip


def check_installed(wheel: Path, folder: Path) -> None:
    home = folder / "venv"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    binaries = home / ("Scripts" if os.name == "nt" else "bin")
    python = str(binaries / "python")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(wheel),
        cwd=folder,
    )
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A .pth file adds the other environment's packages, but none of its .pth files, and so not its editable keeplora.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    print(run(python, "-c", SMOKE, cwd=folder), end="")
    keeplora = str(binaries / "keeplora")
    said = run(keeplora, "--version", cwd=folder).strip()
    if said != wheel.name.split("-")[1]:
        fail(f"`keeplora --version` says {said!r} but the wheel is {wheel.name}")
    for command in (["suites"], ["methods"], ["--help"], ["run", "--help"]):
        run(keeplora, *command, cwd=folder)
    listed = run(keeplora, "suites", cwd=folder)
    if "demo-small" not in listed:
        fail(f"`keeplora suites` does not list demo-small:\n{listed}")


def main() -> None:
    sdist, wheel = build(ROOT / "dist")
    check_contents(sdist, wheel)
    with tempfile.TemporaryDirectory(prefix="keeplora-wheel-") as folder:
        check_installed(wheel, Path(folder))
    print("wheel and sdist are in order")


if __name__ == "__main__":
    main()
