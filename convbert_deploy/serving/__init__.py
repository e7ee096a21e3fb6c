"""Text in, answers out: one scoring path for ``run``, bulk jobs, servers and tests."""
