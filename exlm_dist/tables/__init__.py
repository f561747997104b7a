"""Files that people have, read as records; tables of results, written whole or not at all."""
