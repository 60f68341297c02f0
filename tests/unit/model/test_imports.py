import ast
import re
import sys
from pathlib import Path

import quire.model

MODULES = sorted(Path(quire.model.__file__).parent.rglob("*.py"))


def test_model_depends_on_nothing_else_of_quire():
    for path in MODULES:
        text = path.read_text()
        assert set(re.findall(r"(?:from|import) quire\.(\w+)", text)) <= {"model"}, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                name = node.module.split(".")[0]
            elif isinstance(node, ast.Import):
                name = node.names[0].name.split(".")[0]
            else:
                continue
            assert name == "quire" or name in sys.stdlib_module_names, path
