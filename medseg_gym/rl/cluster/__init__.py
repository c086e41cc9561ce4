"""Training's parts as Ray actors: handles that are awaited like local parts, and that survive an actor's death."""
