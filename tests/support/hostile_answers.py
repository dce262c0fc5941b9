"""Answers that a policy might write instead of solving the task, in one place for all tests."""

from __future__ import annotations

MARK = "hostile-answer-was-here"
"""Name of the file that code in an answer would leave in the folder it is formatted with."""

CODE = {
    "import": '__import__("os").system("touch {mark}")',
    "open": 'open("{mark}", "w").write("x")',
    "list of code": '[open("{mark}", "w").write("x")]',
    "nested list of code": '[[open("{mark}", "w").write("x")]]',
    "comprehension": '[x for x in [open("{mark}", "w")]]',
    "lambda": '(lambda: open("{mark}", "w"))()',
    "conditional": '1 if open("{mark}", "w") else 2',
    "f-string": "f\"{{open('{mark}', 'w')}}\"",
    "exec": "exec(\"open('{mark}', 'w')\")",
    "dunder walk": "().__class__.__base__.__subclasses__()[0]",
    "walrus": '(y := open("{mark}", "w"))',
    "sympy attribute": 'sin.__class__.__init__.__globals__["__builtins__"]["open"]("{mark}", "w")',
    "sympy call": 'Symbol(open("{mark}", "w"))',
    "sympy lambda": 'Lambda(x, open("{mark}", "w"))',
    "yaml": '!!python/object/apply:builtins.open ["{mark}", "w"]',
    "pickle": "cbuiltins\nopen\n(V{mark}\nVw\ntR.",
    "replace the scorers": '__import__("copd_megatron.rewards.registry").rewards.registry.get.clear()',
    "latex": '\\boxed{{\\text{{open("{mark}", "w")}}}}',
}
"""By kind; ``{mark}`` stands for the path of the file."""

DEEP = {
    "brackets": "[" * 5_000 + "]" * 5_000,
    "parentheses": "(" * 3_000 + "1" + ")" * 3_000,
    "parentheses that fit": "(" * 150 + "1" + ")" * 150,
    "json objects": '{"a":' * 3_000 + "1" + "}" * 3_000,
    "signs": "-" * 10_000 + "1",
    "sum": "+".join(["1"] * 8_000),
    "latex braces": "\\frac{" * 2_000 + "1" + "}" * 2_000,
    "not": "not " * 5_000 + "A",
    "negations": "\u00ac" * 3_000 + "A",
}

HUGE = {
    "tower": "9**9**9",
    "high tower": "9**9**9**9",
    "latex tower": "9^{9^{9^9}}",
    "product of towers": "[9**9**9, 9**9**9]",
    "exponent": "1e999999999",
    "exponent with sign": "1E+99999999",
    "small exponent": "1e-99999999",
    "digits": "9" * 100_000,
    "hexadecimal": "0x" + "f" * 20_000,
    "shift": "1 << 10**9",
    "string repeated": "'a' * 10**10",
    "list repeated": "[0] * 10**10",
    "range": "list(range(10**10))",
    "factorial": "factorial(10**9)",
    "postfix factorial": "99999999!",
    "fraction": "1/3e-9999999",
    "division by zero": "1/0",
    "expansion": "(x + 1)**100000",
    "many moves": "U" * 20_000,
}

ODD = {
    "nothing": "",
    "blanks": " \t\n ",
    "nul": "\0",
    "nul between": "1\x002",
    "lone surrogate": "\ud800",
    "right to left": "\u202e1 2 3",
    "arabic digit": "\u0663",
    "half": "\u00bd",
    "superscript": "\u00b2",
    "expands under NFKC": "\ufdfa" * 5_000,
    "combining": "a" + "\u0301" * 5_000,
    "emoji": "\U0001f600\ufe0f",
    "infinity": "inf",
    "not a number": "nan",
    "negative infinity": "-Infinity",
    "underscores": "1_0",
    "commas": ",".join(["1"] * 20_000),
    "null": "null",
    "true": "True",
    "empty list": "[]",
    "empty object": "{}",
    "list of nulls": "[null, null]",
    "line separators": "1\u20282\u20293\x85",
    "escape codes": "\x1b[2J\x1b[31m1",
}

PROTOCOL = {
    "an answer": '{"value": 1.0}\n',
    "an answer with an id": '\n{"id": "0", "value": 1.0}\n',
    "several answers": '{"id": null, "value": 1.0}\n' * 50,
    "a request": '{"load": "os:system"}\n{"fork": true}\n{"end": 1}\n',
    "closing the string": '", "value": 1.0, "x": "',
}
"""What imitates the messages between the grading processes."""

HOSTILE = {
    f"{group}: {kind}": text
    for group, answers in {
        "code": CODE,
        "deep": DEEP,
        "huge": HUGE,
        "odd": ODD,
        "protocol": PROTOCOL,
    }.items()
    for kind, text in answers.items()
}
