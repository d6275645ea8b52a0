from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from statqat_lightning.export import export_model
from statqat_lightning.export.files.on_disk import FileError, replacing, size_of
from tests.export.fresh import run_fresh
from tests.export.models import calibrated, images, recipe_of, small_net

FULL = """
import resource, signal, sys
from pathlib import Path
import torch._dynamo  # which writes files when it is first imported
from tests.export.models import calibrated, images, recipe_of, small_net
from statqat_lightning.export import save_native, save_onnx, save_program

model, x = calibrated(small_net(), recipe_of("int4", "int4"), images()), images()
writers = {
    "m.safetensors": lambda path: save_native(model, path),
    "m.onnx": lambda path: save_onnx(model, path, x),
    "m.pt2": lambda path: save_program(model, path, x),
}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for path, write in writers.items():
    try:
        write(path)
    except OSError as error:
        assert f"{path!r} cannot be written (File too large). What was there" in str(error), error
    else:
        sys.exit(f"{path} was written")
    assert Path(path).read_bytes() == b"old", path
"""


def test_a_full_disk_is_named_and_leaves_the_old_files() -> None:
    for name in ("m.safetensors", "m.onnx", "m.pt2"):
        Path(name).write_bytes(b"old")
    run_fresh(FULL)
    assert {file.name for file in Path().iterdir()} == {"m.safetensors", "m.onnx", "m.pt2"}


KILLED = """
import json, os, signal, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.export.models import calibrated, outputs, recipe_of
from statqat_lightning.export import export_model, load_quantized
from statqat_lightning.export.proof.runtimes import load_program
from statqat_lightning.export.proof.onnx_runtime import load_onnx
from statqat_lightning.export.calls.forward_call import ForwardCall

torch.manual_seed(0)
x = torch.randn(4, 16)


def network():
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


models = [calibrated(network(), recipe_of(fmt), x) for fmt in ("int4", "int8")]
expected = [outputs(model, x) for model in models]
call = ForwardCall.of(x)


def write(number):
    export_model(models[number], "m", x, files=("native", "onnx", "pt2"), measure_latency=False)


def which():
    found = []
    for given in (
        load_quantized(network(), "m.safetensors")(x),
        load_onnx(Path("m.onnx")).run(call)[0],
        load_program(Path("m.pt2")).run(call)[0],
    ):
        near = [(given - wanted).abs().max() < 1e-5 for wanted in expected]
        assert sum(near) == 1, "neither the old model nor the new one"
        found.append(near.index(True))
    json.loads(Path("m.export.json").read_text())
    return found


write(0)
start = time.perf_counter()
write(0)
duration = time.perf_counter() - start
assert which() == [0, 0, 0]
seen = set()
for share in (0.02, 0.4, 0.7, 0.9):
    if which() != [0, 0, 0]:
        write(0)
    child = os.fork()
    if child == 0:
        write(1)
        os._exit(0)
    time.sleep(share * duration)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.add(tuple(which()))
assert (0, 0, 0) in seen  # the first kill comes before anything can be written
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of a process")
def test_a_killed_export_leaves_old_or_new_files() -> None:
    run_fresh(KILLED)
    unfinished = {f.name for f in Path().iterdir()} - {
        *("m.safetensors", "m.onnx", "m.pt2", "m.export.json")
    }
    assert all(re.match(r"\.+m-", name) for name in unfinished)


KILLED_FOLDER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.export.models import calibrated, outputs, recipe_of
from statqat_lightning.export import freeze, load_compressed, save_compressed

FILE_EVENTS = (
    *("open", "os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir", "shutil.rmtree"),
    *("tempfile.mkdtemp", "os.listdir", "os.scandir", "ctypes.dlopen", "ctypes.dlsym"),
)
torch.manual_seed(0)
x = torch.randn(4, 16)


def network():
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


models = [calibrated(network(), recipe_of(fmt), x) for fmt in ("int4", "int8")]
frozen = [freeze(model) for model in models]
expected = [outputs(model, x) for model in models]


def write(number):
    save_compressed(frozen[number], "m.compressed")


def which():
    given = load_compressed(network(), "m.compressed")(x)
    equal = [torch.equal(given, wanted) for wanted in expected]
    assert sum(equal) == 1, "neither the old model nor the new one"
    assert len([*Path("m.compressed").iterdir()]) == 2
    return equal.index(True)


def killed_at(moment):
    left = [moment]

    def hook(event, arguments):
        if event in FILE_EVENTS:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        sys.addaudithook(hook)
        write(1)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


write(0)
seen, moment = [], 0
while killed_at(moment):
    seen.append(which())
    if seen[-1]:
        write(0)
    moment += 1
assert which() == 1  # nothing killed the last one
assert seen[0] == 0 and seen[-1] == 1, seen
assert seen == sorted(seen), seen
"""


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step on Linux")
def test_a_killed_export_leaves_an_old_or_a_new_folder() -> None:
    """Killed before each thing that the export does with files."""
    run_fresh(KILLED_FOLDER)
    unfinished = {f.name for f in Path().iterdir()} - {"m.compressed"}
    assert unfinished
    assert all(name.startswith(".m.compressed-") for name in unfinished)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model = calibrated(small_net(), recipe_of("int4"), images())
    with pytest.raises(FileError, match=r"'file/below/m.safetensors' cannot be written"):
        export_model(model, "file/below/m", files=("native",))
    assert [*Path().iterdir()] == [Path("file")]


def test_other_errors_pass_and_leave_the_old_file() -> None:
    Path("m").write_bytes(b"old")

    def fail() -> None:
        with replacing(Path("m")) as temporary:
            temporary.write_bytes(b"new")
            raise KeyError("other")

    with pytest.raises(KeyError, match="other"):
        fail()
    assert Path("m").read_bytes() == b"old"
    assert [*Path().iterdir()] == [Path("m")]


def test_size_of_a_file_and_of_a_folder() -> None:
    Path("folder/below").mkdir(parents=True)
    Path("folder/a").write_bytes(bytes(3))
    Path("folder/below/b").write_bytes(bytes(4))
    assert (size_of(Path("folder/a")), size_of(Path("folder"))) == (3, 7)
