"""Pipelines of tiny random components, and what must hold while they are speculated."""
