"""The held-out line: from the file, cut inside the line, with its true end."""

import pytest

from dsplugins.plugins.data.files import Document
from dsplugins.plugins.data.prompt import held_out_line

METHODS = b"import os\n" * 30 + b"class A:\n    def close(self, force=False):\n        return 1\n"
PLAIN = b"value = 1\n" * 30 + b"the_result = some_function(argument, other)\n" + b"x\n" * 9


@pytest.mark.parametrize("context", [48, 192, 400])
@pytest.mark.parametrize("content", [METHODS, PLAIN])
def test_prompt_and_rest_stand_in_the_file(content, context):
    prompt, rest = held_out_line([Document("a.py", content)], context)
    assert prompt + rest.encode() + b"\n" in content
    assert context // 2 <= len(prompt) <= context
    assert rest and "\n" not in rest
    assert not prompt.endswith(b"\n"), "ends inside a line"


def test_a_method_is_preferred():
    prompt, rest = held_out_line([Document("a.py", PLAIN), Document("b.py", METHODS)], 100)
    assert prompt.endswith(b"    def close") and rest == "(self, force=False):"
    assert prompt.startswith(b"import os\n"), "begins at the start of a line"


@pytest.mark.parametrize("content", [b"x\n" * 500, b"# " + b"comment " * 100])
def test_none_where_there_is_no_such_line(content):
    assert held_out_line([Document("a.py", content)], 100) is None
    assert held_out_line([], 100) is None
