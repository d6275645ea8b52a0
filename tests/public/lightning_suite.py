"""Lightning's own tests with `StatQATCallback` injected into every Trainer.

    python -m tests.public.lightning_suite CHECKOUT [--only trainer/test_trainer.py ...]

CHECKOUT is a copy of Lightning's repository at the installed version; nothing of it is copied here.
Each file of its tests runs twice, in a process of its own: as it is, and with `STATQAT_CONFIG`
naming a file that adds the callback. Tests that pass the first time and fail the second are
printed; the exit status says whether any of them is not among the exceptions below, which
`docs/compatibility.md` lists with the same reasons.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path("tests") / "tests_pytorch"
# What trains on one process of a CPU; the rest of Lightning's tests never sees a callback.
FOLDERS = ("callbacks", "checkpointing", "core", "loops", "models", "trainer", "tuner")
# Those that start other processes, or look at other hardware, have nothing to show here.
LEFT_OUT = "not ddp and not spawn and not fork and not tpu and not xla and not fsdp and not subproc"
SECONDS_A_TEST = 90

LISTS = "asserts the exact list of callbacks, or of what is saved for them"
FLOAT = "asserts that the quantized run equals a float one, or float arithmetic by hand"
EXCEPTIONS: dict[str, str] = {}


def outcomes(checkout: Path, file: Path, config: Path | None) -> dict[str, str]:
    """What happened to each test of a file: `passed`, `failed` or `skipped`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), str(checkout / "tests")]
            ),
            "PL_RUN_STANDALONE_TESTS": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("STATQAT_CONFIG", None)
        if config is not None:
            environment["STATQAT_CONFIG"] = str(config)
        command = [sys.executable, "-m", "pytest", str(file), "-q", "-k", LEFT_OUT]
        command += [f"--junitxml={report}", "-p", "no:cacheprovider", "-p", "no:randomly"]
        command += [f"--timeout={SECONDS_A_TEST}", "--rootdir", str(checkout)]
        log = Path("lightning_suite.log")
        with log.open("a", encoding="utf-8") as output:
            subprocess.run(
                command,
                cwd=checkout / TESTS,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        return _read(report) if report.exists() else {"(the whole file)": "failed"}


def _read(report: Path) -> dict[str, str]:
    found = {}
    for test in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for child in test:
            if child.tag in ("failure", "error"):
                outcome = "failed"
            elif child.tag == "skipped":
                outcome = "skipped"
        found[f"{test.get('classname')}::{test.get('name')}"] = outcome
    return found


def lost(without: Mapping[str, str], with_callback: Mapping[str, str]) -> list[str]:
    """The tests that pass without the callback, and fail with it."""
    return [
        name
        for name, outcome in without.items()
        if outcome == "passed" and with_callback.get(name, "failed") == "failed"
    ]


def reason(name: str) -> str | None:
    """Why a test may fail with the callback; None if it must not."""
    plain = name.partition("[")[0]
    return next((why for test, why in EXCEPTIONS.items() if plain.endswith(test)), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", nargs="+", default=(), help="files below tests/tests_pytorch")
    parser.add_argument("--baseline", type=Path, help="keep the outcomes without the callback here")
    options = parser.parse_args(arguments)
    checkout = options.checkout.resolve()
    home = checkout / TESTS
    files = [home / name for name in options.only] or sorted(
        path for folder in FOLDERS for path in (home / folder).rglob("test_*.py")
    )
    kept = options.baseline
    baseline = json.loads(kept.read_text("utf-8")) if kept and kept.exists() else {}
    passed, unexpected = 0, []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "qat.yaml"
        config.write_text("snr_monitor: false\nverbose: false\n", encoding="utf-8")
        for file in files:
            name = file.relative_to(home).as_posix()
            if name not in baseline:
                baseline[name] = outcomes(checkout, file, None)
                if kept:
                    kept.write_text(json.dumps(baseline, indent=1), encoding="utf-8")
            ours = outcomes(checkout, file, config)
            passed += sum(outcome == "passed" for outcome in ours.values())
            for test in lost(baseline[name], ours):
                why = reason(test)
                print(f"{name}: {test}: {why or 'NOT EXPECTED'}", flush=True)
                if why is None:
                    unexpected.append(test)
    print(f"{passed} tests pass with the callback; {len(unexpected)} fail that are not expected to")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
