"""Names that would be Markdown, HTML, mathematics or a terminal's commands: shown as they are, and nothing else."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from tests.conftest import ROOT, TINY_RUN, call, make_images, write_png
from training import records, report
from training.__main__ import main
from training.command import guarded
from training.files import Failed

MATHS = "$x^{$ | <img src=x onerror=alert(1)>"
LINK = "[a](javascript:alert(1))"
DATA = "we|ird @ <script>alert(1)<!-- `x` https:evil"


def outside_code(text):
    return re.sub(r"^(```+).*?^\1$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)


def test_hostile_names_of_files_and_classes_break_neither_report_nor_card(tmp_path):
    data, run = tmp_path / DATA, tmp_path / "`run` <b>"
    images = make_images(24, classes=2)
    for i in range(24):
        picture = images.pixels.picture(i).permute(1, 2, 0)
        write_png(data / "train" / (MATHS, LINK)[images.labels[i]] / f"{i}\n|\x1b[2J.png", picture)
    done = call(
        main, *TINY_RUN, "--data.path", data, "--run", run, "--proxy.epochs", "0", "--relearn.epochs", "1",
        "--evaluate.transfer", json.dumps([str(data)]), "--evaluate.shots", "[]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b[2J" not in done.stdout
    for page in (run / "report.md", run / "hub" / "README.md"):
        text = page.read_text()
        shown = outside_code(text.split("\n---\n")[-1])
        assert "alert(1)" in shown
        assert not re.search(r"<(script|img|b>|!--)|\]\(javascript", shown)
        tables = [block.split("\n") for block in shown.split("\n\n") if block.startswith("|")]
        assert tables
        for table in tables:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, table
        code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL).group(1)
        compile(code, page.name, "exec")
    assert ModelCard.load(run / "hub" / "README.md").data.library_name == "timm"  # its head can be read
    assert {records.data_of(row) for row in records.read(run / "records.jsonl")} == {DATA}


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("proxy_short", "proxy_short"),
        ("_em_ *strong*", r"\_em\_ \*strong\*"),
        ("a|b\nc", r"a\|b c"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("[16, 32]", "[16, 32]"),
        ("[a](b) [a][b] [a]: b", r"[a\](b) [a\][b] [a\]: b"),
        ("http://x www.x", r"http:\//x www\.x"),
    ],
)
def test_a_name_is_written_so_that_markdown_shows_it(name, written):
    assert report.plain(name) == written


def test_code_is_fenced_by_more_than_it_holds():
    assert report.fenced("a\n```\nb\n", "yaml") == "````yaml\na\n```\nb\n````"


def test_what_a_terminal_would_obey_is_spelled_out():
    def fail(arguments):
        raise Failed("the Hub says \x1b]0;x\x07 \u202e \udce9\nand more")

    assert call(fail).stderr == "error: the Hub says \\x1b]0;x\\x07 \\u202e \\udce9\\nand more\n"


def test_what_a_terminal_cannot_show_is_spelled_out(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert guarded(lambda arguments: print("caf\xe9 \udce9 \u65e5"), []) == 0
    out.flush()
    assert out.buffer.getvalue() == b"caf\\xe9 \\udce9 \\u65e5\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_is_no_traceback(name, monkeypatch):
    monkeypatch.setattr(sys, name, None)

    def fail(arguments):
        print("x")
        print("x", file=sys.stderr)
        raise Failed("x")

    assert guarded(fail, []) == 1


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_nobody_reads_any_more_is_written_nowhere(name, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, name, stream)

    def fail(arguments):
        stream.write("x")
        raise Failed("x")

    assert guarded(fail, []) == 1
    stream.close()  # as Python does at its end, once more


def test_an_interrupt_before_the_work_begins_is_no_traceback():
    def interrupted(arguments):
        raise KeyboardInterrupt

    done = call(interrupted)
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT; the same command goes on from here\n")


def test_ctrl_c_while_modules_are_imported_is_one_sentence():
    code = "import sys; sys.argv[0] = '-m'; import training; raise {}"
    done = [
        subprocess.run([sys.executable, "-c", code.format(kind)], capture_output=True, text=True, cwd=ROOT)
        for kind in ("KeyboardInterrupt", "ValueError")
    ]
    assert (done[0].returncode, done[0].stderr) == (-signal.SIGINT, "stopped by SIGINT; nothing was begun\n")
    assert (done[1].returncode, "Traceback" in done[1].stderr) == (1, True)
