"""What the tool server and the env server share: messages, limits, the guard before them, listening, and asking."""
