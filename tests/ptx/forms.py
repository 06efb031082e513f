"""What the interpreter runs: how often each opcode stands in the kernels' compiled text, and what of it is not known.

    python -m tests.ptx.forms --arch 80 90

compiles what `tests.cuda_variants` chooses of all that plans ask for, --full with the widest kernels. Fails where an
instruction is not known.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from tests import cuda_compile, cuda_variants
from tests.ptx import compiled
from tests.ptx.cuda import ARCHITECTURES
from tests.ptx.program import Program
from tests.ptx.text import Unknown


def text_of(variant: cuda_variants.Variant, architecture: int) -> str:
    """The PTX of a variant, as `launch.function` compiles it."""
    from fastbn.cuda import launch

    options = (*launch.COMPILER_OPTIONS, *(f"-D{name}={value}" for name, value in variant.macros))
    return compiled.ptx(launch.source(variant.kernel), options, architecture)


def count(text: str) -> tuple[Counter[str], list[str]]:
    """Instructions by their full names; and those that are not known, as errors name them."""
    program = Program(text)
    unknown = []
    for block in program.blocks:
        try:
            program.source(block)
        except Unknown as error:
            unknown.append(str(error))
    return Counter(i.name for i in program.entry.code), unknown


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.forms", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=[*ARCHITECTURES])
    parser.add_argument("--full", action="store_true", help="also every option of the widest kernels")
    parser.add_argument("--kernel", action="append", help="only this kernel; may be repeated")
    options = parser.parse_args(arguments)
    if (reason := cuda_compile.without_compiler()) is not None:
        print(reason, file=sys.stderr)
        return 2
    found: dict[str, Counter[str]] = {}
    variants: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for architecture in options.arch:
        for variant in cuda_variants.chosen(architecture, full=options.full):
            if options.kernel and variant.kernel not in options.kernel:
                continue
            names, unknown = count(text_of(variant, architecture))
            variants[variant.kernel] += 1
            forms.update(names)
            missing.update(message.partition(": ")[2] for message in unknown)
            by_opcode = found.setdefault(variant.kernel, Counter())
            for name, times in names.items():
                by_opcode[name.partition(".")[0]] += times
    kernels = sorted(found)
    opcodes = sorted({opcode for names in found.values() for opcode in names})
    print(f"{'':10}", *(f"{kernel:>{len(kernel)}}" for kernel in kernels))
    print(f"{'variants':10}", *(f"{variants[kernel]:>{len(kernel)}}" for kernel in kernels))
    for opcode in opcodes:
        print(f"{opcode:10}", *(f"{found[kernel][opcode] or '':>{len(kernel)}}" for kernel in kernels))
    print(f"{len(opcodes)} opcodes in {len(forms)} forms, {sum(forms.values())} instructions")
    for message, times in missing.most_common():
        print(f"not known, {times} times: {message}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
