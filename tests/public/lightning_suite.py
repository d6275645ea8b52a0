"""Lightning's own tests with `StatQATCallback` injected into every Trainer.

    python -m tests.public.lightning_suite CHECKOUT [--only trainer/test_trainer.py ...]

CHECKOUT is a copy of Lightning's repository at the installed version; nothing of it is copied here.
Each file of its tests runs in a process of its own, with `STATQAT_CONFIG` naming a file that adds
the callback; tests that fail run once more without it. Those that pass then are printed, and the
exit status says whether any of them is not among the exceptions below, which
`docs/compatibility.md` lists with the same reasons.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

TESTS = Path("tests") / "tests_pytorch"
# What trains on one process of a CPU; the rest of Lightning's tests never sees a callback.
FOLDERS = ("callbacks", "checkpointing", "core", "loops", "models", "trainer", "tuner")
# Those that start other processes, or look at other hardware, have nothing to show here.
_OTHERS = ("ddp", "spawn", "fork", "tpu", "xla", "fsdp", "subproc", "spike")
LEFT_OUT = " and ".join(f"not {word}" for word in _OTHERS)
SECONDS_A_TEST = 180

CALLS = "lists all calls of hooks; calibration runs `training_step` on a copy, ahead of training"
KEYS = "lists all keys of a checkpoint, which has one more: `statqat_lightning`"
NAMES = "reads class names, and a layer with quantizers is a `FakeQuantizedLinear`"
TIME = "gives the fit 100 ms, less than calibration takes"
NOTHING = "has no layer at all, which is refused"
EXACT = "asserts outputs to the last bit, which are those of float"
EXCEPTIONS: dict[str, str] = {
    "test_trainer_model_hook_system_fit": CALLS,
    "test_trainer_model_hook_system_fit_no_val_and_resume_max_epochs": KEYS,
    "test_trainer_model_hook_system_fit_no_val_and_resume_max_steps": KEYS,
    "test_train_loop_system": CALLS,
    "test_custom_model_summary_callback_summarize": NAMES,
    "test_multiple_pruning_callbacks": NAMES,
    "test_timer_stops_training": TIME,
    "test_evaluation_loop_dataloader_iter_multiple_dataloaders": NOTHING,
    "test_prediction_loop_with_iterable_dataset": NOTHING,
    "test__eval_step__flow": EXACT,
    "test__eval_step__epoch_end__flow": EXACT,
    "test__training_step__flow_dict": EXACT,
    "test__training_step__tr_batch_end__flow_dict": EXACT,
    "test__training_step__epoch_end__flow_dict": EXACT,
    "test__training_step__batch_end__epoch_end__flow_dict": EXACT,
    "test__training_step__flow_scalar": EXACT,
    "test__training_step__tr_batch_end__flow_scalar": EXACT,
    "test__training_step__epoch_end__flow_scalar": EXACT,
}


def outcomes(checkout: Path, tests: Sequence[str], config: Path | None) -> dict[str, str]:
    """What happened to each test: `passed`, `failed` or `skipped`, by its id.

    Args:
        checkout: Lightning's repository.
        tests: A file below its tests, or the ids of tests of one file.
        config: The file for `STATQAT_CONFIG`; None for Lightning alone.
    """
    file = tests[0].partition("::")[0]
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), str(checkout / "tests")]
            ),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("STATQAT_CONFIG", None)
        if config is not None:
            environment["STATQAT_CONFIG"] = str(config)
        command = [sys.executable, "-m", "pytest", *tests, "-q", "-k", LEFT_OUT]
        command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
        command += [f"--timeout={SECONDS_A_TEST}", f"--rootdir={checkout}"]
        with log.open("w", encoding="utf-8") as output:
            subprocess.run(
                command,
                cwd=checkout / TESTS,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if not report.exists():
            return {file: "failed"}
        return _read(report, file)


def _read(report: Path, file: str) -> dict[str, str]:
    module = file.removesuffix(".py").replace("/", ".")
    found = {}
    for test in ElementTree.parse(report).iter("testcase"):
        outcome = "passed"
        for child in test:
            if child.tag in ("failure", "error"):
                outcome = "failed"
            elif child.tag == "skipped":
                outcome = "skipped"
        _, _, cls = str(test.get("classname")).partition(f"{module}.")
        found["::".join([file, *filter(None, [cls]), str(test.get("name"))])] = outcome
    return found


def reason(test: str) -> str | None:
    """Why a test may fail with the callback; None if it must not."""
    return EXCEPTIONS.get(test.rpartition("::")[2].partition("[")[0])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only", nargs="+", default=(), help="files below tests/tests_pytorch")
    options = parser.parse_args(arguments)
    checkout: Path = options.checkout.resolve()
    home = checkout / TESTS
    files = list(options.only) or sorted(
        path.relative_to(home).as_posix()
        for folder in FOLDERS
        for path in (home / folder).rglob("test_*.py")
    )
    counts: Counter[str] = Counter()
    unexpected = []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "qat.yaml"
        config.write_text("snr_monitor: false\nverbose: false\n", encoding="utf-8")
        for file in files:
            ours = outcomes(checkout, [file], config)
            failed = [test for test, outcome in ours.items() if outcome == "failed"]
            alone = outcomes(checkout, failed, None) if failed else {}
            lost = [test for test in failed if alone.get(test) == "passed"]
            counts += Counter(ours.values())
            print(
                f"{file}: {dict(Counter(ours.values()))}, {len(lost)} by the callback", flush=True
            )
            for test in lost:
                why = reason(test)
                print(f"    {test}: {why or 'NOT EXPECTED'}", flush=True)
                if why is None:
                    unexpected.append(test)
    print(f"in all {dict(counts)}; {len(unexpected)} fail by the callback that are not expected to")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
