"""Tests; a package so that helpers such as :mod:`tests.analytic` can be imported."""
