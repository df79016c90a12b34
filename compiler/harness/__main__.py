"""`python -m tpvc.compiler.harness ...`: lm_eval's own command line, which then knows `--model tpvc`."""

import lm_eval.models  # noqa: F401, the other models it knows, which it looks for only while it knows none
from lm_eval.__main__ import cli_evaluate

import tpvc.compiler.harness.model  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
