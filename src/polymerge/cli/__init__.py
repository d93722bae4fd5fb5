"""The command line: one module a verb, each of which parses, makes one library call and prints."""
