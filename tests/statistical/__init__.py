"""Is the law exact? Checks return {name: p-value}; pytest asserts on them and the mutation gate proves that they bite."""
