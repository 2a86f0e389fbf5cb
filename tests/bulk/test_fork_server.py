"""The process that decoders are forked from: a fork of the command, or a new interpreter."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_fast.bulk import fork_server
from clip_fast.cli import encode

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is a new interpreter, as Python has it")

# What a script runs in processes that are forked from the server, and how it learns what they found.
BEGIN = """
import json, multiprocessing, os, sys, threading
from multiprocessing import forkserver
from clip_fast.bulk import fork_server

def child(answers):
    answers.put((os.getpid(), os.getppid(), "torch" in sys.modules, "clip_fast.bulk.preloaded" in sys.modules))

def grandchild(answers):
    answers.put(True)

def nesting(answers):
    process = multiprocessing.get_context("forkserver").Process(target=grandchild, args=(answers,))
    process.start()
    process.join(20)
    if process.exitcode is None:
        answers.put(False)

def answer(target):
    context = fork_server.context()
    answers = context.SimpleQueue()
    process = context.Process(target=target, args=(answers,))
    process.start()
    found = answers.get()
    process.join() if found else process.terminate()
    return found
"""


# The script's process has its imports done, and nothing else. Programs come as lines, and each runs in a fork of it.
SERVE = """
def serve():
    for line in sys.stdin:
        receiving, sending = os.pipe()
        with open("said", "w+") as said:
            process = os.fork()
            if process == 0:
                for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), sending, said.fileno())):
                    os.dup2(file, number)
                os.close(receiving)
                os.close(sending)
                return json.loads(line)
            os.close(sending)
            with open(receiving) as results:
                printed = results.read()  # to the end of the last process that has the pipe
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            said.seek(0)
            print(json.dumps([status, printed, said.read()]), flush=True)
    return ""

if __name__ == "__main__":
    exec(serve())
"""

Run = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(BEGIN + SERVE)
    return script


@pytest.fixture(scope="module")
def run(script: Path) -> Iterator[Run]:
    """Runs a program in a process of its own, and gives the lines that it prints."""
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        command, cwd=script.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as there:
        assert there.stdin is not None
        assert there.stdout is not None
        asked, answers = there.stdin, there.stdout

        def run(program: str) -> list[str]:
            asked.write(json.dumps(program) + "\n")
            asked.flush()
            status, printed, said = json.loads(answers.readline())
            assert status == 0, said
            assert not said, said
            return printed.splitlines()

        yield run
        asked.close()
        assert there.wait(60) == 0


COMMAND_LINE = "print(open(f'/proc/{answer(child)[1]}/cmdline').read().replace(chr(0), ' '))"


def test_it_is_a_fork_with_the_imports_done(run: Run, script: Path) -> None:
    assert run(f"fork_server.start(as_fork=True)\n{COMMAND_LINE}") == [f"{sys.executable} {script} "]


def test_beside_a_thread_a_new_interpreter_is_started(run: Run) -> None:
    """A fork would have what the thread has locked, and not the thread."""
    held = "held = threading.Event()\nthreading.Thread(target=held.wait, daemon=True).start()"
    (line,) = run(f"{held}\nfork_server.start(as_fork=True)\n{COMMAND_LINE}")
    assert "multiprocessing.forkserver" in line


def test_without_the_name_that_is_replaced_a_new_interpreter_is_started(run: Run) -> None:
    """Multiprocessing does not promise it."""
    program = (
        "from multiprocessing import util\nstart = util.spawnv_passfds\n"
        "forkserver.util = type('other', (), {**vars(util), 'spawnv_passfds': start})\ndel util.spawnv_passfds\n"
        "fork_server.resource_tracker.ensure_running = lambda: None\nfork_server.start(as_fork=True)\nprint('started')"
    )
    assert run(program) == ["started"]


def test_its_forks_have_what_decoders_need_and_no_file_of_the_command(run: Run) -> None:
    """It ends with the command: the pipes that the test reads are at their end then."""
    program = (
        "file = open('held.lock', 'w')\nprint('in the buffer')\nfork_server.start(as_fork=True)\n"
        "pid, server, *imported = answer(child)\nassert all(imported)\nassert pid != server != os.getpid()\n"
        "for fd in os.listdir(f'/proc/{server}/fd'):\n"
        "    assert 'held.lock' not in os.path.realpath(f'/proc/{server}/fd/{fd}')"
    )
    assert run(program) == ["in the buffer"]  # once


def test_its_forks_may_start_processes(run: Run) -> None:
    """No lock that is held while the server starts is held in them for ever."""
    assert run("fork_server.start(as_fork=True)\nprint(answer(nesting))") == ["True"]


def test_where_a_fork_fails_a_new_interpreter_is_started(run: Run) -> None:
    failing = "def failing():\n    raise OSError(12, 'no memory')\nos.fork = failing"
    (line,) = run(f"{failing}\nfork_server.start(as_fork=True)\n{COMMAND_LINE}")
    assert "multiprocessing.forkserver" in line


def test_a_gpu_that_the_command_line_names_is_not_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is tried when the command line is parsed."""
    asked: list[bool] = []

    def start(*, as_fork: bool) -> None:
        asked.append(as_fork)
        raise ValueError("asked")

    monkeypatch.setattr(encode, "is_command", lambda: True)
    monkeypatch.setattr(fork_server, "start", start)
    begun = {"output": str(tmp_path / "out.npy"), "workers": 1, "ray": None, "json": False}
    for device, devices in ((None, None), ("cpu", None), (None, ["cpu"]), ("meta", None), (None, ["meta"])):
        given = device and torch.device(device), devices and [torch.device(name) for name in devices]
        with pytest.raises(ValueError, match="asked"):
            encode.encode(argparse.Namespace(**begun, device=given[0], devices=given[1]))
    assert asked == [True, True, True, False, False]


def test_the_command_forks_it(tmp_path: Path) -> None:
    """No second interpreter imports PyTorch: of the processes that a run starts, only the tracker is new."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(tmp_path / "in" / f"{i}.png")
    log = tmp_path / "interpreters"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import sys\nopen({str(log)!r}, 'a').write(' '.join(sys.orig_argv) + chr(10))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    options = ["encode", "in", "--model", "tiny-digits", "--output", "out/", "--quiet", "--workers", "2"]
    command = [sys.executable, "-m", "clip_fast", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command_line, tracker = log.read_text().splitlines()
    assert "clip_fast encode" in command_line
    assert "resource_tracker" in tracker
