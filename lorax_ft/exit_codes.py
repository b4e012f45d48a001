"""What the program and its workers end with, as a shell or a launcher sees it."""

BAD_INPUT = 2
STOPPED = 75  # by SIGTERM, and saved: the same command goes on (EX_TEMPFAIL of sysexits)
INTERRUPTED = 130  # by Ctrl-C
