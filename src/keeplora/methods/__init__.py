"""Ways to learn tasks in sequence, by name."""

from keeplora.methods.registry import Method, get_method, method_names, register

__all__ = ["Method", "get_method", "method_names", "register"]
