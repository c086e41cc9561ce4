"""One tool for many envs and processes: a batching server over HTTP or as a Ray actor, and the tools that ask it."""
