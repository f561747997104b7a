"""`exlm doctor`: what would waste GPU hours, found before they are spent."""
