"""What a run will need: memory, traffic and time per step of a layout, and the layout to choose. No torch."""
