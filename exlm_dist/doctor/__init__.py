"""`exlm doctor`: finds what would waste GPU hours before they are spent. No torch, but in `probe`."""
