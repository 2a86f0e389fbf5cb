"""What the command says where its words have no reader, no room, no letters, or no time."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import clip_fast
from clip_fast.bulk.pipeline import Options
from clip_fast.bulk.processes import ProcessJob, run_on_devices
from clip_fast.cli import encode as encode_command
from clip_fast.cli import main as cli
from clip_fast.cli.messages import show
from clip_fast.inputs.inputs import Inputs

ROOT = Path(clip_fast.__file__).parent.parent
COMMAND = [sys.executable, "-m", "clip_fast"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of the shell, in which `$clip_fast` is the command."""
    given = ENVIRONMENT | environment | {"clip_fast": " ".join(COMMAND)}
    return subprocess.run(["bash", "-c", line], env=given, capture_output=True, text=True, timeout=300, check=False)


# --- nobody reads ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["models", "encode --help", "demo --device cpu", "--version"])
def test_a_reader_that_has_enough_is_no_error(arguments: str, unbuffered: str) -> None:
    """With the status of a program that the signal has ended, but for argparse's own words."""
    done = run(f"$clip_fast {arguments} | true; echo ${{PIPESTATUS[0]}}", PYTHONUNBUFFERED=unbuffered)
    assert done.stderr == ""
    assert done.stdout in ("141\n", "0\n" if "--" in arguments else "")


@pytest.mark.slow
def test_messages_that_nobody_reads(tmp_path: Path) -> None:
    line = f"$clip_fast encode {tmp_path}/gone.png --model tiny-digits 2>&1 >/dev/null | true; echo ${{PIPESTATUS[0]}}"
    done = run(line)
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_a_broken_pipe_of_another_kind_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one to a worker."""

    def broken(_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli._COMMANDS, "models", lambda: broken)
    assert cli.main(["models"]) == 2
    assert "error: [Errno 32] Broken pipe" in capsys.readouterr().err


# --- no room, no letters ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_results(unbuffered: str) -> None:
    done = run("$clip_fast models > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "clip-fast: error: [Errno 28] No space left on device: 'standard output'\n"


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_messages(tmp_path: Path, unbuffered: str) -> None:
    """The job goes on, and ends with the status that it has."""
    Image.new("RGB", (9, 8)).save(tmp_path / "0.png")
    line = f"$clip_fast encode {tmp_path}/{{}}.png --model tiny-digits --output {tmp_path}/e.npy 2>/dev/full"
    gone = run(line.format("gone"), PYTHONUNBUFFERED=unbuffered)
    assert (gone.returncode, gone.stdout, gone.stderr) == (2, "", "")
    there = run(f"{line.format('*')} --workers 1 --json", PYTHONUNBUFFERED=unbuffered)
    assert there.returncode == 0
    assert '"images": 1' in there.stdout


@pytest.mark.slow
def test_another_program_with_an_argument_of_this_name(tmp_path: Path) -> None:
    """Such as `pytest -m clip_fast` is not the command: its package is whole, and its garbage is collected."""
    script = tmp_path / "script.py"
    script.write_text("import gc, clip_fast; clip_fast.load; assert gc.isenabled(); print('whole')")
    done = run(f"{sys.executable} {script} -m clip_fast")
    assert (done.stdout, done.stderr) == ("whole\n", "")


def test_a_standard_error_that_is_closed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its messages and tracebacks are not among the results."""
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["encode", "gone.png", "--model", "tiny-digits", "--json", "--debug"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["error"] == "ValueError: no image found"


@pytest.mark.slow
def test_a_standard_output_that_is_closed() -> None:
    done = run("$clip_fast models >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("encoding", "wanted"),
    [
        ("ascii", "caf\\xe9 \\U0001f600"),
        ("latin-1", "caf\xe9 \\U0001f600"),
        ("cp1252", "caf\xe9 \\U0001f600"),
        ("shift_jis", "caf\\xe9 \\U0001f600"),
        ("utf-8", "caf\xe9 \U0001f600"),
    ],
)
def test_letters_that_a_terminal_lacks(encoding: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", terminal)
        show("caf\xe9 \U0001f600")
    terminal.seek(0)
    assert terminal.read() == wanted + "\n"


@pytest.mark.parametrize("command", [[], ["encode"], ["search"], ["verify"], ["demo"], ["models"]])
def test_help_has_only_letters_that_every_terminal_has(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    assert capsys.readouterr().out.isascii()


# --- where an error came from ----------------------------------------------------------------------------------------


def failing(*_: object, **__: object) -> None:
    raise ValueError("it broke")


@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_is_shown_where_it_is_asked_for(
    debug: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").touch()
    monkeypatch.setattr(encode_command, "load", failing)
    assert cli.main(["encode", "a.png", "--model", "m.pt", "--quiet", *["--debug"] * debug]) == 2
    said = capsys.readouterr().err
    assert said.endswith("clip-fast: error: it broke\n")
    assert ("Traceback" in said) == debug
    assert ("in failing" in said) == debug


def test_an_error_without_words_has_its_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise RuntimeError

    monkeypatch.setitem(cli._COMMANDS, "models", lambda: fail)
    assert cli.main(["models"]) == 2
    assert capsys.readouterr().err == "clip-fast: error: RuntimeError\n"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_error_of_a_device_process_keeps_its_type_and_its_traceback(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.pt")
    job = ProcessJob(gone, torch.float32, None, Inputs([]), str(tmp_path), Options(workers=0), False, 1)
    with pytest.raises(RuntimeError, match=r"^cpu: CheckpointError: .*gone\.pt") as error:
        run_on_devices([torch.device("cpu")], job, lambda _: None)
    assert "Traceback" in str(error.value.__cause__)
    assert "in _serve" in str(error.value.__cause__)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def wait_for(process: subprocess.Popen[bytes], text: str) -> None:
    """Until the process, or a child of it, has loaded a file, or has a command line, with `text` in its name."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended too early"
        for place in Path("/proc").glob("[0-9]*"):
            try:
                ours = os.getpgid(int(place.name)) == process.pid
                if ours and any(text in (place / file).read_text() for file in ("cmdline", "maps")):
                    return
            except OSError:
                continue
        time.sleep(0.01)
    pytest.fail(f"{text} never came")


def interrupt(command: list[str], when: str, folder: Path) -> tuple[int, str]:
    """The status and the words of a command that is given Ctrl-C, with all processes of its group."""
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(process, when)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    return process.returncode, said.decode()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["as a module", "as a command"])
def test_ctrl_c_while_pytorch_is_imported(name: str, tmp_path: Path) -> None:
    script = tmp_path / "clip-fast"  # as pip writes it
    script.write_text("import sys\nfrom clip_fast.cli.main import main\nsys.exit(main())\n")
    command = COMMAND if name == "as a module" else [sys.executable, str(script)]
    assert interrupt([*command, "models"], "libtorch", tmp_path) == (130, "clip-fast: interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "when"),
    [(["--workers", "1"], "resource_tracker"), (["--devices", "cpu,cpu", "--workers", "0"], "spawn_main")],
    ids=["decoders", "devices"],
)
def test_ctrl_c_while_other_processes_start(options: list[str], when: str, tmp_path: Path) -> None:
    """One line, and no traceback of theirs."""
    (tmp_path / "in").mkdir()
    for i in range(40):
        Image.new("RGB", (400, 300), (i, 0, 0)).save(tmp_path / "in" / f"{i}.png")
    encode = ["encode", "in", "--model", "tiny-digits", "--output", "out/", "--shard-size", "4", "--quiet", *options]
    assert interrupt([*COMMAND, *encode], when, tmp_path) == (130, "clip-fast: interrupted\n")


def test_importing_the_library_leaves_ctrl_c_and_the_garbage_collector_alone() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_command_looks_for_no_garbage_among_its_imports() -> None:
    program = (
        "import gc, sys\nsys.argv = ['clip-fast', 'models']\nimport clip_fast.cli.main as cli\n"
        "assert not gc.isenabled()\nassert cli.main() == 0\n"
        "assert gc.isenabled()\nassert gc.get_freeze_count() > 10_000"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
