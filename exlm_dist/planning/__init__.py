"""What a run needs before it is started: memory, traffic and time of a layout, and which layout to take. No torch."""
