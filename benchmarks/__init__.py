"""effic beside its peers on the same work, in one run. Each module prints one table."""
