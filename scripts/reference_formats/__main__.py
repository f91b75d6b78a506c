"""Check this package against reference values that other projects' own functions produced.

    scripts/check-reference FILE… [--inputs INPUTS]

Each FILE holds ``cases``. The batches of log-probs they name are in the file itself, or in the one that it names beside
it (``inputs.json``), unless --inputs says otherwise. A case is computed by this package's functions and compared in
float64. Prints a line per failing case and, last, the counts; exits 1 when any case failed.
"""

import argparse
import sys
from pathlib import Path

from reference_formats import check_files


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="check-reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a file of reference cases")
    parser.add_argument("--inputs", type=Path, help="the batches that the cases name")
    arguments = parser.parse_args()
    passed, failures = check_files(arguments.files, arguments.inputs)
    for failure in failures:
        print(failure)
    print(f"{passed} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
