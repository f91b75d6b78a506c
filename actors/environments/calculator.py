"""Arithmetic without ``eval``: numbers, + - * / // % **, brackets, and nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 500
MAX_EXPONENT = 1_000
MAX_DIGITS = 1_000
"""Of any intermediate integer: larger ones would take the actor's time"""

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculate(expression: str) -> str:
    """The value as text, or ``error: …``; never raises, and never takes long."""
    if len(expression) > MAX_CHARACTERS:
        return f"error: an expression has at most {MAX_CHARACTERS} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return f"error: {str(error) or type(error).__name__:.80}"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _apply(op, _value(left), _value(right))
    raise ValueError(f"{ast.unparse(node):.40} is no arithmetic")


def _apply(op: ast.operator, left: int | float, right: int | float) -> int | float:
    if isinstance(op, ast.Pow):
        digits = abs(right) * math.log10(max(abs(left), 1.0)) if left else 0.0
        if abs(right) > MAX_EXPONENT or digits > MAX_DIGITS:
            raise ValueError("the power is too large")
    value: Any = BINARY[type(op)](left, right)
    if isinstance(value, complex):
        raise ValueError("the value is not real")
    if isinstance(value, int) and value.bit_length() > MAX_DIGITS * 4:
        raise ValueError("the number is too large")
    return value  # type: ignore[no-any-return]  # an int or a float by now
