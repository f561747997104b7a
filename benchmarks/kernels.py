"""The kernels compared with other ways to compute the same: `python benchmarks/kernels.py [attention|vocab|dag ...]`.

The results of each side are checked first, then all sides of a case are timed in turn in one process; figures are the
median and the quartiles over the rounds. A table is printed and, with hardware, versions and commit, written to
`<out>/kernels_[<operations>_]<device>_<date>.csv` and `.md`. `--toy` runs tiny sizes anywhere, for the tests: its times
mean nothing. Cases of an operation are in `kernels_<operation>.py` in this folder: `cases(device, toy)` yields
`timing.Case`.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402
from timing import Case, Figure, ceilings, measure, surroundings  # noqa: E402

COLUMNS = (
    "date", "commit", "device", "torch", "cuda", "triton", "case", "sizes", "side",
    "median_ms", "low_ms", "high_ms", "peak_mb", "results_mb", "peak_fraction", "error", "ratio_to_ours", "fault",
)  # fmt: skip


def operations() -> list[str]:
    """Operations that have cases."""
    return sorted(path.stem.removeprefix("kernels_") for path in HERE.glob("kernels_*.py"))


def table(case: Case, figures: list[Figure]) -> str:
    """One case as a Markdown table; the last column says how many times slower than ours a side is."""
    lines = [
        f"### {case.name}: {case.sizes}",
        "",
        "| side | ms | quartiles | peak MB | of that results | error | times ours |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in figures:
        error = "" if one.error is None else f"{one.error:.1e}"
        if one.fault:
            lines.append(f"| {one.side} | left out: {one.fault} | | | | {error} | |")
        else:
            times, memory = f"{one.median:.4g} | {one.low:.4g} to {one.high:.4g}", f"{one.peak:.0f} | {one.results:.0f}"
            lines.append(f"| {one.side} | {times} | {memory} | {error} | {one.ratio:.2f} |")
    others = [one.ratio for one in figures if not one.side.startswith(case.ours) and not one.fault]
    if others and case.aim is not None:
        lines += ["", f"Best other side over ours: {min(others):.2f} (at least {case.least}, aim {case.aim})."]
    if case.whole:
        name, size = case.whole[0], case.whole[1] / 2**20
        parts = [f"{one.side} {one.peak / size:.1%} ({(one.peak - one.results) / size:.1%} beside results)"
                 for one in figures if not one.fault]  # fmt: skip
        lines += ["", f"Peak as a fraction of {name}, {size:.0f} MB: " + ", ".join(parts) + "."]
    if case.floors:
        lines += ["", "Floors: " + ", ".join(f"{name} {value:.3g} ms" for name, value in case.floors.items()) + "."]
    return "\n".join(lines) + "\n"


def rows(case: Case, figures: list[Figure], around: dict[str, str]) -> list[dict[str, object]]:
    """Lines of the CSV."""
    return [
        around
        | {
            "case": one.case, "sizes": one.sizes, "side": one.side, "fault": one.fault,
            "median_ms": one.median, "low_ms": one.low, "high_ms": one.high, "peak_mb": one.peak,
            "results_mb": one.results, "peak_fraction": one.peak * 2**20 / case.whole[1] if case.whole else "",
            "error": one.error, "ratio_to_ours": one.ratio,
        }
        for one in figures
    ]  # fmt: skip


def write(path: Path, head: str, tables: list[str], lines: list[dict[str, object]]) -> None:
    """Both files: `path`, which ends in .csv, and the same with .md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    path.with_suffix(".md").write_text(head + "\n" + "\n".join(tables))


def on_gpu(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The options, two of them common to all benchmarks of kernels, and the GPU; at toy size any device will do."""
    parser.add_argument("--commit", default="", help="of the code, where there is no git folder")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; works without a GPU")
    options = parser.parse_args(argv)
    if not options.toy and not torch.cuda.is_available():
        parser.error("no CUDA device here; `--toy` runs tiny sizes without one")
    return options, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(argv: list[str] | None = None) -> int:
    """Measure; return 1 if one of our own sides failed its check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(operations())}; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the tables")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--milliseconds", type=float, default=60, help="time per side and round")
    parser.add_argument("--select", default="", help="only cases whose name and sizes contain this")
    options, device = on_gpu(parser, argv)
    around, tables, lines, failed = surroundings(options.commit, device), [], [], 0
    now = ", ".join(f"{name} {value:.4g}" for name, value in ceilings(device).items())
    facts = ", ".join(f"{name} {value}" for name, value in around.items())
    head = f"# Kernels\n\n{facts}. Card at start: {now or '-'}.\n"
    print(head)
    slug = re.sub(r"[^a-z0-9]+", "-", around["device"].lower()).strip("-")
    path = options.out / f"{'_'.join(['kernels', *options.operations, slug, around['date']])}.csv"
    for operation in options.operations or operations():
        for case in importlib.import_module(f"kernels_{operation}").cases(device, options.toy):
            if options.select not in f"{case.name} {case.sizes}":
                continue
            figures = measure(case, device, options.rounds, options.milliseconds)
            failed += any(one.fault for one in figures if one.side == case.ours)
            tables.append(table(case, figures))
            lines += rows(case, figures, around)
            print(tables[-1], flush=True)
            write(path, head, tables, lines)
            del case
            gc.collect()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
