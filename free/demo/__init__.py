"""The embedded default: a small class-conditional DiT of scikit-learn's digits, its weights, and the demo."""

from free.data.digits import load_digits_dit

__all__ = ["load_digits_dit"]
