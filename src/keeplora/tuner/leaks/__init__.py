"""The audit's parts: its rows, and one file per thing that is measured (factors, weights, backward bound, saved exports)."""
