"""Small things every room uses: errors, logging, seeding, atomic files."""
