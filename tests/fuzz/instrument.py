"""Which blocks of tpvc were reached, without a tracer: its modules are compiled with a mark at the head of every block.

To be imported before anything of tpvc is. `HITS` then has a byte for every block, 1 where it was entered.
"""

from __future__ import annotations

import ast
import importlib.machinery
import sys
from importlib.abc import MetaPathFinder

HITS = bytearray(1 << 15)
NOTHING = bytes(len(HITS))
WORDS: set[str] = set()
"""Short strings in the sources: names of fields and kinds, which mutations put in."""
PACKAGES = ("tpvc.compiler", "tpvc.kernels", "tpvc.passes", "gguf.gguf_reader")

_count = 0


class Marks(ast.NodeTransformer):
    """`_hits[n] = 1` at the head of every function, branch, loop, handler and case."""

    def _marked(self, body: list[ast.stmt]) -> list[ast.stmt]:
        global _count
        if not body:
            return body
        _count += 1
        mark = ast.parse(f"_hits[{_count % len(HITS)}] = 1").body
        told = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        return [*body[:told], *mark, *body[told:]]

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        marked = (ast.FunctionDef, ast.If, ast.For, ast.While, ast.ExceptHandler, ast.match_case, ast.Try)
        if isinstance(node, marked):
            for part in ("body", "orelse", "finalbody"):
                if hasattr(node, part):
                    setattr(node, part, self._marked(getattr(node, part)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_word(node.value):
            WORDS.add(node.value)
        return node


def _is_word(text: str) -> bool:
    return 0 < len(text) <= 48 and " " not in text and text.isprintable()


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles the marked source; nothing is kept as bytecode."""

    def get_code(self, fullname: str):
        path = self.get_filename(fullname)
        tree = ast.fix_missing_locations(Marks().visit(ast.parse(self.get_data(path), path)))
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module) -> None:
        module._hits = HITS
        super().exec_module(module)


class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if not name.startswith(PACKAGES):
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := getattr(finder, "find_spec", lambda *_: None)(name, path, target)):
                if isinstance(spec.loader, importlib.machinery.SourceFileLoader):
                    spec.loader = Loader(name, spec.loader.path)
                return spec
        return None


sys.meta_path.insert(0, Finder())
