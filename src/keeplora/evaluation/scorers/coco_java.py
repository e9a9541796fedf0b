"""The two parts of the COCO caption evaluation that run on Java: the Penn Treebank tokeniser and METEOR 1.5.

Their jars come with ``pycocoevalcap`` (the extra ``keeplora[captions]``, about 100 MB). They are driven here rather than
through its Python wrappers, which write into their own folder, assume the platform's encoding and hang where Java dies.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

#: Tokens that the COCO evaluation drops after tokenising.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
TOKENISER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"


class Unavailable(Exception):
    """Java, the jars or a run of them is not to be had; the message is the reason, without a full stop."""


def find_java() -> str | None:
    """The Java program: the one of JAVA_HOME, else the first on PATH."""
    home = os.environ.get("JAVA_HOME")
    return (shutil.which("java", path=str(Path(home) / "bin")) if home else None) or shutil.which("java")


def _folder() -> Path | None:
    spec = find_spec("pycocoevalcap")
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return next((place for place in places if (place / METEOR_JAR).is_file()), None)


def requirements() -> tuple[str, Path]:
    """(the Java program, the folder of the jars).

    Raises:
        Unavailable: what is lacking and how to get it.
    """
    folder, java = _folder(), find_java()
    if folder is None:
        raise Unavailable("its Java parts are not installed (pip install 'keeplora[captions]')")
    if java is None:
        raise Unavailable("there is no `java` on the PATH (install a Java runtime, version 8 or later)")
    return java, folder


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def treebank_tokens(sentences: Sequence[str]) -> list[list[str]]:
    """Lowercased Penn Treebank tokens without punctuation, as the COCO evaluation takes them.

    Raises:
        Unavailable: see `requirements`; or Java failed, with its last line.
    """
    java, folder = requirements()
    command = [
        java, "-cp", str(folder / TOKENISER_JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
        "-lowerCase", "-encoding", "utf-8",
    ]  # fmt: skip
    # Whatever Java would take for the end of a line becomes a space. The last line keeps the count where it is empty.
    text = "\n".join([*(" ".join(sentence.split()) for sentence in sentences), "end"])
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    lines = done.stdout.decode("utf-8", "replace").split("\n")
    if done.returncode or len(lines) < len(sentences) + 1:
        raise Unavailable(f"Java's tokeniser failed (exit status {done.returncode}{_last_line(done.stderr)})")
    return [[word for word in line.split() if word not in PUNCTUATION] for line in lines[: len(sentences)]]


def meteor(
    candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> tuple[float, list[float]]:
    """METEOR 1.5 (Denkowski and Lavie 2014) of the set and per item, fractions; English, as in the COCO evaluation.

    Raises:
        Unavailable: see `requirements`; or Java failed, with its last line.
    """
    java, folder = requirements()
    command = [java, "-jar", "-Xmx2G", str(folder / METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]

    def sentence(tokens: Sequence[str]) -> str:
        return " ".join(tokens).replace("|||", "")

    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command, cwd=folder / "meteor", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            statistics = []
            for candidate, accepted in zip(candidates, references, strict=True):
                parts = ["SCORE", *map(sentence, accepted), sentence(candidate)]
                process.stdin.write((" ||| ".join(parts) + "\n").encode())
                process.stdin.flush()
                statistics.append(process.stdout.readline().decode().strip())
            process.stdin.write((" ||| ".join(["EVAL", *statistics]) + "\n").encode())
            process.stdin.flush()
            scores = [float(process.stdout.readline()) for _ in range(len(statistics) + 1)]
        except (OSError, ValueError) as error:
            process.kill()
            process.wait()
            complaints.seek(0)
            raise Unavailable(f"Java's METEOR failed{_last_line(complaints.read())}") from error
        finally:
            process.kill()
            process.wait()
            with suppress(OSError):  # what is still unsent goes to a process that has ended
                process.stdin.close()
            process.stdout.close()
    return scores[-1], scores[:-1]
