"""The two corpora that ship with the package, for the demonstration and the tests."""
