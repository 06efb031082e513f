"""Programs in fresh interpreters, and other commands: begun, waited for, and what they printed.

Keywords that are no options are variables of the process's environment, beside those of this process.
"""

import fnmatch
import os
import subprocess
import sys
import textwrap


def python(program, *arguments, options=()):
    """The command that runs a program with arguments, under options of the interpreter."""
    return [sys.executable, *options, "-c", textwrap.dedent(program), *arguments]


def begin(command, *, without=(), cwd=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment):
    """A process, without the variables whose names are like one of `without`, a shell's patterns."""
    kept = {k: v for k, v in os.environ.items() if not any(fnmatch.fnmatchcase(k, name) for name in without)}
    given = {name: str(value) for name, value in environment.items()}
    words = [str(word) for word in command]
    return subprocess.Popen(words, env=kept | given, cwd=cwd, stdout=stdout, stderr=stderr, text=True)


def end(*processes, returns=0, timeout=300):
    """What each wrote to stdout and stderr, when all have ended with a status; none is left, whatever happens."""
    written = []
    try:
        for process in processes:
            written.append(process.communicate(timeout=timeout))
            assert process.returncode == returns, "".join(filter(None, written[-1]))
    finally:
        for process in processes:
            process.kill()
    return written


def run(command, *, returns=0, timeout=300, quiet=False, **how):
    """What a command prints to stdout; where it is `quiet`, nothing goes to stderr."""
    ((out, err),) = end(begin(command, **how), returns=returns, timeout=timeout)
    assert not (quiet and err), err
    return out
