"""`python -m tpvc.compiler.harness ...`: lm_eval's own command line, which then knows `--model tpvc`."""

import sys

from tpvc.compiler.errors import TpvcError
from tpvc.compiler.harness import check_lm_eval

if __name__ == "__main__":
    try:
        check_lm_eval()
    except TpvcError as error:
        print(f"tpvc: {error}", file=sys.stderr)
        sys.exit(2)
    import lm_eval.models  # noqa: F401, the other models it knows, which it looks for only while it knows none
    from lm_eval.__main__ import cli_evaluate

    import tpvc.compiler.harness.model  # noqa: F401

    cli_evaluate()
