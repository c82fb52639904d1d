"""A target over processes, which these tests start, a few at a time."""
