"""Makes the table of public modules in `docs/compatibility.md`; `make test-public` runs it.

    python -m tests.public.table                # rows that have no result yet, then the table
    python -m tests.public.table --again        # all rows anew
    python -m tests.public.table NAME ...       # these rows anew

Every row is a process of its own, with a time limit, and its result a file of its own, so that one
failure costs one row and a run that was cut off goes on where it was. The exit status says whether
any row is worse than the one in `recorded.json`; `--record` puts the new results there, and the
table into the documentation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.public import one
from tests.public.modules import CASES

# What libraries read when a row imports them.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    "CUDA_VISIBLE_DEVICES": "",
    "TQDM_DISABLE": "1",
}
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "outputs" / "public"
RECORDED = Path(__file__).with_name("recorded.json")
DOCUMENT = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- public modules: begin -->", "<!-- public modules: end -->"
SECONDS = 300
COLUMNS = ("trains", "resumes", "native", "onnx", "reloads")
MOST_COLUMNS = 100


def run_row(name: str, seconds: int) -> dict[str, Any]:
    """The result of one row, from a process of its own.

    It is forked from this one, which has imported PyTorch already: that takes longer than many a
    row.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(name, path))
    process.start()
    process.join(seconds)
    reason = f"exit status {process.exitcode}"
    if process.is_alive():
        reason = f"not done in {seconds} s"
        process.kill()
        process.join()
    if not path.exists():
        named = CASES[name]
        row = {"name": name, "library": named.distribution, "title": named.title}
        row |= {"trains": False, "problems": {"fit": reason}}
        path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return read_row(path)


def _in_child(name: str, path: Path) -> None:
    with (RESULTS / f"{name}.log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # whatever a library writes
        one.main(name, str(path))
        sys.stdout.flush()
        os.chdir(ROOT)


def read_row(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return row


def worse(row: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """In what a row is worse than the recorded one; empty if in nothing."""
    found = [
        f"{column}: {(row.get('problems') or {}).get(_problem(column), 'no')}"
        for column in COLUMNS
        if before.get(column) and not row.get(column)
    ]
    if "probe" in row:  # recorded or not: training, report and files must never disagree
        found += [f"probe: {line}" for line in row["probe"]]
    elif "probe" in before and row.get("trains"):
        found.append("probe: has seen nothing")
    if row.get("share", 0.0) < before.get("share", 0.0) - 0.001:
        found.append(f"share: {row.get('share', 0.0):.1%}, before {before['share']:.1%}")
    return found


def _problem(column: str) -> str:
    return "fit" if column == "trains" else column


def kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row is recorded: what another machine would find as well."""
    left_out = ("seconds", "warnings", "steps", "onnx_snr_db")
    return {key: value for key, value in row.items() if key not in left_out}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, and below it what it leaves out, in lines of at most 100 columns."""
    lines = [
        "| library | module | trains | quantized | resumes | native | ONNX | probe |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes: list[tuple[str, str]] = []
    for row in rows:
        what = f"{row['library']} {row['title']}"
        cells = [row["library"], row["title"], *(_cell(row, c) for c in ("trains", "share"))]
        cells += [_cell(row, column) for column in ("resumes", "native", "onnx", "probe")]
        lines.append("| " + " | ".join(cells) + " |")
        for column, problem in (row.get("problems") or {}).items():
            notes.append((what, f"{column}: {_plain(problem)}"))
        for line in row.get("probe") or ():
            notes.append((what, f"probe: {line}"))
    libraries = sorted({f"{r['library']} {r['version']}" for r in rows if "version" in r})
    lines += ["", *wrap("Versions: " + ", ".join(libraries) + ".")]
    lines += ["", "In float, beside normalisation (`*` is any number; the type in brackets):", ""]
    for row in rows:
        left = row.get("float")
        if left is not None:
            names = ", ".join(f"`{name}`" for name in left[:5]) or "nothing"
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            lines += wrap(f"- {row['library']} {row['title']}: {names}{more}", "  ")
    reloaded = [f"{row['library']} {row['title']}" for row in rows if row.get("reloads")]
    if reloaded:
        text = "Saved and loaded by the library's own functions, inside of `quantized_loading()`, "
        lines += ["", *wrap(f"{text}with all quantizers: {', '.join(reloaded)}.")]
    if notes:
        lines += ["", "Where a cell says no:", ""]
        for what, note in notes:
            lines += wrap(f"- {what}: {note}", "  ")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column == "share":
        return f"{100 * row['share']:.1f} %" if "share" in row else "-"
    if column == "probe":
        return (
            "-"
            if "probe" not in row
            else f"{len(row['probe'])} differ"
            if row["probe"]
            else "agrees"
        )
    if column not in row:
        return "-"
    if column == "resumes" and not row[column] and row.get("float_resumes") is False:
        return "no, nor in float"
    return "yes" if row[column] else "no"


def _plain(text: str, most: int = 200) -> str:
    """Text of an exception without what Markdown would read, and without paths of a machine."""
    text = " ".join(part for part in text.split() if not part.startswith("/"))
    text = text.replace("|", "/").replace("<", "(").replace(">", ")").replace("`", "'")
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


def wrap(text: str, indent: str = "", most: int = MOST_COLUMNS) -> list[str]:
    """Lines of at most `most` columns, broken at spaces."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > most:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]


def write_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the table between its marks in the documentation."""
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    table = f"{BEGIN}\n\n{markdown(rows)}\n\n{END}"
    DOCUMENT.write_text(head + table + tail, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows to run; default: all that were not run yet")
    parser.add_argument("--again", action="store_true", help="run those that were run, too")
    parser.add_argument("--record", action="store_true", help="record results, write the table")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time limit of a row")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(CASES)):
        parser.error(f"unknown rows {unknown}; known: {', '.join(CASES)}")
    os.environ.update(ENVIRONMENT)
    os.environ.pop("STATQAT_CONFIG", None)
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    rows, failures = {}, 0
    for name in options.names or CASES:
        path = RESULTS / f"{name}.json"
        anew = options.again or options.names or not path.exists()
        rows[name] = run_row(name, options.seconds) if anew else read_row(path)
        row = rows[name]
        cells = "  ".join(f"{c}: {_cell(row, c)}" for c in ("share", *COLUMNS, "probe"))
        print(f"{name:28} {cells}  ({row.get('seconds', '?')} s)", flush=True)
        found = worse(row, recorded.get(name, {}))
        failures += bool(found)
        for line in found:
            print(f"    worse: {line}", flush=True)
    if options.record:
        recorded |= {name: kept(row) for name, row in rows.items()}
        recorded = {name: recorded[name] for name in CASES if name in recorded}
        text = json.dumps(recorded, indent=1, ensure_ascii=False)
        RECORDED.write_text(text + "\n", encoding="utf-8")
        write_table([rows.get(name) or recorded[name] for name in recorded])
    print(f"{len(rows)} rows, {failures} worse than recorded in {RECORDED.name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
