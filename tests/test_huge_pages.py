"""The program asks for huge pages once, where they are of use, and can be told not to."""

import os
import subprocess
import sys

import pytest

from lorax_ft import huge_pages

GLIBC = ("glibc", "2.36")
MADVISE = "always [madvise] never"
PROGRAM = "import sys; from lorax_ft.cli import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("environment", "libc", "mode", "devices", "helps"),
    [
        ({}, GLIBC, MADVISE, [], True),
        ({"JAX_PLATFORMS": "cpu"}, GLIBC, MADVISE, ["/dev/nvidia0"], True),
        ({}, GLIBC, MADVISE, ["/dev/nvidia0"], False),
        ({"JAX_PLATFORMS": "tpu"}, GLIBC, MADVISE, [], False),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, GLIBC, MADVISE, [], False),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, GLIBC, MADVISE, [], True),
        ({}, ("glibc", "2.31"), MADVISE, [], False),
        ({}, ("", ""), MADVISE, [], False),
        ({}, GLIBC, "[always] madvise never", [], False),
        ({}, GLIBC, "always madvise [never]", [], False),
        ({}, GLIBC, "", [], False),
    ],
)
def test_huge_pages_are_asked_for_where_they_help(environment, libc, mode, devices, helps):
    assert huge_pages.would_help(environment, libc=libc, mode=mode, devices=devices) is helps


@pytest.mark.skipif(
    not huge_pages.would_help(
        {"JAX_PLATFORMS": "cpu"}, libc=huge_pages.platform.libc_ver(), mode=huge_pages._mode()
    ),
    reason="this system has no huge pages to ask for",
)
def test_the_program_starts_again_once_and_says_so():
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, "report", "a", "b", *arguments],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )

    told, silent = run(), run("--nohuge_pages")

    assert told.returncode == silent.returncode == 2
    assert told.stderr.count(f"GLIBC_TUNABLES={huge_pages.TUNABLE}") == 1
    assert "got 2" in told.stderr  # the same command went on
    assert "GLIBC_TUNABLES" not in silent.stderr
