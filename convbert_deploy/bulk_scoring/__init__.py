"""Score files of any size: every input row comes out once, whatever dies on the way.

``job.bulk`` is the way through it. An input is cut into shards (``plan``); a worker reads a shard,
scores it with one ``Scorer`` and writes it as one finished file (``shard_scoring``); workers are
processes here (``processes``) or Ray Data actors (``cluster``); what is finished is on disk
(``folder``), so the same command goes on where it was stopped.

Answers do not depend on which rows share a shard or a batch: a ``masked`` engine's do not depend on
padding, and for an ``hf`` engine the Scorer runs only texts of one length together, each without a
pad that it would not have alone. Both therefore answer as ``run`` does; ``masked`` is faster, as its
batches are fuller.
"""
