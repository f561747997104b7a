r"""Our data beside webdataset, megatron-energon, mosaicml-streaming, litdata and grain, each in its own best practice.

    benchmarks/data_environments.sh /tmp/envs                   # once: an environment for each library
    python benchmarks/data_libraries.py write --data data/zinc --environments /tmp/envs --work /tmp/libraries
    python benchmarks/data_libraries.py index same own tars resume flip world --environments /tmp/envs \
        --work /tmp/libraries
    python benchmarks/data_libraries.py table                   # Markdown of all rounds in the CSV

write   the first --sequences sequences of the training split in each library's own form; the same molecules as other
        people's tars (a `.txt` member each); --resume-samples of them repeated; a small set for `flip` and `world`
index   making the index of these tars (ours reads, checks and tokenizes every molecule; energon looks at the headers)
same    does each library deliver each sequence once?
own     one epoch in the library's order of training from its own form; ours also masked, expanded and packed
tars    one epoch of other people's tars, tokenized on the way by the same tokenizer everywhere
resume  from nothing open to the first batch after 90 % of --resume-samples
flip    one bit flipped in a stored sequence: what is delivered?
world   two ranks and four: are the global batches the same, and after a resume of two ranks' state by four?

Each pass is a new process on one core, the libraries taking turns in every round; imports are not timed. `same`
fills the page cache. Each call adds its rounds to the CSV (--out).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "data_readers")]

import numpy as np  # noqa: E402
from common import write_tars  # noqa: E402

from exlm_dist.data.opening import open_dataset  # noqa: E402
from exlm_dist.tokenizers import load_tokenizer  # noqa: E402

OURS = "ours"
LIBRARIES = (OURS, "webdataset", "energon", "mosaic", "litdata", "grain")
OF_TARS = (OURS, "webdataset", "energon")
WITH_INDEX = (OURS, "energon")
VARIANTS = {OURS: ("windows", "full", "packed")}
PARTS = ("write", "index", "same", "own", "tars", "resume", "flip", "world", "table")
TARS, BATCH, SMALL, GLOBAL = 8, 256, 8192, 64
COLUMNS = (
    "part",
    "library",
    "variant",
    "seconds",
    "processor",
    "samples",
    "answer",
    "versions",
    "cpu",
    "commit",
    "date",
)


class Failed(Exception):
    """A reader ended with an error."""


class Readers:
    """The programs in `data_readers/`, each run by the Python of its own environment."""

    def __init__(self, environments: Path | None):
        self._environments = environments

    def command(self, library: str, task: str, how: dict[str, Any]) -> list[str]:
        python = sys.executable
        if library != OURS:
            if self._environments is None:
                raise SystemExit(
                    "--environments is missing: the folder that benchmarks/data_environments.sh has filled"
                )
            python = str(self._environments / library / "bin" / "python")
        return [python, str(ROOT / "benchmarks" / "data_readers" / f"read_{library}.py"), task, json.dumps(how)]

    def ask(self, library: str, task: str, **how: Any) -> dict[str, Any]:
        """One task of one library, alone."""
        return self.ask_ranks(library, task, 1, **how)[0]

    def ask_ranks(self, library: str, task: str, world: int, **how: Any) -> list[dict[str, Any]]:
        """The same task on all ranks of a node at once. Failed with the last line of what went wrong."""
        processes = []
        for rank in range(world):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 20_000 + os.getpid() % 20_000}
            environment = os.environ | {name: str(value) for name, value in (ranks | places).items()}
            environment.pop("PYTHONPATH", None)
            command = self.command(library, task, {**how, "rank": rank, "world": world})
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        answers = []
        try:
            for process in processes:
                output, errors = process.communicate(timeout=900)
                if process.returncode:
                    raise Failed((errors.strip() or output.strip() or "no word").splitlines()[-1][:300])
                answers.append(json.loads(output.strip().splitlines()[-1]))
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return answers


def own_folder(work: Path, library: str, size: str = "all") -> Path:
    return work / size / library


def tar_folder(work: Path, library: str) -> Path:
    """Energon writes beside the tars, so it has its own names of them."""
    return work / ("tars-energon" if library == "energon" else "tars")


def read_folder(work: Path, library: str) -> Path:
    """What a library opens to read other people's tars."""
    return work / "tars-index" if library == OURS else tar_folder(work, library)


def write(readers: Readers, args: argparse.Namespace) -> None:
    """Everything that the other parts read."""
    args.work.mkdir(parents=True, exist_ok=True)
    dataset = open_dataset(args.data, "train")
    count = min(args.sequences, len(dataset))
    tokens, lengths = dataset.read(np.arange(count))
    sequences = [ids.astype(np.uint16) for ids in np.split(tokens, np.cumsum(lengths)[:-1])]
    repeated = list(itertools.islice(itertools.cycle(sequences), args.resume_samples))
    for size, chosen in (("all", sequences), ("small", sequences[:SMALL]), ("resume", repeated)):
        source = args.work / f"{size}.npz"
        np.savez(source, tokens=np.concatenate(chosen), lengths=np.array([len(ids) for ids in chosen]))
        for library in args.libraries:
            shutil.rmtree(own_folder(args.work, library, size), ignore_errors=True)
            answer = readers.ask(library, "write", source=str(source), folder=str(own_folder(args.work, library, size)))
            print(f"{size:8} {library:12} {len(chosen):9,} sequences in {answer['seconds']:6.1f} s", flush=True)
    for library in args.libraries:
        readers.ask(library, "advance", **resumed(args, library))
    shutil.copytree(args.data / "tokenizer", args.work / "tokenizer", dirs_exist_ok=True)
    decode = load_tokenizer(args.data / "tokenizer").decode
    if not (args.work / "tars").exists():
        write_foreign(args.work, [decode(ids.tolist()) for ids in sequences])


def write_foreign(work: Path, texts: list[str]) -> None:
    """Other people's tars: a member `.txt` for each text, and one tar more with the first ten, for validation."""
    for name in ("tars", "tars-energon", "valid"):
        shutil.rmtree(work / name, ignore_errors=True)
    contents = [text.encode() for text in texts]
    write_tars(work / "tars", contents, "txt", TARS)
    write_tars(work / "valid", contents[:10], "txt", 1)
    (work / "tars-energon").mkdir()
    for path in sorted((work / "tars").glob("*.tar")):
        os.link(path, work / "tars-energon" / path.name)


def index(readers: Readers, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of an index per second."""
    for _ in range(args.rounds):
        for library in chosen(args, WITH_INDEX):
            tars = sorted(str(path) for path in tar_folder(args.work, library).glob("*.tar"))
            out = read_folder(args.work, library)
            shutil.rmtree(out if library == OURS else out / ".nv-meta", ignore_errors=True)
            answer = readers.ask(
                library,
                "index",
                tars=tars,
                valid=str(args.work / "valid" / "000000.tar"),
                tokenizer=str(args.work / "tokenizer"),
                folder=str(out),
            )
            yield row("index", library, "", answer, samples=answer["rows"])


def own(readers: Readers, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Passes over the library's own form."""
    yield from passes(readers, args, "own", args.libraries)


def tars(readers: Readers, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Passes over other people's tars."""
    yield from passes(readers, args, "tars", chosen(args, OF_TARS))


def place(args: argparse.Namespace, form: str, library: str) -> dict[str, Any]:
    folder = own_folder(args.work, library) if form == "own" else read_folder(args.work, library)
    return {"folder": str(folder), "form": form, "tokenizer": str(args.work / "tokenizer")}


def same(readers: Readers, args: argparse.Namespace) -> None:
    """SystemExit unless each library delivers each sequence once from both forms."""
    with np.load(args.work / "all.npz") as stored:
        expected = Counter(names_of(stored["tokens"], stored["lengths"]))
    for form, library in [("own", one) for one in args.libraries] + [("tars", one) for one in chosen(args, OF_TARS)]:
        answer = readers.ask(library, "names", batch=BATCH, **place(args, form, library))
        found = Counter(itertools.chain.from_iterable(answer["names"]))
        if answer["error"] or found != expected:
            raise SystemExit(
                f"{library}, {form}: {(expected - found).total()} sequences missing, "
                f"{(found - expected).total()} others; {answer['error']}"
            )
        print(f"{library}, {form}: each of {expected.total():,} sequences once", flush=True)


def names_of(tokens: np.ndarray, lengths: np.ndarray) -> list[int]:
    """The crc32 of each sequence, by which the readers name them."""
    return [zlib.crc32(ids.astype(np.uint16).tobytes()) for ids in np.split(tokens, np.cumsum(lengths)[:-1])]


def passes(
    readers: Readers, args: argparse.Namespace, form: str, libraries: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Timed passes, the libraries taking turns."""
    for _ in range(args.rounds):
        for library in libraries:
            for variant in VARIANTS.get(library, ("",)):
                answer = readers.ask(library, "pass", variant=variant, **place(args, form, library))
                yield row(
                    form,
                    library,
                    variant,
                    answer,
                    samples=answer["samples"],
                    answer=f"opened in {answer['open']:.3f} s",
                )


def resume(readers: Readers, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds until the first batch after nine tenths of a large set."""
    for _ in range(args.rounds):
        for library in args.libraries:
            answer = readers.ask(library, "resume", **resumed(args, library))
            yield row("resume", library, "", answer, samples=answer["samples"])


def resumed(args: argparse.Namespace, library: str) -> dict[str, Any]:
    """The set of which nine tenths have been read, and where that position is saved."""
    return {
        "folder": str(own_folder(args.work, library, "resume")),
        "form": "own",
        "batch": BATCH,
        "batches": args.resume_samples * 9 // 10 // BATCH,
        "state": str(args.work / f"state-{library}"),
    }


def flip(readers: Readers, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What becomes of a flipped bit."""
    with np.load(args.work / "small.npz") as stored:
        parts = np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])
    whole = {zlib.crc32(ids.tobytes()) for ids in parts}
    for library in args.libraries:
        copy = args.work / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(own_folder(args.work, library, "small"), copy)
        where = flip_bit(copy, parts[len(parts) // 2].tobytes())
        try:
            answer = readers.ask(library, "names", folder=str(copy), form="own", batch=GLOBAL)
        except Failed as error:
            answer = {"names": [], "error": str(error), "versions": {}}
        found = list(itertools.chain.from_iterable(answer["names"]))
        others = sum(name not in whole for name in found)
        words = f"{others} wrong sequence delivered, nothing said" if others else "replaced by a whole one, and logged"
        if answer["error"]:
            words = f"error after {len(found):,} of {len(whole):,}: {answer['error']}"
        elif not others and len(found) < len(whole):
            words = f"{len(whole) - len(found)} sequences missing, no error"
        yield row("flip", library, "", answer, samples=len(found), answer=f"{where}: {words}")


def flip_bit(folder: Path, content: bytes) -> str:
    """Flip the lowest bit of the third byte of `content` where it is stored; in the middle of the largest file if it is
    stored compressed."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    for path in files:
        if (offset := path.read_bytes().find(content)) >= 0:
            break
    else:
        path = files[-1]
        offset = path.stat().st_size // 2
    with open(path, "r+b") as file:
        file.seek(offset + 2)
        old = file.read(1)
        file.seek(offset + 2)
        file.write(bytes([old[0] ^ 1]))
    return f"{path.relative_to(folder)} byte {offset + 2}"


def world(readers: Readers, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Global batches of two ranks and of four, from the start and after a resume."""
    for library in args.libraries:
        try:
            answer = changed_world(readers, args, library)
        except Failed as error:
            answer = f"error: {error}"
        yield row("world", library, "", {"versions": {}}, samples=SMALL, answer=answer)


def changed_world(readers: Readers, args: argparse.Namespace, library: str) -> str:
    """In words."""
    how = {"folder": str(own_folder(args.work, library, "small")), "form": "own"}
    state = args.work / f"ranks-{library}"
    for old in args.work.glob(f"ranks-{library}.*"):
        old.unlink()
    two = global_batches(readers.ask_ranks(library, "names", 2, batch=GLOBAL // 2, **how))
    four = global_batches(readers.ask_ranks(library, "names", 4, batch=GLOBAL // 4, **how))
    same = sum(Counter(a) == Counter(b) for a, b in zip(two, four))
    words = f"from the start {same} of {len(two)} global batches have the same samples"
    half = len(two) // 2
    before = global_batches(
        readers.ask_ranks(library, "names", 2, batch=GLOBAL // 2, batches=half, state=str(state), save=True, **how)
    )
    try:
        after = global_batches(
            readers.ask_ranks(library, "names", 4, batch=GLOBAL // 4, state=str(state), restore=True, **how)
        )
    except Failed as error:
        return f"{words}; resume by four: {error}"
    same = sum(Counter(a) == Counter(b) for a, b in zip(two[half:], after))
    seen = Counter(itertools.chain.from_iterable(before + after))
    twice, missing = sum(count - 1 for count in seen.values()), SMALL - len(seen)
    return f"{words}; after a resume by four {same} of {len(two) - half}, {twice} samples twice, {missing} never"


def global_batches(answers: list[dict[str, Any]]) -> list[list[int]]:
    """The names of each global batch: those of all ranks, step by step. Failed if a rank has failed."""
    for answer in answers:
        if answer["error"]:
            raise Failed(answer["error"])
    return [list(itertools.chain.from_iterable(parts)) for parts in itertools.zip_longest(
        *(answer["names"] for answer in answers), fillvalue=[]
    )]  # fmt: skip


def row(
    part: str, library: str, variant: str, measured: dict[str, Any], samples: int, answer: str = ""
) -> dict[str, Any]:
    """A row of the CSV."""
    return {
        "part": part,
        "library": library,
        "variant": variant,
        "seconds": f"{measured['seconds']:.4f}" if "seconds" in measured else "",
        "processor": f"{measured['processor']:.4f}" if "processor" in measured else "",
        "samples": samples,
        "answer": answer,
        "versions": " ".join(f"{name} {number}" for name, number in measured["versions"].items()),
    }


def chosen(args: argparse.Namespace, libraries: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(library for library in libraries if library in args.libraries)


def origin() -> dict[str, str]:
    """Hardware, commit and date."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": f"{cpu}, 1 of {os.cpu_count()} cores", "commit": commit.strip(), "date": date.today().isoformat()}


def add(out: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Append each row as soon as it is measured."""
    out.parent.mkdir(parents=True, exist_ok=True)
    surroundings, new = origin(), not out.exists()
    with open(out, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for found in rows:
            writer.writerow(found | surroundings)
            file.flush()
            print(*(str(found[name]) for name in COLUMNS[:7]), sep="\t", flush=True)


def table(out: Path) -> str:
    """All rounds of a CSV as Markdown."""
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    lines = []
    for part in ("own", "tars", "index"):
        lines += rates([found for found in rows if found["part"] == part], part)
    lines += ["", "| | seconds to resume | a flipped bit | two ranks, then four |", "|---" * 4 + "|"]
    for library in LIBRARIES:
        seconds = [float(f["seconds"]) for f in rows if (f["part"], f["library"]) == ("resume", library)]
        shown = f"{statistics.median(seconds):.3f}" if seconds else ""
        words = [
            [f["answer"] for f in rows if (f["part"], f["library"]) == (part, library)][-1:]
            for part in ("flip", "world")
        ]
        lines.append(f"| {library} | {shown} | {' | '.join(''.join(word) for word in words)} |")
    return "\n".join(lines)


def rates(rows: list[dict[str, str]], part: str) -> list[str]:
    """Samples per second of each contender, and how many times as long it takes as ours."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for one in rows:
        rate = tuple(int(one["samples"]) / float(one[name]) for name in ("seconds", "processor"))
        found.setdefault((one["library"], one["variant"]), []).append((rate[0], rate[1]))
    if not found:
        return []
    best = statistics.median(used for _, used in next(iter(found.values())))
    lines = [
        "",
        f"| {part} | samples/s | (range) | samples per processor second | ours is times faster |",
        "|---" * 5 + "|",
    ]
    for (library, variant), both in found.items():
        elapsed, used = zip(*both)
        lines.append(
            f"| {library} {variant} | {statistics.median(elapsed):,.0f} | {min(elapsed):,.0f} to {max(elapsed):,.0f} | "
            f"{statistics.median(used):,.0f} | {best / statistics.median(used):.2f} |"
        )
    return lines


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--data", type=Path, help="prepared folder of molecules, for `write`")
    parser.add_argument("--environments", type=Path, help="folder of benchmarks/data_environments.sh")
    parser.add_argument("--work", type=Path, default=Path("data-libraries"), help="folder for all that is written")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--sequences", type=int, default=200_000)
    parser.add_argument("--resume-samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    default = ROOT / "benchmarks" / "results" / f"data_libraries_{date.today().isoformat()}.csv"
    parser.add_argument("--out", type=Path, default=default, help="CSV to add to")
    args = parser.parse_args(arguments)
    if "write" in args.parts and args.data is None:
        parser.error("write needs --data")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = options(arguments)
    args.work, args.libraries = args.work.resolve(), tuple(args.libraries)
    readers = Readers(args.environments)
    measured = {"own": own, "tars": tars, "index": index, "resume": resume, "flip": flip, "world": world}
    for part in args.parts:
        if part == "write":
            write(readers, args)
        elif part == "same":
            same(readers, args)
        elif part == "table":
            print(table(args.out))
        else:
            add(args.out, measured[part](readers, args))


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    main()
